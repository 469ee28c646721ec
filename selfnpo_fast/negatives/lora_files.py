"""Reading LoRA files in diffusers' old and new naming, PEFT's, kohya's and OneTrainer's.

All become `Deltas`. No adapter is injected into the denoiser: the file's keys are compared with the
denoiser's layers (`negatives.names`). Every key belongs to a layer, or one line names one that does
not. Names and shapes are checked in the file's header, before a factor is read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from selfnpo_fast.models import Family, family_of
from selfnpo_fast.negatives.formats import quantisation_of, unsupported_adapter
from selfnpo_fast.negatives.lora_scaling import Scaling
from selfnpo_fast.negatives.low_rank import Deltas, LowRank, factor_shapes, weight_shape
from selfnpo_fast.negatives.names import Factor, factor_of, layer_paths, unwrapped
from selfnpo_fast.negatives.sources import PEFT_CONFIG, read_object, refuse_pickle
from selfnpo_fast.negatives.weights import without_adapter
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_fast.runtime.limits import MAX_RANK
from selfnpo_fast.runtime.tensor_files import open_tensors, quantised_as, text_object, with_arithmetic

StateDict = dict[str, torch.Tensor]
RECORD_KEY = "selfnpo_base"
"""Key in a LoRA file's metadata of the record of its base (`fingerprint.base_record`)."""
_PEFT = "base_model.model."


@dataclass(frozen=True)
class _Content:
    """What a LoRA file holds, as its header says it."""

    shapes: dict[str, tuple[int, ...]]
    """The shape of every tensor by its key."""
    dtypes: dict[str, str]
    """The dtype of every tensor by its key, as safetensors calls it."""
    config: dict
    """PEFT's config in the metadata, whose keys begin with the part's name, as in `<denoiser>.r`;
    empty without one."""
    peft_config: dict | None
    """The content of adapter_config.json; None where none lies next to the file."""
    read: Callable[[Iterable[str]], StateDict]
    """The tensors of some keys."""


def read_lora(source: str | Path | StateDict, denoiser: nn.Module, field: str = "negative") -> Deltas:
    """The low-rank updates in a safetensors file, or in the state dict of one, by layer.

    Tensors stay on the CPU in the file's dtype, but float8 becomes float32. The denoiser is not
    changed. The scale is alpha / rank. alpha comes from the file's metadata, its `.alpha` keys or
    the adapter_config.json next to the file; where none of them has it, alpha is the rank. Weights
    of text encoders are left out with a warning.

    Raises UserError, one line that names `field` and the source, where
    - the file is truncated, pickled, not finite or of an unsupported form,
    - a key belongs to no layer, or a shape does not fit its layer,
    - an update is larger than any weight can be, or all updates are zero.
    """
    name = "the state dict" if isinstance(source, dict) else str(source)
    try:
        content = _of_state(source) if isinstance(source, dict) else _of_file(Path(source), field)
        return _deltas(content, denoiser, name)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{field}: {name} {one_line(error)}") from error


def _of_state(state: StateDict) -> _Content:
    """The content of a state dict."""
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    dtypes = {key: "F32" if value.is_floating_point() else str(value.dtype) for key, value in state.items()}
    return _Content(shapes, dtypes, {}, None, lambda keys: {key: with_arithmetic(state[key]) for key in keys})


def _of_file(path: Path, field: str) -> _Content:
    """The content of a file. Raises UserError where the file or a config cannot be read."""
    refuse_pickle(path, field)
    file = open_tensors(path, field)
    config_file = path.with_name(PEFT_CONFIG)
    peft_config = None
    if any(key.startswith(_PEFT) for key in file.shapes) and os.path.isfile(config_file):
        peft_config = read_object(config_file, str(path), field)
    config = text_object(file, "lora_adapter_metadata") or {}
    return _Content(file.shapes, file.dtypes, config, peft_config, file.read)


def read_record(path: Path, field: str) -> dict | None:
    """The record of the file's base in its metadata (`fingerprint.base_record`); None without one.

    Raises UserError where the file or the record cannot be read.
    """
    return text_object(open_tensors(path, field), RECORD_KEY)


def _deltas(content: _Content, denoiser: nn.Module, name: str) -> Deltas:
    """The updates. Raises ValueError, see `read_lora`."""
    family = family_of(denoiser)
    unsupported = unsupported_adapter(content.shapes)
    if unsupported is not None:
        raise ValueError(f"is a {unsupported[0]} ({unsupported[1]}), which is not supported; give a plain LoRA")
    quantised = quantisation_of(content.shapes)
    if quantised is not None:
        raise ValueError(f"is quantised ({quantised}); give a LoRA in fp32, bf16 or fp16")
    keys = _without_text_encoders(content.shapes, family, name)
    layers = _layers(keys, denoiser, family)
    for path, key_of in layers.items():
        _check_layer(path, without_adapter(denoiser.get_submodule(path)), key_of, content)
    scaling = _scaling(content, keys, layers, family)
    # Only now are factors read.
    factors = content.read([key_of[factor] for key_of in layers.values() for factor in ("down", "up")])
    for key, value in factors.items():
        if not value.isfinite().all():
            raise ValueError(f"is damaged: {key} is not finite")
    deltas = {}
    for path, key_of in sorted(layers.items()):
        down, up = factors[key_of["down"]], factors[key_of["up"]]
        deltas[path] = LowRank(down=down, up=up, scale=scaling.scale(path, len(down)))
        if deltas[path].is_too_large():
            raise ValueError(f"is damaged: the update of {path} is larger than any weight can be")
    if not any(delta.scale and delta.down.any() and delta.up.any() for delta in deltas.values()):
        raise ValueError("changes nothing: all its updates are zero, the negative would equal the positive")
    return deltas


def _without_text_encoders(keys: Iterable[str], family: Family, name: str) -> list[str]:
    """The keys that are not for text encoders; warns where some are left out."""
    keys = list(keys)
    text = [key for key in keys if key.startswith(family.text_lora_prefixes)]
    if len(text) == len(keys):
        raise ValueError("matches no layer of the model: it holds nothing for the denoiser")
    if text:
        logger.warning(
            "%s also holds %d weights for text encoders (%s, ...): the negative branch does not use them",
            name, len(text), text[0],
        )  # fmt: skip
    return [key for key in keys if not key.startswith(family.text_lora_prefixes)]


def _layers(keys: list[str], denoiser: nn.Module, family: Family) -> dict[str, dict[Factor, str]]:
    """The keys of each layer's factors and alpha by the layer's path.

    Raises ValueError for a key that belongs to no layer, and where a factor is missing or is there
    twice.
    """
    paths = layer_paths(denoiser)
    layers: dict[str, dict[Factor, str]] = {}
    unknown = []
    for key in keys:
        found = factor_of(key)
        if found is None:
            raise ValueError(f"does not fit the model: the key {key} is not that of a LoRA")
        layer, factor = unwrapped(found[0], paths, family), found[1]
        if layer not in paths:
            unknown.append(layer)
            continue
        key_of = layers.setdefault(paths[layer], {})
        if factor in key_of:
            raise ValueError(f"holds one factor of {paths[layer]} twice, as {key_of[factor]} and as {key}")
        key_of[factor] = key
    if unknown and not layers:
        raise ValueError(f"matches no layer of the model: it has no {min(unknown)}; was it trained on another?")
    if unknown:
        raise ValueError(f"does not fit the model: it has no {min(unknown)}")
    for path, key_of in sorted(layers.items()):
        if key_of.keys() == {"alpha"}:
            raise ValueError(f"does not fit the model: it has an alpha but no LoRA for {path}")
        if "down" not in key_of or "up" not in key_of:
            raise ValueError(f"is incomplete: {path} has only one of its two factors")
    return layers


def _check_layer(path: str, layer: nn.Module, key_of: dict[Factor, str], content: _Content) -> None:
    """Raise ValueError where a layer takes no update, or none of these shapes and dtypes."""
    if not isinstance(layer, nn.Linear | nn.Conv2d) or getattr(layer, "groups", 1) != 1:
        raise ValueError(f"does not fit the model: {path} is a {type(layer).__name__}, whose updates are not supported")
    down, up = content.shapes[key_of["down"]], content.shapes[key_of["up"]]
    rank, shape = down[0] if down else 0, weight_shape(layer)
    if rank > MAX_RANK:
        raise ValueError(f"does not fit the model: its LoRA of {path} has rank {rank:,}; expected at most {MAX_RANK:,}")
    if rank < 1 or (down, up) != factor_shapes(shape, rank):
        raise ValueError(f"does not fit the model: {path} has shape {shape}, its LoRA {up} by {down}")
    for key in (key_of["down"], key_of["up"]):
        if quantised_as(content.dtypes[key]):
            raise ValueError(f"is quantised: {key} is stored as {content.dtypes[key]}; give fp32, bf16 or fp16")


def _scaling(content: _Content, keys: list[str], layers: dict[str, dict[Factor, str]], family: Family) -> Scaling:
    """Where each layer's alpha comes from.

    Raises ValueError where a config is wrong or missing, and for an alpha that is not a single
    number.
    """
    prefix = f"{family.denoiser_name}."
    if all(key.startswith(_PEFT) for key in keys):
        if content.peft_config is None:
            raise ValueError(
                "is a PEFT adapter without its adapter_config.json, which holds alpha; put it next to the file"
            )
        scaling = Scaling.of_config(content.peft_config, layers)
    else:
        config = {key.removeprefix(prefix): value for key, value in content.config.items() if key.startswith(prefix)}
        scaling = Scaling.of_config(config, layers) if config else Scaling({})
    alphas = {path: key_of["alpha"] for path, key_of in layers.items() if "alpha" in key_of}
    for key in alphas.values():
        if math.prod(content.shapes[key]) != 1 or content.dtypes[key].lower().startswith(("c", "torch.c")):
            raise ValueError(f"is damaged: the alpha {key} is not a single number")
    values = content.read(alphas.values())
    return replace(scaling, alphas=scaling.alphas | {path: float(values[key].item()) for path, key in alphas.items()})
