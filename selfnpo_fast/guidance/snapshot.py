"""A pipeline as it was when a sampler was made of it, and a look at what has changed since.

The sampler has one rule: it draws with the pipeline that it was made of, and a pipeline that has
changed is an error. So nothing that is changed later is half in use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from selfnpo_fast.diffusion.schedulers import noise_levels
from selfnpo_fast.models import FAMILIES
from selfnpo_fast.runtime.errors import UserError, shortened

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of a pipeline that the sampler does not use."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_PRIVATE = {"_internal_dict", "_active_adapter", "_disable_adapter", "_disable_adapters"}
"""Private attributes of modules that matter: diffusers' config, the switches of PEFT."""
_WATCHED = {*_PRIVATE, *_HOOKS, "_modules", "_parameters", "_buffers"}
_OF_BITSANDBYTES = {"compute_dtype", "compute_type_is_set", "quant_state", "state"}
"""Attributes that layers of bitsandbytes set at their first forward."""
_OF_TOKENIZERS = ("model_max_length", "padding_side", "truncation_side")
_PROBE = 16
"""How many elements of each weight are compared: changes through `.data` raise no version."""


def parts_of(pipe: Any) -> dict[str, Any]:
    """The parts of a diffusers pipeline that the sampler uses, by name; a part may be None."""
    return {name: part for name, part in pipe.components.items() if name not in UNUSED}


def check_whole(pipe: Any) -> None:
    """UserError where a pipeline lacks a part; it may have one denoiser where others have two."""
    experts = {name for family in FAMILIES.values() for name in family.experts}
    for name, part in parts_of(pipe).items():
        if part is None and name not in experts:
            raise UserError(f"pipe: it has no {name}; load it with all its parts")


def check_networks(pipe: Any, denoiser_name: str) -> None:
    """UserError where a network of the pipeline is offloaded, cast or cached by hooks, or lies on
    another device than the denoiser."""
    networks = {name: part for name, part in parts_of(pipe).items() if isinstance(part, nn.Module)}
    for name, network in networks.items():
        for module in network.modules():
            if hasattr(module, "_hf_hook"):
                raise UserError(
                    f"pipe: its {name} is offloaded, and the sampler keeps its networks where they are; make the "
                    "sampler without offload, or use attach_negative"
                )
            registry = getattr(module, "_diffusers_hook", None)
            if registry is not None and registry.hooks:
                hook = next(iter(registry.hooks))
                raise UserError(
                    f"pipe: the layers of its {name} are offloaded, cast or cached one by one ({hook}), which the "
                    "sampler does not serve; use attach_negative, and turn that on after it"
                )
    expected = next(networks[denoiser_name].parameters()).device
    for name, network in networks.items():
        device = next((weight.device for weight in network.parameters()), expected)
        if device != expected:
            raise UserError(
                f"pipe: its {name} is on {device}, its {denoiser_name} on {expected}; move the whole pipeline with "
                f"pipe.to({str(expected)!r})"
            )


class Snapshot:
    """The parts of a pipeline and its settings, and the negative's network."""

    def __init__(self, pipe: Any, negative: nn.Module | None) -> None:
        self._pipe, self._negative = pipe, negative
        self._settings = _settings(pipe)
        self._parts = {name: _Part(part) for name, part in self._named_parts().items()}

    def check(self) -> None:
        """Raise UserError, which names the part, where something has changed since.

        Takes some ten milliseconds for SDXL where nothing has.
        """
        if _settings(self._pipe) != self._settings:
            raise UserError("pipe: its config has changed since the sampler was made; make a new sampler")
        now = self._named_parts()
        for name, part in self._parts.items():
            if now.get(name) is not part.part:
                raise UserError(f"{name} was replaced after the sampler was made; make a new sampler")
            difference = part.difference()
            if difference is not None:
                raise UserError(f"{name} has changed since the sampler was made ({difference}); make a new sampler")

    def _named_parts(self) -> dict[str, Any]:
        """The parts as they are now, by their names in errors."""
        parts = {f"pipe: its {name}": part for name, part in parts_of(self._pipe).items()}
        return parts if self._negative is None else parts | {"negative: its network": self._negative}


def _settings(pipe: Any) -> dict[str, Any]:
    """The pipeline's own settings: its config without the parts, which are lists in it."""
    return {name: value for name, value in pipe.config.items() if not isinstance(value, list | tuple)}


class _Part:
    """A part as it was: its whole state, and for networks what tells quickly that nothing has
    changed."""

    def __init__(self, part: Any) -> None:
        self.part = part
        self._part = getattr(part, "_orig_mod", part)  # torch.compile's wrapper
        self._state = _state(self._part)
        self._remember()
        self._heads = self._read_heads()

    def _remember(self) -> None:
        """Take copies of what tells quickly that nothing has changed."""
        modules = list(self._part.modules()) if isinstance(self._part, nn.Module) else []
        self._classes = [(module, type(module)) for module in modules]
        self._pairs = [pair for module in modules for pair in _copies(vars(module))]
        self._weights = [_Weight(weight) for module in modules for weight in _own_weights(module).values()]

    def difference(self) -> str | None:
        """What has changed; None where nothing has."""
        if not self._pairs or not self._is_untouched():
            now = _state(self._part)
            if now != self._state:
                return _difference(self._state, now)
            self._remember()  # so that the next look is quick
        return None if self._read_heads() == self._heads else "its weights"

    def _read_heads(self) -> list[bytes]:
        """The first bytes of all weights, with one wait for each device."""
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for weight in self._weights:
            head = weight.head()
            by_device.setdefault(head.device, []).append(head)
        return [
            torch.cat(heads).cpu().numpy().tobytes() for device, heads in by_device.items() if device.type != "meta"
        ]

    def _is_untouched(self) -> bool:
        """Whether all attributes and weights are the same objects; weights may have other values."""
        try:
            return (
                all(type(module) is cls for module, cls in self._classes)
                and all(now == copy for now, copy in self._pairs)
                and all(weight.is_same() for weight in self._weights)
            )
        except (RuntimeError, ValueError):  # other tensors or arrays, whose comparison is no bool
            return False


class _Weight:
    """A weight's dtype, device and version, and where its first elements are."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self._kind = (weight.dtype, weight.device, _version(weight))
        self._size = 0
        # bitsandbytes packs a weight in another way at the first forward on a CPU.
        plain = type(weight) in (torch.Tensor, nn.Parameter) and type(weight.data) is torch.Tensor
        if plain and not weight.is_meta and weight.layout == torch.strided:
            stored = weight.untyped_storage().nbytes() // weight.itemsize - int(weight.storage_offset())
            self._size = min(_PROBE, weight.numel(), stored)

    def is_same(self) -> bool:
        """Whether dtype, device and version are as they were."""
        return (self._weight.dtype, self._weight.device, _version(self._weight)) == self._kind

    def head(self) -> torch.Tensor:
        """The first elements as bytes, a view."""
        weight = self._weight.data
        if not self._size:  # a library's kind of tensor may have no strides
            return torch.empty(0, dtype=torch.uint8, device=weight.device)
        return weight.as_strided((self._size,), (1,), weight.storage_offset()).view(torch.uint8)


def _version(weight: torch.Tensor) -> int:
    """How often a weight was written to; 0 for one that was made in inference mode, which torch does
    not count."""
    return 0 if weight.is_inference() else weight._version


class _Is:
    """Equal to the same object only."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Is) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return type(self.value).__name__


def _state(part: Any) -> dict[str, Any]:
    """What can change of a part, by dotted names. It holds on to the objects that it compares."""
    if isinstance(part, nn.Module):
        return _state_of_network(part)
    state = {name: _plain(value) for name, value in getattr(part, "config", {}).items()}
    state["noise levels"] = noise_levels(part)
    if hasattr(part, "__len__"):
        state["number of tokens"] = len(part)
    return state | {name: getattr(part, name) for name in _OF_TOKENIZERS if hasattr(part, name)}


def _state_of_network(network: nn.Module) -> dict[str, Any]:
    """Classes, attributes and hooks of all modules, and the kinds of their weights."""
    state: dict[str, Any] = {}
    for path, module in network.named_modules():
        library = type(module).__mro__[1 if hasattr(module, "low_rank") else 0].__module__
        unwatched = _OF_BITSANDBYTES if library.startswith("bitsandbytes") else ()
        values = {
            name: _plain(value)
            for name, value in vars(module).items()
            if name in _PRIVATE or (not name.startswith("_") and name not in unwatched)
        }
        values |= {
            name: [_Is(hook) for hook in vars(module)[name].values() if not _is_of_library(hook)] for name in _HOOKS
        }
        state[path] = (_Is(module), type(module), values)
        for name, weight in _own_weights(module).items():
            kept = (_Is(weight), _version(weight)) if isinstance(weight, nn.Parameter) else ()  # `to` makes new buffers
            state[f"{path}.{name}" if path else name] = (weight.dtype, weight.device, *kept)
    return state


def _is_of_library(hook: object) -> bool:
    """Whether a hook is one that transformers puts on at the first call that asks for hidden
    states."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def _own_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a module itself."""
    return {name: value for name, value in (*module._parameters.items(), *module._buffers.items()) if value is not None}


def _copies(container: dict | list, depth: int = 2) -> list[tuple[Any, Any]]:
    """(container, shallow copy) of a dict or list, of those in it, and of its processors'
    attributes."""
    pairs = [(container, type(container)(container) if type(container) in (dict, list) else dict(container))]
    values = container
    if isinstance(container, dict):
        values = [value for name, value in container.items() if name in _WATCHED or not str(name).startswith("_")]
    for value in values if depth else ():
        if isinstance(value, dict | list):
            pairs += _copies(value, depth - 1)
        elif _is_processor(value):
            pairs += _copies(vars(value), depth - 1)
    return pairs


def _is_processor(value: Any) -> bool:
    """Whether a value is an attention processor that is no module."""
    return "Processor" in type(value).__name__ and not isinstance(value, nn.Module)


def _plain(value: Any, depth: int = 2) -> Any:
    """A value that can be compared: numbers and texts as they are, containers by what they hold,
    attention processors by their attributes, everything else by identity."""
    if value is None or isinstance(value, bool | int | str | torch.dtype | torch.device):
        return value
    if isinstance(value, float):  # an adapter's scale that was changed and changed back is rounded
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping) and depth:
        return {key: _plain(part, depth - 1) for key, part in value.items()}
    if isinstance(value, list | tuple) and depth:
        return [_plain(part, depth - 1) for part in value]
    if _is_processor(value) and depth:
        return _Is(type(value)), {name: _plain(part, depth - 1) for name, part in vars(value).items()}
    return _Is(value)


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first name at which two states differ, with both values where these are short."""
    for name in (*before, *(name for name in now if name not in before)):
        if name not in now or name not in before:
            return f"{name} is {'new' if name in now else 'gone'}"
        if before[name] != now[name]:
            return f"{name or 'it'}: {', '.join(_differing(before[name], now[name])) or 'other values'}"
    return "other values"


def _differing(before: Any, now: Any) -> Iterator[str]:
    """Texts about the entries of two tuples, and of dicts in them, that differ."""
    if isinstance(before, tuple) and isinstance(now, tuple):
        for old, new in zip(before, now, strict=False):
            if old != new:
                yield from _differing(old, new)
    elif isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                yield f"{key} {shortened(before.get(key))}, now {shortened(now.get(key))}"
    elif not isinstance(before, list):
        yield f"{shortened(before)}, now {shortened(now)}"
