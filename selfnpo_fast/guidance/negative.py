"""Loading a negative model: full weights or a LoRA, from a training run's output folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from selfnpo_fast.errors import UserError
from selfnpo_fast.guidance.low_rank import Deltas
from selfnpo_fast.models import StableDiffusionAdapter


@dataclass(frozen=True, kw_only=True)
class Negative:
    """A negative model: exactly one of `network` (full weights) and `deltas` (a LoRA)."""

    source: str
    network: nn.Module | None = None
    deltas: Deltas | None = None


LORA_FILE = "pytorch_lora_weights.safetensors"


def locate_negative(path: str, denoiser_name: str) -> Path:
    """The folder that holds the weights: `path` itself, or its `negative` part when it is a run's output folder."""
    folder = Path(os.path.expanduser(path))
    if not os.path.isdir(folder):  # which, unlike Path.is_dir, takes names of any length
        raise UserError(f"negative: no such folder: {path}; give a run's output folder or its negative/ part")
    for candidate in (folder, folder / "negative"):
        if (candidate / denoiser_name / "config.json").is_file() or (candidate / LORA_FILE).is_file():
            return candidate
    raise UserError(f"negative: {path} holds neither {denoiser_name}/config.json nor {LORA_FILE}")


def load_negative(adapter: StableDiffusionAdapter, path: str, dtype: torch.dtype = None, **stand_in) -> nn.Module:
    """The negative denoiser in evaluation mode, checked against the base's architecture.

    Raises UserError for a missing folder, broken files, other shapes, or a LoRA that fits no layer.
    """
    if isinstance(path, Negative):
        return path
    folder = locate_negative(path, adapter.denoiser_name)
    if (folder / LORA_FILE).is_file():
        return _load_lora(adapter, folder, dtype)
    negative = type(adapter)(str(folder)).load_denoiser(dtype, field="negative")
    _check_shapes(adapter, negative, path)
    return negative


def _check_shapes(adapter: StableDiffusionAdapter, negative: nn.Module, path: str) -> None:
    with torch.device("meta"):
        base = type(negative).from_config(adapter.denoiser_config)
    expected = {name: tuple(p.shape) for name, p in base.named_parameters()}
    found = {name: tuple(p.shape) for name, p in negative.named_parameters()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"negative: {path} does not fit the model: {name} has shape {found.get(name)}, "
                f"the model has {expected.get(name)}; train it from this model"
            )


def _load_lora(adapter: StableDiffusionAdapter, folder: Path, dtype: torch.dtype) -> nn.Module:
    negative = adapter.load_denoiser(dtype)
    before = {id(p) for p in negative.parameters()}
    try:
        negative.load_lora_adapter(folder, weight_name=LORA_FILE, prefix=adapter.denoiser_name, use_safetensors=True)
        with safe_open(folder / LORA_FILE, "pt") as file:
            stored = {name for name in file.keys() if name.startswith(f"{adapter.denoiser_name}.")}
    except Exception as error:  # diffusers, PEFT and safetensors each throw their own; the cause is chained
        raise UserError(f"negative: cannot load {folder / LORA_FILE}: {' '.join(str(error).split())[:300]}") from error
    if all(id(p) in before for p in negative.parameters()):
        raise UserError(f"negative: {folder / LORA_FILE} matches no layer of the model; was it trained on another?")
    prefix = f"{adapter.denoiser_name}."
    from peft.utils import get_peft_model_state_dict

    loaded = {prefix + name for name in get_peft_model_state_dict(negative, adapter_name="default_0")}
    stray = sorted(stored - loaded)
    if stray:
        raise UserError(f"negative: {folder / LORA_FILE} does not fit the model: it has no {stray[0]}")
    return negative.to(dtype).eval()
