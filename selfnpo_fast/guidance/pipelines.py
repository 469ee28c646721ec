"""The diffusers pipelines that a negative can be attached to, and how each one says that guidance is on.

Each class below has been read. At every step it asks its own property `do_classifier_free_guidance`; where that is true
it calls its `unet` once with 2B rows, the B negative ones first, and where it is false all rows are unguided, however
many there are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfnpo_fast.runtime.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class PipelineRule:
    """What must be known of a pipeline class to find the negative rows of a call of its denoiser."""

    denoiser: str
    """The component that predicts the noise."""
    guided: Callable[[DiffusionPipeline], bool]
    """Is guidance on for the step that is being computed? Then the first half of the rows is negative."""


_BATCHED_UNET = PipelineRule(denoiser="unet", guided=lambda pipe: bool(pipe.do_classifier_free_guidance))

RULES: dict[str, PipelineRule] = {
    "StableDiffusionPipeline": _BATCHED_UNET,
    "StableDiffusionImg2ImgPipeline": _BATCHED_UNET,
    "StableDiffusionInpaintPipeline": _BATCHED_UNET,
    "StableDiffusionControlNetPipeline": _BATCHED_UNET,
    "StableDiffusionControlNetImg2ImgPipeline": _BATCHED_UNET,
    "StableDiffusionControlNetInpaintPipeline": _BATCHED_UNET,
    "StableDiffusionAdapterPipeline": _BATCHED_UNET,
    "StableDiffusionXLPipeline": _BATCHED_UNET,
    "StableDiffusionXLImg2ImgPipeline": _BATCHED_UNET,
    "StableDiffusionXLInpaintPipeline": _BATCHED_UNET,
    "StableDiffusionXLControlNetPipeline": _BATCHED_UNET,
    "StableDiffusionXLControlNetImg2ImgPipeline": _BATCHED_UNET,
    "StableDiffusionXLControlNetInpaintPipeline": _BATCHED_UNET,
    "StableDiffusionXLAdapterPipeline": _BATCHED_UNET,
}

# Why a class is refused, by a part of its name; the first that fits is told.
_ONCE_PER_BRANCH = "it calls its denoiser once per branch, so there is no batch whose negative rows could be told apart"
_REASONS = (
    ("InstructPix2Pix", "it guides three ways, with two kinds of negative rows"),
    ("LatentConsistency", "it has no negative branch: its guidance scale is an input of the network"),
    ("PAG", "its batch holds rows of perturbed attention besides the negative ones"),
    ("SAG", "it calls its denoiser a second time in each step for self-attention guidance"),
    ("LEdits", "it guides by a list of edits"),
    *((name, _ONCE_PER_BRANCH) for name in ("Flux", "Wan", "QwenImage", "HunyuanVideo")),
    ("StableDiffusion3", "its denoiser is a transformer, which it calls again to skip layers"),
)
_SUPPORTED = (
    "supported are the stock StableDiffusion and StableDiffusionXL pipelines, their Img2Img, Inpaint, ControlNet and "
    "Adapter kin"
)


def rule_of(pipe: object) -> PipelineRule:
    """The rule of a pipeline's class; UserError with the reason where there is none.

    A subclass of a listed class is not listed: it may order its rows in another way.
    """
    import diffusers

    name = type(pipe).__name__
    if name in RULES and type(pipe) is getattr(diffusers, name):
        return RULES[name]
    listed = next((base.__name__ for base in type(pipe).__mro__[1:] if base.__name__ in RULES), None)
    reason = next((reason for part, reason in _REASONS if part in name), None)
    if reason is None and listed is not None:
        reason = f"it is a class of its own, made from {listed}, and may order its rows in another way"
    raise UserError(f"pipe: {name} is not supported: {reason or 'its rows are not known here'}; {_SUPPORTED}")


def calling_pipeline() -> DiffusionPipeline | None:
    """The pipeline in whose call this thread is, read off the stack; None where there is none.

    Pipelines share denoisers (`from_pipe`, `components`), and each keeps its last call's guidance scale: only the one
    that is being called can say whether these rows are guided.
    """
    from diffusers import DiffusionPipeline

    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and isinstance(caller := frame.f_locals.get("self"), DiffusionPipeline):
            return caller
        frame = frame.f_back
    return None
