"""One adapter per model family; `load_adapter` picks it from the pipeline's own model_index.json."""

from __future__ import annotations

from pathlib import Path

from selfnpo_fast.errors import UserError
from selfnpo_fast.models.sd import StableDiffusionAdapter
from selfnpo_fast.models.sdxl import StableDiffusionXLAdapter

DIGITS = Path(__file__).resolve().parent.parent / "assets" / "digits"

ADAPTERS = {
    "StableDiffusionPipeline": StableDiffusionAdapter,
    "StableDiffusionXLPipeline": StableDiffusionXLAdapter,
}


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

    source = resolve_path(path)
    if source.startswith("~"):
        source = str(Path(source).expanduser())
    looks_local = Path(source).exists() or source.startswith((".", "/")) or source.count("/") > 1
    if looks_local and not Path(source).is_dir():
        raise UserError(f"model.path: no such folder: {path}; give a diffusers pipeline folder or a Hub id")
    try:
        index = DiffusionPipeline.load_config(source, revision=revision)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        what = "is no diffusers pipeline (no readable model_index.json)" if looks_local else "was not found on the Hub"
        raise UserError(f"model.path: {path} {what}: {str(error).splitlines()[0][:200]}") from error
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name not in ADAPTERS:
        raise UserError(f"model.path: {path} is a {name}; supported are {', '.join(ADAPTERS)}")
    return ADAPTERS[name](source, revision=revision, variant=variant, resolution=resolution)


__all__ = ["StableDiffusionAdapter", "StableDiffusionXLAdapter", "load_adapter", "resolve_path"]
