"""Why a pipeline class that is in no family's list takes no negative."""

from __future__ import annotations

_DISTILLED = "it has no negative branch: its guidance scale is an input of the network"

# By a part of the class's name; the first that fits is told.
_REASONS = (
    ("InstructPix2Pix", "it guides three ways, with two kinds of negative rows"),
    ("LatentConsistency", _DISTILLED),
    ("PAG", "its batch holds rows of perturbed attention besides the negative ones"),
    ("SAG", "it calls its denoiser a second time in each step for self-attention guidance"),
    ("LEdits", "it guides by a list of edits"),
    *((name, _DISTILLED) for name in ("FluxControl", "FluxFill", "Flux2Pipeline", "HunyuanVideo")),
    *((name, "it joins two pipelines of its own") for name in ("FluxPriorRedux",)),
    ("LTX2", "it calls its denoiser for sound, for perturbed attention and for each modality besides"),
    ("Lumina", "it may rescale or stop guidance in ways that were not read"),
)


def why_unlisted(name: str) -> str | None:
    """Why a pipeline class of this name takes no negative; None where that is not known."""
    return next((reason for part, reason in _REASONS if part in name), None)
