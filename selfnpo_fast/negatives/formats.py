"""Formats of updates and of quantised weights that are recognised to be refused by their name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from selfnpo_fast.runtime.errors import UserError, shortened

_ADAPTERS = {
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.boft_": "BOFT",
    r"\.oft_": "OFT",
    r"\.ia3_|\.on_input$": "(IA)3",
    r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$|\.glora": "GLoRA",
    r"\.vera_|^vera_": "VeRA",
    r"\.fourierft_": "FourierFT",
    r"\.hra_": "HRA",
    r"\.(diff|diff_b|set_weight|w_norm|b_norm)$": "LyCORIS of full differences",
    r"\.lora_mid": "LoCon with a core tensor",
    r"^lora_controlnet": "Control-LoRA",
    r"\.lora_embedding_": "LoRA of embeddings",
    r"lora_(B|up|linear_layer\.up|\.up)(\.default)?\.bias$|\.lora\.up\.bias$": "LoRA with biases",
}
"""Forms of updates that are not the product of two matrices, by a pattern of a key."""
_ANY_ADAPTER = re.compile("|".join(("lora", *_ADAPTERS)))

_QUANTISED = {
    r"\.quant_state\.bitsandbytes__|\.(nested_)?(absmax|quant_map)$": "bitsandbytes, 4 bit",
    r"\.SCB$": "bitsandbytes, 8 bit",
    r"[._:](qdata|tensor_impl|int_data)\b|_weight_(qdata|scale)$|:_data\b": "torchao",
    r"\.weight\._(data|scale|shift)$": "quanto",
    r"\.(qweight|qzeros|wscales)$": "GPTQ, AWQ or SVDQuant",
    r"(^|\.)scaled_fp8$|\.(scale_weight|weight_scale|input_scale)$|\.comfy_quant$": "scaled float8",
}
"""Quantised weights by a pattern of a key."""
_QUANTISED_MODULES = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "optimum.quanto": "quanto",
    "diffusers.quantizers.gguf": "GGUF",
}
"""Libraries by the module that defines their kinds of tensors."""
SERVED = ("bitsandbytes", "torchao")
"""Libraries whose quantised layers can carry a LoRA's update."""


def is_adapter(key: str) -> bool:
    """Whether a key is one of an update, in this form or another, which full weights never have."""
    return _ANY_ADAPTER.search(key) is not None


def unsupported_adapter(keys: Iterable[str]) -> tuple[str, str] | None:
    """(format, key) of the first key that belongs to no plain LoRA; None where there is none."""
    return _first(keys, _ADAPTERS)


def quantisation_of(keys: Iterable[str], config: dict | None = None) -> str | None:
    """How weights with these keys, or with this config.json, are quantised; None where they are
    not."""
    said = (config or {}).get("quantization_config")
    if said:
        return shortened(said.get("quant_method") if isinstance(said, dict) else said).strip("'\"")
    found = _first(keys, _QUANTISED)
    return found and found[0]


def _first(keys: Iterable[str], patterns: dict[str, str]) -> tuple[str, str] | None:
    """(what a pattern stands for, key) of the first key that one of the patterns is found in."""
    any_of_them = re.compile("|".join(patterns))
    for key in keys:
        if any_of_them.search(key):
            return next(name for pattern, name in patterns.items() if re.search(pattern, key)), key
    return None


def quantisation_of_module(module: nn.Module) -> str | None:
    """The library that has quantised a network in memory; None where its weights are plain."""
    for parameter in module.parameters():
        for kind in (type(parameter), type(parameter.data)):
            for prefix, name in _QUANTISED_MODULES.items():
                if kind.__module__.startswith(prefix):
                    return name
        if not parameter.dtype.is_floating_point:
            return str(parameter.dtype).removeprefix("torch.")
    return None


def not_served(network: nn.Module, form: str, field: str) -> str:
    """The error, which names `field`, of a network in memory that is quantised."""
    kind = type(network).__name__
    return f"{field}: the {kind} is quantised ({form}), which is not supported; load it in fp32, bf16 or fp16"


def refuse_mixing(positive: nn.Module) -> None:
    """Raise UserError where a positive, whose weights would be mixed, merged or copied, is
    quantised."""
    form = quantisation_of_module(positive)
    if form is not None:
        raise UserError(
            f"model: the {type(positive).__name__} is quantised ({form}), and its weights cannot be mixed, merged or "
            "put into a second network; give a LoRA at alpha=1 without base, or load the original in fp32, bf16 or fp16"
        )


def served_quantisation(positive: nn.Module, *, mixed: bool) -> str | None:
    """The library that has quantised the positive; None where its weights are plain.

    Raises UserError where no LoRA can go on that library's layers, and where the positive's weights
    are to be `mixed`.
    """
    form = quantisation_of_module(positive)
    if form is not None and form not in SERVED:
        raise UserError(not_served(positive, form, "model"))
    if mixed:
        refuse_mixing(positive)
    return form


def record_of_plain(record: dict | None, positive: nn.Module) -> dict | None:
    """A record of a base with the fingerprint of the layers alone that `positive` has unquantised.

    None where it has none of them: no weight is left that could be compared.
    """
    saved = record and record.get("fingerprint")
    if not isinstance(saved, dict):
        return record
    quantised = {
        f"{path.replace('.base_layer', '')}.weight"
        for path, layer in positive.named_modules()
        if layer._parameters.get("weight") is not None and quantisation_of_module(layer) is not None
    }
    plain = {name: entry for name, entry in saved.items() if name not in quantised}
    return {**record, "fingerprint": plain} if plain else None  # type: ignore[dict-item]
