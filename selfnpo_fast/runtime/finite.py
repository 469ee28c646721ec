"""Whether tensors hold numbers only, neither NaN nor infinity."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values of a tensor of any shape and dtype are finite. Waits for its device.

    One pass over the values: the smallest and the largest are NaN where any value is. `isfinite`
    would write a tensor of truths first, and takes twenty times as long on a CPU.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(extreme.isfinite().item() for extreme in torch.aminmax(tensor.detach()))


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first of these (name, tensor) pairs that is not finite, or None."""
    return next((name for name, tensor in tensors if not is_finite(tensor)), None)
