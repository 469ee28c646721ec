"""One adapter per model family; `load_adapter` picks it from the pipeline's own model_index.json."""

from __future__ import annotations

import os
from pathlib import Path

from selfnpo_fast.models.sd import StableDiffusionAdapter
from selfnpo_fast.models.sdxl import StableDiffusionXLAdapter
from selfnpo_fast.runtime.errors import UserError, one_line

ASSETS = Path(__file__).resolve().parent.parent / "assets"
DIGITS = ASSETS / "digits"
SD15_SMALL = ASSETS / "sd15_small"
"""A pipeline of configs without weights, which benchmarks and `selfnpo doctor --verify` fill with random ones."""

ADAPTERS = {
    "StableDiffusionPipeline": StableDiffusionAdapter,
    "StableDiffusionXLPipeline": StableDiffusionXLAdapter,
}

# Where a pipeline's parts may come from; the last is how diffusers names the safety checker's module.
LIBRARIES = (None, "diffusers", "transformers", "stable_diffusion")


def resolve_path(path: str) -> str:
    """`digits` names the embedded model; anything else is a folder or a Hub id."""
    return str(DIGITS) if path == "digits" else path


def load_adapter(
    path: str, *, revision: str | None = None, variant: str | None = None, resolution: int | None = None
) -> StableDiffusionAdapter:
    """The adapter of the pipeline at `path` (`digits`, a diffusers folder or a Hub id); loads no weights yet.

    Raises UserError where there is no such folder, it is no pipeline, or its family is not supported.
    """
    from diffusers import DiffusionPipeline

    source = os.path.expanduser(resolve_path(path))
    looks_local = os.path.exists(source) or source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local and not os.path.isdir(source):
        raise UserError(f"model.path: no such folder: {path}; give a diffusers pipeline folder or a Hub id")
    try:
        index = DiffusionPipeline.load_config(source, revision=revision)
    except Exception as error:  # a damaged file surfaces as any of a dozen types; the cause is chained
        what = "is no diffusers pipeline (no readable model_index.json)" if looks_local else "was not found on the Hub"
        raise UserError(f"model.path: {path} {what}: {one_line(error, 200)}") from error
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str) or name not in ADAPTERS:
        shown = one_line(ValueError(name), 80)
        raise UserError(f"model.path: {path} is a {shown}; supported are {', '.join(ADAPTERS)}")
    _check_parts(path, index)
    return ADAPTERS[name](source, revision=revision, variant=variant, resolution=resolution)


def adapter_of(pipe) -> StableDiffusionAdapter:
    """The adapter of a diffusers pipeline that is loaded. Raises UserError for a class it does not know."""
    name = type(pipe).__name__
    if name not in ADAPTERS:  # by name: a subclass may call its denoiser in another way
        raise UserError(f"pipe: a {name} is not supported; expected one of {', '.join(ADAPTERS)}")
    return ADAPTERS[name].from_pipeline(pipe)


def _check_parts(path: str, index: dict) -> None:
    """Refuse a model_index.json whose parts come from other modules than those of the libraries: it names code."""
    for part, entry in index.items():
        if isinstance(entry, list) and entry and entry[0] not in LIBRARIES:
            raise UserError(
                f"model.path: {path} names code of its own for {one_line(ValueError(part), 40)}: "
                f"{one_line(ValueError(entry), 80)}; parts have to be classes of diffusers or transformers"
            )


__all__ = [
    "SD15_SMALL",
    "StableDiffusionAdapter",
    "StableDiffusionXLAdapter",
    "adapter_of",
    "load_adapter",
    "resolve_path",
]
