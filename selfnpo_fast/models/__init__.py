"""The model families that the product knows, and the ways to find the one that is meant."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from torch import nn

from selfnpo_fast.config import ModelConfig
from selfnpo_fast.models.autoencoder import Pieces
from selfnpo_fast.models.base import Adapter
from selfnpo_fast.models.cogvideox import CogVideoXAdapter
from selfnpo_fast.models.family import Family
from selfnpo_fast.models.flux import Flux
from selfnpo_fast.models.folder import open_folder, open_repository
from selfnpo_fast.models.ltx import LTXVideo
from selfnpo_fast.models.qwen_image import QwenImage
from selfnpo_fast.models.refused import why_turbo, why_untrained
from selfnpo_fast.models.sd import StableDiffusionAdapter
from selfnpo_fast.models.sd3 import StableDiffusion3Adapter
from selfnpo_fast.models.sdxl import StableDiffusionXLAdapter
from selfnpo_fast.models.size import AskedSize, Size
from selfnpo_fast.models.wan import WanAdapter
from selfnpo_fast.models.z_image import ZImage
from selfnpo_fast.runtime.errors import UserError, one_line

ASSETS = Path(__file__).resolve().parent.parent / "assets"
DIGITS = ASSETS / "digits"
SD15_SMALL = ASSETS / "sd15_small"
"""A pipeline of configs without weights, which benchmarks and `selfnpo doctor --verify` fill with
random ones."""

FAMILIES: dict[str, Family] = {}
"""By the class name of the pipeline."""

# Where a pipeline's parts may come from; the last is how diffusers names the safety checker's
# module.
LIBRARIES = (None, "diffusers", "transformers", "stable_diffusion")


def register(family: Family) -> None:
    """Make a family known to trainer, attach, sampler, merge and doctor."""
    FAMILIES[family.pipeline_class] = family


for _adapter in (
    StableDiffusionAdapter,
    StableDiffusionXLAdapter,
    StableDiffusion3Adapter,
    CogVideoXAdapter,
    WanAdapter,
):
    register(_adapter.family)
for _family in (LTXVideo, QwenImage, Flux, ZImage):  # attached to, no more
    register(_family())


def resolve_path(path: str) -> str:
    """`digits` names the embedded model; anything else is a folder or a Hub id."""
    return str(DIGITS) if path == "digits" else path


def load_adapter(
    path: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    resolution: int | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    expert: str | None = None,
    vae_tiling: bool = False,
    vae_slicing: bool = False,
    configs_only: bool = False,
) -> Adapter:
    """The adapter of the pipeline at `path` (`digits`, a diffusers folder or a Hub id); loads no
    weights yet.

    resolution, height, width, frames    what to train on or to draw; by default the model's own
    expert                               `model.expert` of the config
    vae_tiling, vae_slicing              whether the autoencoder works in tiles, on single pictures
    configs_only                         the weights and the tokenizers may be missing

    Raises UserError where there is no such folder, it is no pipeline, its family is not supported,
    or a part of it is missing, of another class than the family's, not served, or does not fit.
    """
    source = os.path.expanduser(resolve_path(path))
    looks_local = os.path.exists(source) or source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local and not os.path.isdir(source):
        raise UserError(f"model.path: no such folder: {path}; give a diffusers pipeline folder or a Hub id")
    folder = open_folder(source, path) if looks_local else open_repository(source, revision)
    try:
        index = folder.json("model_index.json")
    except UserError as error:
        text = one_line(error, 200).removeprefix("model.path: ")
        raise UserError(
            f"model.path: {path} is no diffusers pipeline (no readable model_index.json): {text}"
        ) from error
    name = index.get("_class_name")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None or family.adapter is None:
        shown = one_line(name, 80)
        raise UserError(f"model.path: {path} is a {shown}{_why_unserved(name, family)}; supported are {_served()}")
    _check_classes(path, index, family, configs_only)
    asked = AskedSize(resolution, height, width, frames)
    pieces = Pieces(tiling=vae_tiling, slicing=vae_slicing)
    adapter = family.adapter(
        source, folder=folder, index=index, variant=variant, asked=asked, expert=expert, pieces=pieces
    )
    adapter.check(configs_only=configs_only)
    return adapter


def load_adapter_of(model: ModelConfig, *, configs_only: bool = False) -> Adapter:
    """`load_adapter` of a config's model, to train it; how weights are stored is no matter of an
    adapter. Raises UserError as well for a model that calls itself distilled (`refused.why_turbo`)."""
    names = [field.name for field in dataclasses.fields(model) if field.name not in ("path", "quantization")]
    options = {name: getattr(model, name) for name in names}
    adapter = load_adapter(model.path, **options, configs_only=configs_only)
    called = [config.get("_name_or_path") for config in (adapter.index, adapter.denoiser_config)]
    if not os.path.exists(os.path.expanduser(model.path)):
        called.append(model.path)  # a Hub id; folders are named by their owner
    reason = why_turbo(called)
    if reason is not None:
        raise UserError(f"model.path: {reason}; train the model that it was made from")
    return adapter


def adapter_of(pipe: Any) -> Adapter:
    """The adapter of a diffusers pipeline that is loaded. Raises UserError for a class it does not
    know."""
    name = type(pipe).__name__
    family = FAMILIES.get(name)  # by name: a subclass may call its denoiser in another way
    if family is None or family.adapter is None:
        raise UserError(f"pipe: a {name} is not supported{_why_unserved(name, family)}; expected one of {_served()}")
    return family.adapter.from_pipeline(pipe)  # type: ignore[attr-defined]


def _served() -> str:
    """The pipelines that can be trained and sampled from, for messages."""
    return ", ".join(name for name, family in FAMILIES.items() if family.adapter is not None)


def _why_unserved(name: object, family: Family | None) -> str:
    """Why a pipeline class is neither trained nor sampled from, and what can be done with it, for
    messages; nothing where that is not known."""
    reason = why_untrained(name) if isinstance(name, str) else None
    refused = "" if reason is None else f", which is refused: {reason}"
    if family is not None:
        takes = "takes a negative by attach_negative and is neither trained nor sampled"
        return f"{refused}; it {takes}" if refused else f", which {takes}"
    wider = guided_family_of(name) if isinstance(name, str) else None
    if wider is None or reason is not None:
        return refused
    return f", which takes a negative by attach_negative; such a negative is trained of a {wider.pipeline_class}"


def denoiser_names() -> tuple[str, ...]:
    """The folders that a denoiser's weights may lie in."""
    return tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.denoiser_names))


def family_of(denoiser: nn.Module | str, what: str = "model") -> Family:
    """A family that has denoisers of this class (or of the class so named), by which families
    differ in no way here.

    Raises UserError where there is none, which calls the denoiser `what`.
    """
    name = denoiser if isinstance(denoiser, str) else type(denoiser).__name__
    for family in FAMILIES.values():
        if family.denoiser_class == name:
            return family
    known = dict.fromkeys(family.denoiser_class for family in FAMILIES.values())
    raise UserError(f"{what} is a {one_line(name, 60)}; supported are {', '.join(known)}")


def guided_family_of(pipeline_name: str) -> Family | None:
    """The family among whose `guided_pipelines` this class is, or None."""
    return next((family for family in FAMILIES.values() if pipeline_name in family.guided_pipelines), None)


def _check_classes(path: str, index: dict, family: Family, configs_only: bool) -> None:
    """UserError where model_index.json names a class that is not the family's for a part, no class
    for a part that is needed, or a module that is none of the libraries', which is code."""
    libraries = (*LIBRARIES, family.library)
    for part, entry in index.items():
        if isinstance(entry, list) and entry and entry[0] not in libraries:
            raise UserError(
                f"model.path: {path} names code of its own for {one_line(part, 40)}: "
                f"{one_line(entry, 80)}; parts have to be classes of diffusers or transformers"
            )
    for part, classes in {family.denoiser_name: (family.denoiser_class,), **family.part_classes}.items():
        if part not in index and configs_only:
            continue
        entry = index.get(part)
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if name not in classes:
            found = f"has no {part}" if name is None else f"has a {one_line(name, 80)} as {part}"
            raise UserError(
                f"model.path: {path} {found} (model_index.json); expected a {' or '.join(classes)}; give a pipeline "
                "with all of its parts"
            )


__all__ = [
    "FAMILIES",
    "SD15_SMALL",
    "Adapter",
    "Family",
    "Size",
    "StableDiffusionAdapter",
    "StableDiffusionXLAdapter",
    "adapter_of",
    "denoiser_names",
    "family_of",
    "guided_family_of",
    "load_adapter",
    "load_adapter_of",
    "register",
    "resolve_path",
]
