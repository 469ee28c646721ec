"""Negative preference models for diffusion, trained from prompts only (Self-NPO)."""

from __future__ import annotations

import importlib

from selfnpo_fast.runtime.version import __version__

# Imported when first asked for: commands that need none of them start without diffusers.
_PUBLIC = {
    "GuidedSampler": "selfnpo_fast.guidance.sampler",
    "attach_negative": "selfnpo_fast.guidance.attach",
    "detach_negative": "selfnpo_fast.guidance.attach",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
