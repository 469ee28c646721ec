"""A denoiser whose layers carry a LoRA's updates: installed, looked after, and removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from selfnpo_fast.guidance.lora_layers import Factors, LowRankConv2d, LowRankLinear, RowChoice, Rows, low_rank_class
from selfnpo_fast.models.call_rules import Branch
from selfnpo_fast.negatives.formats import SERVED, quantisation_of_module
from selfnpo_fast.negatives.low_rank import Deltas, LowRank, factor_shapes, update_dtype, weight_shape
from selfnpo_fast.negatives.weights import without_adapter
from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import UserError

PlainLayer = nn.Linear | nn.Conv2d
LowRankLayer = LowRankLinear | LowRankConv2d

_LOW_RANK_CLASS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LowRankLinear, nn.Conv2d: LowRankConv2d}
_PLAIN_CLASS = {low_rank: plain for plain, low_rank in _LOW_RANK_CLASS.items()}
_QUANTISED = ("Linear4bit", "Linear8bitLt")
"""The layers of bitsandbytes that can have an update. torchao's are plain ones with another kind of
weight."""


def _knows(kind: type[nn.Module]) -> bool:
    """Whether a LoRA can go on layers of this class; the class for it is made at the first look."""
    if kind not in _LOW_RANK_CLASS and kind.__module__.startswith("bitsandbytes.nn") and kind.__name__ in _QUANTISED:
        changed = low_rank_class(cast(type[nn.Linear], kind))
        _LOW_RANK_CLASS[kind], _PLAIN_CLASS[changed] = changed, kind
        _FORWARDS.update((kind.forward, changed.forward))
    return kind in _LOW_RANK_CLASS


@dataclass(frozen=True)
class Site:
    """Where a changed layer is in its network."""

    path: str
    """The layer's path from the denoiser, without a PEFT adapter."""
    parent: nn.Module
    """The module whose child is the layer, or the adapter around the layer."""
    layer: LowRankLayer

    @property
    def name(self) -> str:
        """The child's name in its parent."""
        return self.path.rpartition(".")[2]


class LowRankBackbone:
    """A denoiser whose layers carry low-rank updates: made by `install`, undone by `remove`."""

    def __init__(self, sites: list[Site], choice: RowChoice) -> None:
        self._sites, self._choice = sites, choice
        self._projections = {id(site.parent): site.parent for site in sites if site.name in _PROJECTIONS}
        self._guards: dict[int, tuple[nn.Module, RemovableHandle]] = {}  # on fused layers, by id

    def __str__(self) -> str:
        layers, size = len(self._sites), self.nbytes / 2**20
        return f"LoRA on {layers} layers, {size:.1f} MiB: one network computes both branches"

    @property
    def nbytes(self) -> int:
        """The bytes of all updates, which is the memory that the negative takes."""
        return sum(site.layer.low_rank.nbytes for site in self._sites)

    def choose(self, choice: Rows) -> None:
        """Choose this thread's rows from now on.

        Raises UserError where fused projections bypass the layers. Where it cannot be told yet
        whether fused layers are in use, the forward that uses one raises it.
        """
        if choice is not Rows.NONE:
            for attention in self._projections.values():
                if _is_fused(attention):
                    raise UserError(_FUSED)
                self._guard_fused(attention)
        self._choice.rows = choice

    def _guard_fused(self, attention: nn.Module) -> None:
        """Let the attention's fused layers, where there are any, refuse rows that get the update."""
        for name in _FUSED_LAYERS:
            fused = attention._modules.get(name)
            if fused is not None and id(fused) not in self._guards and not hasattr(fused, "low_rank"):
                self._guards[id(fused)] = fused, fused.register_forward_pre_hook(self._refuse_fused)

    def _refuse_fused(self, module: nn.Module, args: tuple) -> None:
        """The hook before a forward of a fused layer."""
        if self._choice.rows is not Rows.NONE:
            raise UserError(_FUSED)

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

    def begin(self, args: tuple, kwargs: dict, branch: Branch) -> None:
        """Called before a forward of the denoiser that has negative rows."""
        self.choose(_ROWS[branch])

    def end(self, output: Any) -> None:
        """Called after that forward."""
        self.reset()

    def check(self) -> None:
        """Called at the start of a pipeline's call: raise UserError where a changed layer is gone.

        A forward that somebody has put around a layer's own is said once.
        """
        for site in self._sites:
            child = site.parent._modules.get(site.name)
            if child is None or without_adapter(child) is not site.layer:
                raise UserError(
                    f"negative: {site.path} was replaced after the negative was attached, so the LoRA's part there is "
                    "lost; call detach_negative(pipe), and attach it again"
                )
            if _is_patched(site.layer) and not is_offloaded(site.layer):
                say_once(
                    f"negative: the forward of {site.path} was replaced after the negative was attached; the LoRA's "
                    "part is lost there unless the new one calls the old one"
                )

    def remove(self) -> None:
        """Make the layers plain again, on their current device. A second call does nothing."""
        for site in self._sites:
            layer = site.layer
            del layer.low_rank, layer.choice
            if type(layer) in _PLAIN_CLASS:  # it is not under a parametrization
                _set_class(layer, _PLAIN_CLASS[type(layer)])
        for _, guard in self._guards.values():
            guard.remove()
        self._sites, self._projections, self._guards = [], {}, {}


_ROWS = {Branch.NEGATIVE: Rows.ALL, Branch.FIRST_HALF: Rows.FIRST_HALF, Branch.LAST_HALF: Rows.LAST_HALF}


def install(denoiser: nn.Module, deltas: Deltas) -> LowRankBackbone:
    """Give the layers at the paths of `deltas` their low-rank updates, switched off at first.

    The update of a layer under a PEFT adapter is added to the adapter's.

    Raises UserError where a layer is missing, is offloaded or quantised by another library than
    bitsandbytes or torchao, has another shape, or has an update already. Nothing is changed then.
    """
    # Check everything and allocate the factors first: the changes below cannot fail.
    if not deltas:
        raise UserError("negative: the LoRA holds no layer")
    modules = {path: _layer_at(denoiser, path) for path in deltas}
    if len({id(layer) for layer in modules.values()}) < len(modules):
        raise UserError("negative: the LoRA names one layer twice")
    layers = {path: _checked(path, layer, deltas[path]) for path, layer in modules.items()}
    parents = {path: denoiser.get_submodule(path.rpartition(".")[0]) for path in layers}
    if any(_is_fused(parent) for path, parent in parents.items() if path.endswith(_PROJECTIONS)):
        raise UserError(_FUSED)
    factors = {
        path: _factors(deltas[path], layer.weight.device, update_dtype(layer, denoiser))
        for path, layer in layers.items()
    }
    choice = RowChoice()
    sites = [Site(path, parents[path], _with_update(layers[path], choice, factors[path])) for path in layers]
    return LowRankBackbone(sites, choice)


def _with_update(layer: PlainLayer, choice: RowChoice, factors: Factors) -> LowRankLayer:
    """The layer itself, after its class is swapped in place and the factors are its child.

    torch's parametrizations swap classes too. The layer stays the same object for PEFT, offload
    hooks and others. torch.compile guards on the class, so it compiles the layer again.
    """
    _set_class(layer, _LOW_RANK_CLASS[type(layer)])
    changed = cast(LowRankLayer, layer)
    changed.choice, changed.low_rank = choice, factors
    return changed


def _is_own_forward(layer: nn.Module, forward: object) -> bool:
    """Whether an attribute `forward` of the layer is its class's, as a removed hook leaves it."""
    return getattr(forward, "__self__", None) is layer and getattr(forward, "__func__", None) in _FORWARDS


_FORWARDS = {kind.forward for kind in (*_LOW_RANK_CLASS, *_PLAIN_CLASS)}


def _is_patched(layer: nn.Module) -> bool:
    """Whether the layer's forward was replaced, by a hook or by somebody else."""
    forward = vars(layer).get("forward")
    return forward is not None and not _is_own_forward(layer, forward)


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate or diffusers offloads or casts the module."""
    return hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")


def _set_class(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Swap the class, and drop a `forward` of the old class that a removed hook has left behind."""
    if not _is_patched(layer):
        vars(layer).pop("forward", None)
    layer.__class__ = kind


_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_FUSED_LAYERS = ("to_qkv", "to_kv", "to_added_qkv")
"""The layers that diffusers' attentions compute instead of those of `_PROJECTIONS` when fused."""


def _is_fused(attention: nn.Module) -> bool:
    """Whether it is certain that the module is an attention that uses its fused layers.

    Attentions with `unfuse_projections` (diffusers' AttentionModuleMixin) go by their flag. In an
    older one, as in a UNet, the processor decides: unfuse_qkv_projections() leaves flag and layers.
    """
    if not getattr(attention, "fused_projections", False):
        return False
    return hasattr(attention, "unfuse_projections") or "Fused" in type(getattr(attention, "processor", None)).__name__


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
    # A subclass or another library's weight may compute something else than W x + b.
    served = _knows(type(layer)) and quantisation_of_module(layer) in SERVED
    plain = _knows(type(layer)) and type(layer.weight.data) is torch.Tensor  # type: ignore[union-attr]
    if not isinstance(layer, PlainLayer) or not (plain or served):
        weight = type(getattr(layer, "weight", None)).__name__
        raise UserError(
            f"negative: {path} is a {kind} with a {weight} as its weight; a LoRA goes on a plain Linear or Conv2d, or "
            f"one quantised by {' or '.join(SERVED)}; load the model without other quantisation"
        )
    if not served and (not layer.weight.is_floating_point() or layer.weight.itemsize < 2):
        raise UserError(f"negative: {path} holds {layer.weight.dtype} weights; load the model in bfloat16 or float32")
    if is_offloaded(layer) or layer.weight.is_meta:
        raise UserError(f"negative: {path} is offloaded on its own; attach the negative first, then turn offload on")
    if _is_patched(layer):
        raise UserError(f"negative: the forward of {path} was replaced; attach the negative first, then replace it")
    if getattr(layer, "groups", 1) != 1:
        raise UserError(f"negative: {path} is a grouped convolution, on which no LoRA can go")
    shapes = tuple(delta.down.shape), tuple(delta.up.shape)
    expected = factor_shapes(weight_shape(layer), delta.rank)
    if shapes != expected:
        raise UserError(
            f"negative: the LoRA's {path} has shapes {shapes[0]} and {shapes[1]}, the model needs {expected[0]} and "
            f"{expected[1]}; it was trained on another model"
        )
    return layer


def _factors(delta: LowRank, device: torch.device, dtype: torch.dtype) -> Factors:
    """Copies of down, and of up times scale, on a layer's device and in the dtype of its update.

    The product is computed in float64 and rounded once.
    """
    up = delta.up.detach().double() * delta.scale
    return Factors(delta.down.detach().to(device, dtype, copy=True).contiguous(), up.to(device, dtype).contiguous())
