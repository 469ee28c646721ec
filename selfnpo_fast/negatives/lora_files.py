"""Reading LoRA files: diffusers' old and new naming, PEFT's and kohya's, all as `Deltas`.

The renaming is diffusers' own. Nothing is injected anywhere: the file is held against the denoiser's layers, and either
every key of it has its place or one line says which has not.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from selfnpo_fast.models import Family, family_of
from selfnpo_fast.negatives.low_rank import Deltas, LowRank
from selfnpo_fast.negatives.sources import open_safetensors, read_json, refuse_pickle
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError, one_line

StateDict = dict[str, torch.Tensor]

_UNSUPPORTED = {
    r"\bhada_": "LoHa",
    r"\blokr_": "LoKr",
    r"\boft_": "OFT",
    r"\bvera_": "VeRA",
    r"\bdora_scale|lora_magnitude_vector": "DoRA",
    r"\blora_mid": "LoCon with a core tensor",
    r"^lora_controlnet": "Control-LoRA",
    r"lora_embedding_": "LoRA of embeddings",
    r"lora_(B|up|linear_layer\.up|\.up)\.bias$": "LoRA with biases",
    r"\.diff(_b)?$": "LyCORIS of full differences",
    r"\.(glora|ia3)": "GLoRA or IA3",
}
"""By a pattern of a key: forms that no plain product of two matrices is."""
RECORD_KEY = "selfnpo_base"
"""In the metadata of a LoRA file: the base that it was trained from."""
_PEFT = "base_model.model."
_PART = re.compile(r"(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class _Scaling:
    """alpha of each layer by its path, what applies to the others (None: alpha = rank), and rank stabilisation."""

    alphas: dict[str, float]
    alpha: float | None = None
    rank_stabilised: bool = False

    def scale(self, layer: str, rank: int) -> float:
        """What the product up down is multiplied by."""
        alpha = self.alphas.get(layer, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_lora(source: str | Path | StateDict, denoiser: nn.Module, field: str = "negative") -> Deltas:
    """The low-rank updates of one safetensors file (or of such a file's state dict), by the denoiser's layers.

    Tensors stay on the CPU in the file's dtype; the denoiser is looked at and left alone. Scale: alpha / rank, alpha
    from the file's metadata, its `.alpha` keys or the adapter_config.json beside it, and else equal to the rank.
    Weights of text encoders are left out with a warning.

    Raises UserError, one line that names `field` and the source, for files that are truncated, pickled, not finite, of
    an unsupported form, for keys that have no place and shapes that do not fit, and for an update that is zero.
    """
    name = "the state dict" if isinstance(source, dict) else str(source)
    try:
        if isinstance(source, dict):
            tensors, metadata, config = dict(source), {}, None
        else:
            tensors, metadata, config = _read(Path(source), field)
        _refuse_unsupported(tensors)
        family = family_of(denoiser)
        tensors = _without_text_encoders(tensors, family, name)
        layers, scaling = _to_peft(tensors, denoiser, family, metadata, config)
        return _pair(layers, scaling, denoiser)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{field}: {name} {one_line(error)}") from error


def _read(path: Path, field: str) -> tuple[StateDict, dict, dict | None]:
    """Tensors, PEFT's config by part (`<denoiser>.r`) from the metadata, and PEFT's own adapter_config.json."""
    refuse_pickle(path, field)
    open_safetensors(path, field)
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
            noted = (file.metadata() or {}).get("lora_adapter_metadata")
        metadata = json.loads(noted) if noted else {}
        if not isinstance(metadata, dict):
            raise ValueError("its lora_adapter_metadata is no JSON object")
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{field}: cannot load {path}: {one_line(error)}") from error
    beside = path.with_name("adapter_config.json")
    config = None
    if any(key.startswith(_PEFT) for key in tensors) and beside.is_file():
        config = read_json(beside, str(path), field)
    return tensors, metadata, config


def read_record(path: Path, field: str) -> dict | None:
    """What the file's metadata says of the base it was trained from (`guidance.fingerprint`), if anything."""
    try:
        with safe_open(path, "pt") as file:
            noted = (file.metadata() or {}).get(RECORD_KEY)
        record = json.loads(noted) if noted else None
        if record is not None and not isinstance(record, dict):
            raise ValueError(f"its {RECORD_KEY} is no JSON object")
        return record
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{field}: cannot load {path}: {one_line(error)}") from error


def _refuse_unsupported(tensors: StateDict) -> None:
    for key, value in tensors.items():
        for pattern, form in _UNSUPPORTED.items():
            if re.search(pattern, key):
                raise ValueError(f"is a {form} ({key}), which is not supported; give a plain LoRA")
        if not value.isfinite().all():
            raise ValueError(f"is damaged: {key} is not finite")


def _without_text_encoders(tensors: StateDict, family: Family, name: str) -> StateDict:
    text = [key for key in tensors if key.startswith(family.text_lora_prefixes)]
    if text and len(text) < len(tensors):
        logger.warning(
            "%s also holds %d weights for text encoders (%s, ...): the negative branch does not use them",
            name, len(text), text[0],
        )  # fmt: skip
    return {key: value for key, value in tensors.items() if key not in set(text)}


def _to_peft(
    tensors: StateDict, denoiser: nn.Module, family: Family, metadata: dict, config: dict | None
) -> tuple[StateDict, _Scaling]:
    """Keys `<layer>.lora_A.weight` and `<layer>.lora_B.weight`, and the scaling. ValueError for what has no place."""
    if not tensors:
        raise ValueError("matches no layer of the model: it holds nothing for the denoiser")
    prefix = f"{family.denoiser_name}."
    scaling = _Scaling({})
    foreign = family.from_foreign_lora(tensors, denoiser)
    if foreign is not None:
        tensors, alphas = foreign
        scaling = replace(scaling, alphas=alphas)
    elif all(key.startswith(_PEFT) for key in tensors):
        if config is None:
            raise ValueError("is a PEFT adapter without its adapter_config.json, which holds alpha; put it beside")
        tensors = {key.removeprefix(_PEFT): value for key, value in tensors.items()}
        scaling = _from_config(config, tensors)
    elif any(key.startswith(prefix) for key in tensors):
        others = sorted(key for key in tensors if not key.startswith(prefix))
        if others:
            raise ValueError(f"does not fit the model: {others[0]} is not the {family.denoiser_name}'s")
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
        config = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        scaling = _from_config(config, tensors) if config else scaling
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    tensors = convert_unet_state_dict_to_peft(tensors)
    alphas = {key.removesuffix(".alpha"): value for key, value in tensors.items() if key.endswith(".alpha")}
    layers = {key: value for key, value in tensors.items() if not key.endswith(".alpha")}
    if any(value.numel() != 1 for value in alphas.values()):
        raise ValueError("is damaged: an alpha in it is not a single number")
    return layers, replace(scaling, alphas=scaling.alphas | {key: value.item() for key, value in alphas.items()})


def _from_config(config: dict, tensors: StateDict) -> _Scaling:
    """Scaling by a PEFT LoraConfig: lora_alpha, alpha_pattern, use_rslora."""
    if config.get("use_dora") or config.get("lora_bias"):
        raise ValueError(f"is a {'DoRA' if config.get('use_dora') else 'LoRA with biases'}, which is not supported")
    alpha, pattern = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(alpha, int | float) or not isinstance(pattern, dict):
        raise ValueError(f"says lora_alpha {alpha!r}, alpha_pattern {pattern!r} of itself: expected a number, a table")
    layers = {match[1] for key in tensors if (match := _PART.fullmatch(key))}
    alphas = {}
    try:
        for layer in layers:
            for key, value in pattern.items():  # PEFT takes the first that the path ends in
                if re.match(rf"(.*\.)?({key})$", layer):
                    alphas[layer] = float(value)
                    break
    except (re.error, TypeError) as error:
        raise ValueError(f"has an alpha_pattern that is not readable: {one_line(error)}") from error
    return _Scaling(alphas, float(alpha), bool(config.get("use_rslora")))


def _pair(layers: StateDict, scaling: _Scaling, denoiser: nn.Module) -> Deltas:
    """Join the two factors of every layer and hold them against the denoiser. ValueError for what does not fit."""
    modules = dict(denoiser.named_modules())
    factors: dict[str, StateDict] = {}
    for key, value in layers.items():
        match = _PART.fullmatch(key)
        if not match:
            raise ValueError(f"does not fit the model: the key {key} is not that of a LoRA")
        factors.setdefault(match[1], {})[match[2]] = value
    unknown = sorted(path for path in factors if path not in modules)
    if len(unknown) == len(factors):
        raise ValueError(f"matches no layer of the model: it has no {unknown[0]}; was it trained on another?")
    if unknown:
        raise ValueError(f"does not fit the model: it has no {unknown[0]}")
    stray = sorted(scaling.alphas.keys() - factors.keys())
    if stray:
        raise ValueError(f"does not fit the model: it has an alpha but no LoRA for {stray[0]}")
    deltas = {}
    for path, pair in sorted(factors.items()):
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"is incomplete: {path} has only one of its two factors")
        _check_layer(path, modules[path], pair["A"], pair["B"])
        scale = scaling.scale(path, len(pair["A"]))
        if not math.isfinite(scale):
            raise ValueError(f"is damaged: alpha of {path} is not finite")
        deltas[path] = LowRank(down=pair["A"], up=pair["B"], scale=scale)
    if not any(delta.scale and delta.down.any() and delta.up.any() for delta in deltas.values()):
        raise ValueError("changes nothing: all its updates are zero, the negative would equal the positive")
    return deltas


def _check_layer(path: str, layer: nn.Module, down: torch.Tensor, up: torch.Tensor) -> None:
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # under a PEFT adapter
    if not isinstance(layer, nn.Linear | nn.Conv2d) or getattr(layer, "groups", 1) != 1:
        raise ValueError(f"does not fit the model: {path} is a {type(layer).__name__}, whose updates are not supported")
    rank, shape = len(down), tuple(layer.weight.shape)
    ones = (1,) * (len(shape) - 2)
    if rank < 1 or tuple(down.shape) != (rank, *shape[1:]) or tuple(up.shape) != (shape[0], rank, *ones):
        raise ValueError(
            f"does not fit the model: {path} has shape {shape}, its LoRA {tuple(up.shape)} by {tuple(down.shape)}"
        )
