"""One backbone, two branches: layers that add a low-rank update to the rows of the negative branch alone.

y = W x + b, and for the chosen rows y + scale up (down x). Both branches are one batch through one network; which rows
are negative is the caller's choice, per thread, so that no adapter is ever switched.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from selfnpo_fast.negatives.low_rank import Deltas, LowRank
from selfnpo_fast.runtime.errors import UserError


class Rows(enum.Enum):
    """The rows along dimension 0 that get the low-rank update."""

    NONE = enum.auto()
    ALL = enum.auto()
    FIRST_HALF = enum.auto()
    """diffusers' classifier-free batches hold the negative rows first."""


class RowChoice(threading.local):
    """What the layers of one backbone read; each thread has its own, and starts at NONE.

    torch.compile guards on the attribute: one graph for each choice. (It cannot trace a ContextVar, and it would not
    guard on a class attribute that a thread's own later hides.)
    """

    def __init__(self) -> None:
        self.rows = Rows.NONE

    def count(self, batch: int) -> int:
        """How many of `batch` rows, from the first, get the update."""
        if self.rows is Rows.NONE:  # compared with `is`: dynamo (2.13) guards on that, and not on a look-up in a dict
            return 0
        return batch if self.rows is Rows.ALL else batch // 2


_PLAIN = RowChoice()
"""Never set. PEFT makes the convolutions of its adapters of the class of the layer below them: those are plain."""


class LowRankLinear(nn.Linear):
    """A Linear made by `install`, which keeps its weight, bias, names and hooks and gains two buffers.

    The buffers are not persistent: they move with the network and stay out of its state dict. Rows (B, ..., in).
    """

    choice: RowChoice = _PLAIN
    low_rank_down: torch.Tensor
    low_rank_up: torch.Tensor
    """The update's scale included."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ..., in) to (B, ..., out) in the layer's dtype."""
        out = super().forward(x)
        count = self.choice.count(len(x))
        if count == 0:
            return out
        low = F.linear(x[:count], self.low_rank_down)
        # The product is added where it is made: no pass over the rows of its own. Under autocast dtypes differ.
        up = self.low_rank_up.to(out.dtype)
        out[:count].view(-1, len(up)).addmm_(low.reshape(-1, up.shape[1]), up.t())
        return out


class LowRankConv2d(nn.Conv2d):
    """A Conv2d made by `install`, as LowRankLinear is; `down` has the layer's kernel and stride, `up` is 1x1."""

    choice: RowChoice = _PLAIN
    low_rank_down: torch.Tensor
    low_rank_up: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in, H, W) to (B, out, H', W') in the layer's dtype."""
        out = super().forward(x)
        count = self.choice.count(len(x))
        if count == 0:
            return out
        low = self._conv_forward(x[:count], self.low_rank_down, None)
        out[:count] += F.conv2d(low, self.low_rank_up)
        return out


_LOW_RANK = {nn.Linear: LowRankLinear, nn.Conv2d: LowRankConv2d}
_PLAIN_CLASS = {low_rank: plain for plain, low_rank in _LOW_RANK.items()}


class LowRankBackbone:
    """A denoiser whose layers carry low-rank updates; made by `install`, undone by `remove`."""

    def __init__(self, layers: list[nn.Module], attentions: list[nn.Module], choice: RowChoice) -> None:
        self._layers, self._attentions, self._choice = layers, attentions, choice

    def __str__(self) -> str:
        layers, size = len(self._layers), self.nbytes / 2**20
        return f"LoRA on {layers} layers, {size:.1f} MiB: both branches are one batch through one network"

    @property
    def nbytes(self) -> int:
        """What the updates hold, in bytes: all that the negative costs."""
        return sum(layer.low_rank_down.nbytes + layer.low_rank_up.nbytes for layer in self._layers)

    def choose(self, choice: Rows) -> None:
        """This thread's rows from now on. UserError where fused projections have put the layers out of use."""
        if choice is not Rows.NONE and any(map(_is_fused, self._attentions)):
            raise UserError(_FUSED)
        self._choice.rows = choice

    @contextmanager
    def rows(self, choice: Rows) -> Iterator[None]:
        """This thread's rows within the block; what they were is restored after it."""
        before = self._choice.rows
        self.choose(choice)
        try:
            yield
        finally:
            self._choice.rows = before

    def reset(self) -> None:
        """This thread's rows get no update."""
        self.choose(Rows.NONE)

    def begin(self, args: tuple, kwargs: dict) -> None:
        """A call of the denoiser with both branches begins, the negative rows first."""
        self.choose(Rows.FIRST_HALF)

    def end(self, output: Any) -> None:
        """The call has ended."""
        self.reset()

    def remove(self) -> None:
        """Make the layers plain again, wherever they are by now. A second call does nothing.

        UserError, and nothing changed, while hooks on the single layers hold on to what they were given.
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
    """Give the layers at the paths of `deltas` their low-rank updates, which start switched off.

    A layer under a PEFT adapter gets its update beside the adapter's: both add up. UserError, and nothing changed,
    where a layer is missing, of another shape, quantised, offloaded on its own, or carries an update already.
    """
    if not deltas:
        raise UserError("negative: the LoRA holds no layer")
    attentions = [module for module in denoiser.modules() if hasattr(module, "fused_projections")]
    if any(map(_is_fused, attentions)):
        raise UserError(_FUSED)
    layers = {path: _layer_at(denoiser, path) for path in deltas}
    if len({id(layer) for layer in layers.values()}) < len(layers):
        raise UserError("negative: the LoRA names one layer twice")
    for path, layer in layers.items():
        _check(path, layer, deltas[path])
    buffers = {path: _buffers(layer.weight, deltas[path]) for path, layer in layers.items()}
    choice = RowChoice()
    for path, layer in layers.items():  # nothing below can fail
        # The class is swapped in place, as torch's own parametrizations do: the layer stays the same object for PEFT,
        # offload hooks and whoever else holds it, and torch.compile, which guards on the class, compiles anew.
        _set_class(layer, _LOW_RANK[type(layer)])
        layer.choice = choice
        for name, buffer in buffers[path].items():
            layer.register_buffer(name, buffer, persistent=False)
    return LowRankBackbone(list(layers.values()), attentions, choice)


def _is_patched(layer: nn.Module) -> bool:
    """Has a hook put a forward of its own in front of the class's?"""
    forward = vars(layer).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(layer).forward


def _set_class(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Swap the class, and drop the forward of the old one that hooks leave on the layer when they are removed."""
    vars(layer).pop("forward", None)
    layer.__class__ = kind


def _is_fused(attention: nn.Module) -> bool:
    """unfuse_qkv_projections() changes the processor alone and leaves the flag as it was."""
    return attention.fused_projections and "Fused" in type(attention.processor).__name__


_FUSED = (
    "negative: the attention projections are fused, which puts the layers that the LoRA changes out of use; call "
    "unfuse_qkv_projections() first"
)


def _layer_at(denoiser: nn.Module, path: str) -> nn.Module:
    try:
        layer = denoiser.get_submodule(path)
    except AttributeError as error:
        raise UserError(f"negative: the LoRA changes {path}, which the model does not have") from error
    while hasattr(layer, "base_layer"):  # a PEFT adapter around it
        layer = layer.base_layer
    return layer


def _check(path: str, layer: nn.Module, delta: LowRank) -> None:
    kind = type(layer).__name__
    if type(layer) in _PLAIN_CLASS:
        raise UserError(f"negative: {path} already carries a negative's update; detach that one first")
    if type(layer) not in _LOW_RANK or type(layer.weight.data) is not torch.Tensor:
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
    rank, shape = delta.rank, tuple(layer.weight.shape)
    expected = (rank, *shape[1:]), (shape[0], rank, *[1] * (len(shape) - 2))
    found = tuple(delta.down.shape), tuple(delta.up.shape)
    if found != expected:
        raise UserError(
            f"negative: the LoRA's {path} has shapes {found[0]} and {found[1]}, the model needs {expected[0]} and "
            f"{expected[1]}; it was trained on another model"
        )


def _buffers(weight: torch.Tensor, delta: LowRank) -> dict[str, torch.Tensor]:
    """Down, and up times scale, beside the weight; the product is rounded once."""
    up = delta.up.detach().double() * delta.scale
    return {
        "low_rank_down": delta.down.detach().to(weight, copy=True).contiguous(),
        "low_rank_up": up.to(weight).contiguous(),
    }
