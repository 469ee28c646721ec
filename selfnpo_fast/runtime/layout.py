"""What is expected of saved state, checked before any of it is used.

`copy_` would broadcast a tensor of another shape and cast one of another dtype without a word, and
an index out of range reads foreign memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from selfnpo_fast.runtime.errors import one_line, shortened

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""dtype and shape of each tensor by name."""


def layout_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> Layout:
    """The layout of (name, tensor) pairs."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors}


def check_layout(found: Layout, expected: Layout) -> None:
    """ValueError that names the first tensor which is missing, unknown or of another kind."""
    for name in expected:
        if name not in found:
            raise ValueError(f"{name} is missing")
    for name, kind in found.items():
        if name not in expected:
            raise ValueError(f"{one_line(name, 80)} is unknown to this run")
        if kind != expected[name]:
            (dtype, shape), (right_dtype, right_shape) = kind, expected[name]
            raise ValueError(f"{name} is {dtype} {shortened(shape)}; expected {right_dtype} {right_shape}")


def check_range(name: str, tensor: torch.Tensor, least: int, most: int) -> None:
    """ValueError where an integer tensor of any shape holds a value outside of least to most."""
    if tensor.numel() and not (least <= tensor.min() and tensor.max() <= most):
        raise ValueError(f"{name} holds {tensor.min()} to {tensor.max()}; expected {least} to {most}")


def check_keys(found: object, expected: Iterable[str]) -> None:
    """ValueError where a value of a JSON file is no object with just these keys."""
    if not isinstance(found, dict):
        raise ValueError(f"{shortened(found)} is no object")
    expected = set(expected)
    if found.keys() != expected:
        odd = sorted(found.keys() ^ expected)[0]
        raise ValueError(f"{one_line(odd, 80)} is {'unknown' if odd in found else 'missing'}")


def check_whole_number(name: str, value: object, least: int = 0, most: int = 2**53) -> None:
    """ValueError where a value of a JSON file is no integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} is {shortened(value)}; expected a whole number from {least} to {most}")


def check_number(name: str, value: object, least: float = 0.0) -> None:
    """ValueError where a value of a JSON file is no finite number of at least `least`."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or value < least:
        raise ValueError(f"{name} is {shortened(value)}; expected a finite number of at least {least:g}")
