"""What a user changes in the positive's network, and how a second network follows it.

What is plain data of a convolution, such as its padding, and its methods are followed: they say how
pictures meet their own edges (seamless tiling). All else acts on the positive only, which is said.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from selfnpo_fast.guidance.lora_backbone import is_offloaded
from selfnpo_fast.negatives.weights import has_adapters
from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import UserError

_INTERNAL = frozenset(vars(nn.Module()))
_METHODS = ("forward", "_conv_forward")
_PLAIN = (bool, int, float, str, type(None), list, tuple)


class Follows:
    """A second network's convolutions, which compute as those of the positive's network do."""

    def __init__(self, denoiser: nn.Module, network: nn.Module) -> None:
        self._denoiser, self._network = denoiser, network
        self._convolutions = [
            (name, module, other)
            for name, module, other in _pairs(denoiser, network)
            if isinstance(module, _ConvNd) and isinstance(other, _ConvNd)
        ]
        self._before: dict[str, tuple[nn.Module, dict[str, Any]]] = {}  # what the network had, by layer

    def follow(self) -> None:
        """Take over what the positive's convolutions carry now. Cheap where nothing has changed.

        Raises UserError where a convolution carries a function that is no method of it.
        """
        for name, layer, other in self._convolutions:
            mine, theirs = vars(other), vars(layer)
            changed = "_conv_forward" in theirs or "forward" in theirs or name in self._before
            if changed or theirs["padding_mode"] != mine["padding_mode"] or theirs["padding"] != mine["padding"]:
                wanted, own = _settings(name, layer, other), _settings(name, other, other)
                if wanted != own:
                    self._before.setdefault(name, (other, own))
                    _set(other, wanted)

    def restore(self) -> None:
        """Give the second network's convolutions their own settings back."""
        for other, settings in self._before.values():
            _set(other, settings)
        self._before = {}

    def say_unfollowed(self) -> None:
        """Say once what was changed in the positive's network and is not followed."""
        found = ["a style LoRA"] if has_adapters(self._denoiser) else []
        for name, module, other in _pairs(self._denoiser, self._network):
            forward = vars(module).get("forward")
            own = getattr(forward, "__self__", None) is module and isinstance(module, _ConvNd)
            if forward is not None and not own and not is_offloaded(module) and not _is_class_forward(module, forward):
                found.append(f"the replaced forward of {name}")
            elif type(module) is not type(other):
                found.append(f"the class of {name}, a {type(module).__name__}")
            elif module._forward_hooks or module._forward_pre_hooks:
                found.append(f"a hook on {name}")
        found += _foreign_processors(self._denoiser, self._network)
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            say_once(
                f"negative: {', '.join(found[:3])}{more}: this acts on the positive only, the negative's full weights "
                "compute without it; a LoRA negative would share it"
            )


def _pairs(denoiser: nn.Module, network: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """The modules that both networks have, by name, without PEFT's wrappers and the networks."""
    others = dict(network.named_modules())
    plain = [(name.replace(".base_layer", ""), module) for name, module in denoiser.named_modules()]
    return [
        (name, module, others[name])
        for name, module in plain
        if name and name in others and "base_layer" not in module._modules
    ]


def _is_class_forward(module: nn.Module, forward: object) -> bool:
    """Whether an attribute `forward` is the class's own, as a hook that has left leaves it."""
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward  # type: ignore[attr-defined]


def _settings(name: str, layer: nn.Module, other: nn.Module) -> dict[str, Any]:
    """A convolution's attributes that are plain data, and its replaced methods as those of `other`.

    Raises UserError for a replaced method that is a function of its own.
    """
    settings: dict[str, Any] = {}
    for key, value in vars(layer).items():
        if key == "forward" and is_offloaded(layer):
            continue
        if key in _METHODS:
            if getattr(value, "__self__", None) is not layer:
                raise UserError(
                    f"negative: the {key} of {name} was replaced by a function that is no method of the layer, which "
                    f"a second network cannot follow; bind it (function.__get__(layer)), or use a LoRA as the negative"
                )
            settings[key] = MethodType(value.__func__, other)
        elif key not in _INTERNAL and isinstance(value, _PLAIN):
            settings[key] = value
    return settings


def _set(layer: nn.Module, settings: dict[str, Any]) -> None:
    """Give a convolution these settings and no others."""
    for key, value in list(vars(layer).items()):
        is_setting = key in _METHODS or (key not in _INTERNAL and isinstance(value, _PLAIN))
        if is_setting and key not in settings:
            delattr(layer, key)
    for key, value in settings.items():
        setattr(layer, key, value)


def _foreign_processors(denoiser: nn.Module, network: nn.Module) -> list[str]:
    """Attention processors of the positive's that compute something of their own.

    They have weights, or are of no library. The IP-Adapter's are shared (`Family.shared_parts`).
    """
    own = getattr(network, "attn_processors", {})
    kinds = set()
    for name, processor in getattr(denoiser, "attn_processors", {}).items():
        kind = type(processor)
        shared = own.get(name) is processor or kind.__name__.startswith("IPAdapter")
        stock = kind.__module__.startswith("diffusers.") and not isinstance(processor, nn.Module)
        if not shared and not stock and type(own.get(name)) is not kind:
            kinds.add(kind.__name__)
    return [f"the attention processor {kind}" for kind in sorted(kinds)]
