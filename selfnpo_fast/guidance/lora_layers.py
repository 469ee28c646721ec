"""Layers that add a low-rank update to the rows of the negative branch.

A layer computes y = W x + b, and y + scale up (down x) for the chosen rows. So one network computes
both branches as one batch. Each thread chooses its rows, and no adapter is ever switched.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from selfnpo_fast.negatives.low_rank import Deltas, LowRank, factor_shapes
from selfnpo_fast.negatives.weights import without_adapter
from selfnpo_fast.runtime.errors import UserError


class Rows(enum.Enum):
    """Which rows, along dimension 0, get the low-rank update."""

    NONE = enum.auto()
    ALL = enum.auto()
    FIRST_HALF = enum.auto()
    """The negative rows come first in diffusers' batches of both branches."""


class RowChoice(threading.local):
    """The choice of rows that all layers of one backbone read: one for each thread, NONE at first.

    torch.compile guards on the attribute `rows`, which gives one graph for each choice. It cannot
    trace a ContextVar. It would not guard on a class attribute that an attribute of a thread hides
    later.
    """

    def __init__(self) -> None:
        self.rows = Rows.NONE

    def count(self, batch: int) -> int:
        """How many of `batch` rows, counted from the first, get the update."""
        if self.rows is Rows.NONE:  # dynamo (2.13) guards on `is`, but not on a look-up in a dict
            return 0
        return batch if self.rows is Rows.ALL else batch // 2


_PLAIN = RowChoice()
"""The choice of layers that `install` has not changed, which stays NONE.

PEFT makes the convolutions of an adapter instances of the class of the layer under the adapter.
"""


class LowRankLinear(nn.Linear):
    """A Linear that `install` has given a low-rank update; its weight, bias, name and hooks stay.

    The factors are buffers that move with the network and are not in its state dict.
    """

    choice: RowChoice = _PLAIN
    low_rank_down: torch.Tensor
    """(r, in), in the weight's dtype."""
    low_rank_up: torch.Tensor
    """(out, r), in the weight's dtype, times the update's scale."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ..., in) to (B, ..., out), in the layer's dtype."""
        out = super().forward(x)
        count = self.choice.count(len(x))
        if count == 0:
            return out
        low = F.linear(x[:count], self.low_rank_down)
        # addmm_ adds the product in place, without another pass over the rows. Under autocast the
        # dtypes of output and factor differ.
        up = self.low_rank_up.to(out.dtype)
        out[:count].view(-1, len(up)).addmm_(low.reshape(-1, up.shape[1]), up.t())
        return out


class LowRankConv2d(nn.Conv2d):
    """A Conv2d that `install` has given a low-rank update, in the way of LowRankLinear."""

    choice: RowChoice = _PLAIN
    low_rank_down: torch.Tensor
    """(r, in, h, w), applied with the layer's stride, padding and dilation."""
    low_rank_up: torch.Tensor
    """(out, r, 1, 1), times the update's scale."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in, H, W) to (B, out, H', W'), in the layer's dtype."""
        out = super().forward(x)
        count = self.choice.count(len(x))
        if count == 0:
            return out
        low = self._conv_forward(x[:count], self.low_rank_down, None)
        out[:count] += F.conv2d(low, self.low_rank_up)
        return out


PlainLayer = nn.Linear | nn.Conv2d
LowRankLayer = LowRankLinear | LowRankConv2d

_LOW_RANK_CLASS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LowRankLinear, nn.Conv2d: LowRankConv2d}
_PLAIN_CLASS = {low_rank: plain for plain, low_rank in _LOW_RANK_CLASS.items()}


class LowRankBackbone:
    """A denoiser whose layers carry low-rank updates: made by `install`, undone by `remove`."""

    def __init__(self, layers: list[LowRankLayer], attentions: list[nn.Module], choice: RowChoice) -> None:
        self._layers, self._attentions, self._choice = layers, attentions, choice

    def __str__(self) -> str:
        layers, size = len(self._layers), self.nbytes / 2**20
        return f"LoRA on {layers} layers, {size:.1f} MiB: both branches are one batch through one network"

    @property
    def nbytes(self) -> int:
        """The bytes of all updates, which is the memory that the negative takes."""
        return sum(layer.low_rank_down.nbytes + layer.low_rank_up.nbytes for layer in self._layers)

    def choose(self, choice: Rows) -> None:
        """Choose this thread's rows from now on.

        Raises UserError where fused projections bypass the layers.
        """
        if choice is not Rows.NONE and any(map(_is_fused, self._attentions)):
            raise UserError(_FUSED)
        self._choice.rows = choice

    @contextmanager
    def rows(self, choice: Rows) -> Iterator[None]:
        """Choose this thread's rows within the block; the choice before is restored after it.

        Raises UserError like `choose`.
        """
        before = self._choice.rows
        self.choose(choice)
        try:
            yield
        finally:
            self._choice.rows = before

    def reset(self) -> None:
        """Choose no rows for this thread."""
        self.choose(Rows.NONE)

    def begin(self, args: tuple, kwargs: dict) -> None:
        """Called before a forward of the denoiser on both branches, the negative rows first."""
        self.choose(Rows.FIRST_HALF)

    def end(self, output: Any) -> None:
        """Called after that forward."""
        self.reset()

    def remove(self) -> None:
        """Make the layers plain again, on their current device. A second call does nothing.

        Raises UserError where layers were offloaded one by one, since those hooks keep the buffers;
        nothing is changed then.
        """
        if any(map(_is_patched, self._layers)):
            raise UserError(
                "negative: the layers were offloaded one by one while it was attached; call pipe.remove_all_hooks(), "
                "then detach it"
            )
        for layer in self._layers:
            del layer.low_rank_down, layer.low_rank_up, layer.choice
            _set_class(layer, _PLAIN_CLASS[type(layer)])
        self._layers = []


def install(denoiser: nn.Module, deltas: Deltas) -> LowRankBackbone:
    """Give the layers at the paths of `deltas` their low-rank updates, switched off at first.

    The update of a layer under a PEFT adapter is added to the adapter's.

    Raises UserError where a layer is missing, is quantised or offloaded, has another shape, or has
    an update already. Nothing is changed then.
    """
    # Check everything and allocate the buffers first: the changes below cannot fail.
    if not deltas:
        raise UserError("negative: the LoRA holds no layer")
    attentions = [module for module in denoiser.modules() if hasattr(module, "fused_projections")]
    if any(map(_is_fused, attentions)):
        raise UserError(_FUSED)
    modules = {path: _layer_at(denoiser, path) for path in deltas}
    if len({id(layer) for layer in modules.values()}) < len(modules):
        raise UserError("negative: the LoRA names one layer twice")
    layers = {path: _checked(path, layer, deltas[path]) for path, layer in modules.items()}
    buffers = {path: _buffers(layer.weight, deltas[path]) for path, layer in layers.items()}
    choice = RowChoice()
    changed = [_with_update(layer, choice, buffers[path]) for path, layer in layers.items()]
    return LowRankBackbone(changed, attentions, choice)


def _with_update(layer: PlainLayer, choice: RowChoice, buffers: dict[str, torch.Tensor]) -> LowRankLayer:
    """The layer itself, after its class is swapped in place and the buffers are registered.

    torch's parametrizations swap classes too. The layer stays the same object for PEFT, offload
    hooks and others. torch.compile guards on the class, so it compiles the layer again.
    """
    _set_class(layer, _LOW_RANK_CLASS[type(layer)])
    changed = cast(LowRankLayer, layer)
    changed.choice = choice
    for name, buffer in buffers.items():
        changed.register_buffer(name, buffer, persistent=False)
    return changed


def _is_patched(layer: nn.Module) -> bool:
    """Whether a hook has replaced the layer's forward."""
    forward = vars(layer).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(layer).forward


def _set_class(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Swap the class, and drop a `forward` of the old class that a removed hook has left behind."""
    vars(layer).pop("forward", None)
    layer.__class__ = kind


def _is_fused(attention: nn.Module) -> bool:
    """Whether the attention computes its projections with one fused layer.

    The flag is not enough: unfuse_qkv_projections() resets the processor, but not the flag.
    """
    return bool(attention.fused_projections) and "Fused" in type(attention.processor).__name__


_FUSED = (
    "negative: the attention projections are fused, which puts the layers that the LoRA changes out of use; call "
    "unfuse_qkv_projections() first"
)


def _layer_at(denoiser: nn.Module, path: str) -> nn.Module:
    """The layer at a path, without a PEFT adapter. Raises UserError where there is none."""
    try:
        return without_adapter(denoiser.get_submodule(path))
    except AttributeError as error:
        raise UserError(f"negative: the LoRA changes {path}, which the model does not have") from error


def _checked(path: str, layer: nn.Module, delta: LowRank) -> PlainLayer:
    """The layer, which can take the update. Raises UserError where it cannot."""
    kind = type(layer).__name__
    if type(layer) in _PLAIN_CLASS:
        raise UserError(f"negative: {path} already carries a negative's update; detach that one first")
    # A subclass or a quantised weight may compute something else than W x + b.
    plain_class = type(layer) in _LOW_RANK_CLASS
    if not isinstance(layer, PlainLayer) or not plain_class or type(layer.weight.data) is not torch.Tensor:
        weight = type(getattr(layer, "weight", None)).__name__
        raise UserError(
            f"negative: {path} is a {kind} with a {weight} as its weight; a LoRA goes on a plain Linear or Conv2d, "
            "load the model without quantisation"
        )
    if not layer.weight.is_floating_point() or layer.weight.itemsize < 2:
        raise UserError(f"negative: {path} holds {layer.weight.dtype} weights; load the model in bfloat16 or float32")
    if _is_patched(layer) or layer.weight.is_meta:
        raise UserError(f"negative: {path} is offloaded on its own; attach the negative first, then turn offload on")
    if getattr(layer, "groups", 1) != 1:
        raise UserError(f"negative: {path} is a grouped convolution, on which no LoRA can go")
    shapes = tuple(delta.down.shape), tuple(delta.up.shape)
    expected = factor_shapes(tuple(layer.weight.shape), delta.rank)
    if shapes != expected:
        raise UserError(
            f"negative: the LoRA's {path} has shapes {shapes[0]} and {shapes[1]}, the model needs {expected[0]} and "
            f"{expected[1]}; it was trained on another model"
        )
    return layer


def _buffers(weight: torch.Tensor, delta: LowRank) -> dict[str, torch.Tensor]:
    """Copies of down, and of up times scale, in the weight's dtype and on its device.

    The product is computed in float64 and rounded once.
    """
    up = delta.up.detach().double() * delta.scale
    return {
        "low_rank_down": delta.down.detach().to(weight, copy=True).contiguous(),
        "low_rank_up": up.to(weight).contiguous(),
    }
