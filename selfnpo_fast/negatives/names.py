"""The names that files give to a network's layers and weights, in all namings that are known.

A name is looked up among the network's own: its dotted path, the original authors' path, and both
with underscores in place of dots, as kohya's scripts write them. Nothing is guessed from the name
alone: `add_embedding_linear_1` is a layer because the network has `add_embedding.linear_1`.
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Literal

from torch import nn

from selfnpo_fast.models import Family, family_of

Factor = Literal["down", "up", "alpha"]

WHOLE_MODEL = ("model.diffusion_model.", "diffusion_model.")
"""What the denoiser's names begin with in a checkpoint of a whole model."""
_WRAPPERS = (*WHOLE_MODEL, "base_model.model.", "module.", "_orig_mod.")
"""The same, and what PEFT, data parallelism and torch.compile put before a name."""

_FACTORS: dict[str, Factor] = {"A": "down", "down": "down", "B": "up", "up": "up"}
_FACTOR_KEYS = (
    re.compile(r"(.+)\.lora_(A|B|down|up)(?:\.default)?\.weight"),
    re.compile(r"(.+)\.lora(?:_linear_layer)?\.(down|up)\.weight"),
    re.compile(r"(.+)_lora\.(down|up)\.weight"),
)
"""PEFT's and kohya's names of factors, diffusers' of 2023, and those of its attention
processors."""


def factor_of(key: str) -> tuple[str, Factor] | None:
    """(name of the layer, factor) of a key of a LoRA file; None for any other key."""
    if key.endswith(".alpha"):
        return _layer_of(key.removesuffix(".alpha").removesuffix(".lora").removesuffix("_lora")), "alpha"
    for pattern in _FACTOR_KEYS:
        match = pattern.fullmatch(key)
        if match:
            return _layer_of(match[1]), _FACTORS[match[2]]
    return None


def _layer_of(name: str) -> str:
    """The layer's name without the attention processor that owned LoRA layers in 2023."""
    if ".processor." not in name:
        return name
    name = name.replace(".processor.", ".")
    return f"{name}.0" if name.endswith(".to_out") else name


def layer_paths(denoiser: nn.Module) -> dict[str, str]:
    """The path of each of the denoiser's modules, by every name that the module goes by.

    A folded name that two modules share is left out.
    """
    family = family_of(denoiser)
    paths = _paths(denoiser)
    table = {path: path for path in paths}
    for path, original in family.original_paths(paths).items():
        table.setdefault(original, path)
    folded: dict[str, str | None] = {}
    for name, path in table.items():
        key = name.replace(".", "_")
        folded[key] = path if folded.get(key, path) == path else None
    prefixes = dict.fromkeys(("lora_unet_", f"lora_{family.denoiser_name}_"))
    return table | {f"{prefix}{key}": path for prefix in prefixes for key, path in folded.items() if path is not None}


def weight_names(denoiser: nn.Module, names: list[str]) -> dict[str, str]:
    """The name of each of the denoiser's weights `names`, by itself and by its original name."""
    originals = family_of(denoiser).original_paths(_paths(denoiser))
    table = {name: name for name in names}
    for name in names:
        path, _, leaf = name.rpartition(".")
        if path in originals:
            table.setdefault(f"{originals[path]}.{leaf}", name)
    return table


def _paths(denoiser: nn.Module) -> list[str]:
    """The paths of all modules under their names without PEFT adapters."""
    paths = (path for path, _ in denoiser.named_modules() if path and ".lora_" not in path)
    return list(dict.fromkeys(path.replace(".base_layer", "") for path in paths))


def unwrapped(name: str, known: Container[str], family: Family) -> str:
    """The name without all that wrappers put before it, unless the name is known as it is."""
    prefixes = (*_WRAPPERS, f"{family.denoiser_name}.")
    while name not in known:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            break
        name = name.removeprefix(prefix)
    return name
