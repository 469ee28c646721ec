"""A negative with full weights: the rows of a classifier-free batch are parted between two networks."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from selfnpo_fast.models import Family
from selfnpo_fast.runtime.errors import UserError


def rows_of(args: tuple, kwargs: dict, family: Family) -> int:
    """How many rows a call of the denoiser has: those of its first argument."""
    return len(args[0] if args else kwargs[family.input_name])


def take_rows(value: Any, rows: slice, batch: int, whole: Collection[str] = ()) -> Any:
    """`value` with every tensor of `batch` rows, at any depth of lists, tuples and dicts, cut to `rows`.

    0-d tensors, tensors of other lengths and all else are left as they are, and so are the dict entries
    named in `whole`. Lists and dicts are new: denoisers pop from them.
    """
    if isinstance(value, torch.Tensor):
        return value[rows] if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {key: part if key in whole else take_rows(part, rows, batch, whole) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [take_rows(part, rows, batch, whole) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def join_rows(first: Any, second: Any) -> Any:
    """A denoiser's outputs of two halves as its output of the whole: a tuple, or diffusers' output object."""
    if isinstance(first, tuple):
        return tuple(torch.cat(pair) for pair in zip(first, second, strict=True))
    return type(first)(sample=torch.cat([first.sample, second.sample]))


class Follower(nn.Module):
    """A child of the denoiser that moves another network wherever the denoiser is moved.

    It has no parameters and registers nothing, so state dicts, parameter counts and `save_pretrained` do not see the
    negative, while `to`, `half` and accelerate's offload, which all come down to `_apply`, take it along.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._held = (network,)  # in a tuple: nn.Module registers a bare one

    def _apply(self, fn, recurse: bool = True) -> Follower:
        self._held[0]._apply(fn, recurse)
        return self


_CHILD = "negative_follower"


class TwoNetworks:
    """The denoiser computes the positive rows, `network` the negative ones; `remove` undoes what this adds."""

    def __init__(self, denoiser: nn.Module, network: nn.Module, family: Family) -> None:
        """Raises UserError where the network cannot run beside the denoiser; then neither has changed."""
        if network is denoiser:
            raise UserError("negative: it is the pipeline's own denoiser; give a network of its own")
        first = next(denoiser.parameters())
        nn.Module.to(network.requires_grad_(False).eval(), first.device, first.dtype)  # without ModelMixin's warning
        self._denoiser, self._network, self._family = denoiser, network, family
        self._shared = family.shared_parts(denoiser, network)
        self._pending = threading.local()
        denoiser.add_module(_CHILD, Follower(network))

    def __str__(self) -> str:
        size = sum(p.nbytes for p in self._network.parameters()) / 2**20
        return f"full weights, {size:.1f} MiB: a second network computes the negative rows"

    def reset(self) -> None:
        """Forget this thread's negative rows."""
        self._pending.call = None

    def begin(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The positive rows' arguments, from those of a call with both; the negative rows, the first half, are kept."""
        batch, whole = rows_of(args, kwargs, self._family), self._family.not_rows
        first, second = slice(0, batch // 2), slice(batch // 2, batch)
        self._pending.call = tuple(take_rows(value, first, batch, whole) for value in (args, kwargs))
        return take_rows(args, second, batch, whole), take_rows(kwargs, second, batch, whole)

    def end(self, output: Any) -> Any:
        """The denoiser's output for both, from that for the positive rows; None where `begin` was not called."""
        call = getattr(self._pending, "call", None)
        self.reset()
        if call is None:
            return None
        here, there = next(self._network.parameters()).device, output[0].device
        if here != there:
            raise UserError(
                f"negative: it is on {here}, the denoiser computes on {there}: offload layer by layer does not take "
                "it along; use enable_model_cpu_offload(), or a LoRA as the negative"
            )
        self._shared.follow()
        args, kwargs = call
        return join_rows(self._network(*args, **kwargs), output)

    def remove(self) -> None:
        """Leave the denoiser and the network as they were found."""
        self._shared.restore()
        delattr(self._denoiser, _CHILD)
