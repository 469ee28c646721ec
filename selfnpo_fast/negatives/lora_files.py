"""Reading LoRA files in diffusers' old and new naming, PEFT's and kohya's, all as `Deltas`.

diffusers itself renames the keys. No adapter is injected into the denoiser: the file's keys are
compared with the denoiser's layers. Every key belongs to a layer, or one line names one that does
not.
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
from selfnpo_fast.negatives.low_rank import Deltas, LowRank, factor_shapes
from selfnpo_fast.negatives.sources import PEFT_CONFIG, read_json, refuse_pickle, tensor_names
from selfnpo_fast.negatives.weights import without_adapter
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
"""Forms of updates that are not the product of two matrices, by a pattern of a key."""
RECORD_KEY = "selfnpo_base"
"""Key in a LoRA file's metadata of the record of its base (`fingerprint.base_record`)."""
_PEFT = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class _Scaling:
    """Where the scale of a file's updates comes from."""

    alphas: dict[str, float]
    """alpha by the path of the layer."""
    alpha: float | None = None
    """alpha of all other layers; None: equal to the rank."""
    rank_stabilised: bool = False
    """Whether alpha is divided by the root of the rank (rsLoRA) instead of the rank."""

    def scale(self, layer: str, rank: int) -> float:
        """The factor of the product up down."""
        alpha = self.alphas.get(layer, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_lora(source: str | Path | StateDict, denoiser: nn.Module, field: str = "negative") -> Deltas:
    """The low-rank updates in a safetensors file, or in the state dict of one, by layer.

    Tensors stay on the CPU in the file's dtype. The denoiser is not changed. The scale is
    alpha / rank. alpha comes from the file's metadata, its `.alpha` keys or the adapter_config.json
    next to the file; where none of them has it, alpha is the rank. Weights of text encoders are
    left out with a warning.

    Raises UserError, one line that names `field` and the source, where
    - the file is truncated, pickled, not finite or of an unsupported form,
    - a key belongs to no layer, or a shape does not fit its layer,
    - all updates are zero.
    """
    name = "the state dict" if isinstance(source, dict) else str(source)
    try:
        metadata: dict
        if isinstance(source, dict):
            tensors, metadata, config = dict(source), {}, None
        else:
            tensors, metadata, config = _read(Path(source), field)
        _refuse_unsupported(tensors)
        family = family_of(denoiser)
        tensors = _without_text_encoders(tensors, family, name)
        layers, scaling = _to_peft(tensors, denoiser, family, metadata, config)
        return _join_factors(layers, scaling, denoiser)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{field}: {name} {one_line(error)}") from error


def _read(path: Path, field: str) -> tuple[StateDict, dict, dict | None]:
    """(tensors, PEFT's config from the metadata, adapter_config.json) of a LoRA file.

    The config in the metadata is diffusers': its keys begin with the part's name, as in `unet.r`.
    """
    refuse_pickle(path, field)
    tensor_names(path, field)
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{field}: cannot load {path}: {one_line(error)}") from error
    metadata = _metadata_object(path, "lora_adapter_metadata", field) or {}
    config_file = path.with_name(PEFT_CONFIG)
    config = None
    if any(key.startswith(_PEFT) for key in tensors) and config_file.is_file():
        config = read_json(config_file, str(path), field)
    return tensors, metadata, config


def read_record(path: Path, field: str) -> dict | None:
    """The record of the file's base in its metadata (`fingerprint.base_record`); None without one.

    Raises UserError where the file or the record cannot be read.
    """
    return _metadata_object(path, RECORD_KEY, field)


def _metadata_object(path: Path, key: str, field: str) -> dict | None:
    """The JSON object under `key` in a file's metadata; None without the key. Raises UserError."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(key)
        if not text:
            return None
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"its {key} is no JSON object")
        return value
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{field}: cannot load {path}: {one_line(error)}") from error


def _refuse_unsupported(tensors: StateDict) -> None:
    """Raise ValueError for a form that is no plain LoRA, and for a tensor that is not finite."""
    for key, value in tensors.items():
        for pattern, form in _UNSUPPORTED.items():
            if re.search(pattern, key):
                raise ValueError(f"is a {form} ({key}), which is not supported; give a plain LoRA")
        if not value.isfinite().all():
            raise ValueError(f"is damaged: {key} is not finite")


def _without_text_encoders(tensors: StateDict, family: Family, name: str) -> StateDict:
    """The tensors that are not for text encoders; warns where some are left out."""
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
    """Tensors named `<layer>.lora_A.weight` and `<layer>.lora_B.weight`, and their scaling.

    Raises ValueError for a key that belongs to no layer, and for an alpha that is missing or is not
    a single number.
    """
    if not tensors:
        raise ValueError("matches no layer of the model: it holds nothing for the denoiser")
    prefix = f"{family.denoiser_name}."
    scaling = _Scaling({})
    foreign = family.from_foreign_lora(tensors, denoiser)
    if foreign is not None:
        # Another program's naming, such as kohya's: the family renames the keys and reads alpha.
        tensors, alphas = foreign
        scaling = replace(scaling, alphas=alphas)
    elif all(key.startswith(_PEFT) for key in tensors):
        # PEFT's naming: alpha is in adapter_config.json.
        if config is None:
            raise ValueError(
                "is a PEFT adapter without its adapter_config.json, which holds alpha; put it next to the file"
            )
        tensors = {key.removeprefix(_PEFT): value for key, value in tensors.items()}
        scaling = _from_config(config, tensors)
    elif any(key.startswith(prefix) for key in tensors):
        # diffusers' naming: alpha is in the metadata, where there is any.
        others = sorted(key for key in tensors if not key.startswith(prefix))
        if others:
            raise ValueError(f"does not fit the model: {others[0]} is not the {family.denoiser_name}'s")
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
        config = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        scaling = _from_config(config, tensors) if config else scaling
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    # Older names become PEFT's, and keys that end in `.alpha` override the scaling.
    tensors = convert_unet_state_dict_to_peft(tensors)
    alpha_tensors = {key.removesuffix(".alpha"): value for key, value in tensors.items() if key.endswith(".alpha")}
    layers = {key: value for key, value in tensors.items() if not key.endswith(".alpha")}
    if any(value.numel() != 1 for value in alpha_tensors.values()):
        raise ValueError("is damaged: an alpha in it is not a single number")
    return layers, replace(scaling, alphas=scaling.alphas | {key: value.item() for key, value in alpha_tensors.items()})


def _from_config(config: dict, tensors: StateDict) -> _Scaling:
    """The scaling of a PEFT LoraConfig: its lora_alpha, alpha_pattern and use_rslora.

    Raises ValueError for a form that is not supported, and for a config that is not readable.
    """
    if config.get("use_dora") or config.get("lora_bias"):
        raise ValueError(f"is a {'DoRA' if config.get('use_dora') else 'LoRA with biases'}, which is not supported")
    alpha, pattern = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(alpha, int | float) or not isinstance(pattern, dict):
        raise ValueError(f"says lora_alpha {alpha!r}, alpha_pattern {pattern!r} of itself: expected a number, a table")
    layers = {match[1] for key in tensors if (match := _FACTOR.fullmatch(key))}
    alphas = {}
    try:
        for layer in layers:
            for key, value in pattern.items():
                # PEFT takes the first pattern that matches.
                if re.match(rf"(.*\.)?({key})$", layer):
                    alphas[layer] = float(value)
                    break
    except (re.error, TypeError) as error:
        raise ValueError(f"has an alpha_pattern that is not readable: {one_line(error)}") from error
    return _Scaling(alphas, float(alpha), bool(config.get("use_rslora")))


def _join_factors(tensors: StateDict, scaling: _Scaling, denoiser: nn.Module) -> Deltas:
    """Join the two factors of every layer into its update.

    Raises ValueError where a key or a shape does not fit the denoiser, a factor is missing, or all
    updates are zero.
    """
    modules = dict(denoiser.named_modules())
    # Sort the tensors by layer and factor.
    factors: dict[str, StateDict] = {}
    for key, value in tensors.items():
        match = _FACTOR.fullmatch(key)
        if not match:
            raise ValueError(f"does not fit the model: the key {key} is not that of a LoRA")
        factors.setdefault(match[1], {})[match[2]] = value
    # Every layer, and every alpha, has to belong to the denoiser.
    unknown = sorted(path for path in factors if path not in modules)
    if len(unknown) == len(factors):
        raise ValueError(f"matches no layer of the model: it has no {unknown[0]}; was it trained on another?")
    if unknown:
        raise ValueError(f"does not fit the model: it has no {unknown[0]}")
    stray = sorted(scaling.alphas.keys() - factors.keys())
    if stray:
        raise ValueError(f"does not fit the model: it has an alpha but no LoRA for {stray[0]}")
    # Build the updates.
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
    """Raise ValueError where a layer takes no update, or none of these shapes."""
    layer = without_adapter(layer)
    if not isinstance(layer, nn.Linear | nn.Conv2d) or getattr(layer, "groups", 1) != 1:
        raise ValueError(f"does not fit the model: {path} is a {type(layer).__name__}, whose updates are not supported")
    rank, shape = len(down), tuple(layer.weight.shape)
    if rank < 1 or (tuple(down.shape), tuple(up.shape)) != factor_shapes(shape, rank):
        raise ValueError(
            f"does not fit the model: {path} has shape {shape}, its LoRA {tuple(up.shape)} by {tuple(down.shape)}"
        )
