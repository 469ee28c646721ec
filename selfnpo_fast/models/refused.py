"""Models that are refused, by the class of their pipeline, with the reason.

docs/models.md shows both tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_DISTILLED = (
    "it is guidance-distilled: its guidance scale is an input of the network, and a negative branch would double what "
    "its pictures cost"
)
_NO_BRANCH = "it has no negative branch: its guidance scale is an input of the network"
_BY_DATA = "so that its memory cannot be computed and its steps cannot be captured"
_GUIDER = "a guider of its own makes its branches, and its pipeline loads no LoRA"


def _of(reason: str, *names: str) -> dict[str, str]:
    return dict.fromkeys((f"{name}Pipeline" for name in names), reason)


REFUSED: Mapping[str, str] = {
    **_of(_DISTILLED, "Flux", "FluxImg2Img", "FluxInpaint", "FluxKontext", "FluxKontextInpaint", "FluxControlNet"),
    **_of(_NO_BRANCH, "FluxControl", "FluxControlImg2Img", "FluxControlInpaint", "FluxFill", "Flux2"),
    **_of(_DISTILLED, "HunyuanVideo", "HunyuanVideoImageToVideo", "HunyuanVideoFramepack"),
    **_of(_GUIDER, "HunyuanVideo15", "HunyuanVideo15ImageToVideo", "HunyuanImage"),
    **_of(_NO_BRANCH, "LatentConsistencyModel", "LatentConsistencyModelImg2Img"),
    **_of(f"its attention picks tokens by what the mask holds, {_BY_DATA}", "Mochi"),
    **_of(f"its network counts the tokens of each prompt on the host, {_BY_DATA}", "Lumina2"),
    **_of(f"its experts share the tokens out by what these hold, {_BY_DATA}", "HiDreamImage"),
    **_of("it guides three of its channels only, and its network takes no LoRA", "Lumina"),
    **_of("its network takes no LoRA, and may predict a variance as well", "PixArtAlpha", "PixArtSigma"),
    **_of("its network may predict a variance as well, and is given times on a scale of its own", "Sana"),
    **_of("its text encoder is code of its own, and no class of transformers", "Kolors", "KolorsImg2Img"),
    **_of(
        "it makes sound as well, and calls its denoiser for perturbed attention and for each modality besides",
        *("LTX2", "LTX2ImageToVideo", "LTX2Condition"),
    ),
    **_of("it ships its negative branch as a network of its own", "Ideogram4"),
}
"""Why models are not trained, by the class of their pipeline."""

# Why classes take no negative, by a part of the class's name; the first that fits is told.
_UNGUIDED = (
    ("InstructPix2Pix", "it guides three ways, with two kinds of negative rows"),
    ("PAG", "its batch holds rows of perturbed attention besides the negative ones"),
    ("SAG", "it calls its denoiser a second time in each step for self-attention guidance"),
    ("LEdits", "it guides by a list of edits"),
    ("FluxPriorRedux", "it joins two pipelines of its own"),
    ("LTX2", "it calls its denoiser for sound, for perturbed attention and for each modality besides"),
    ("Lumina", "it may rescale or stop guidance in ways that were not read"),
    *((name, _NO_BRANCH) for name in ("LatentConsistency", "FluxControl", "FluxFill", "Flux2Pipeline", "HunyuanVideo")),
)

_TURBO = re.compile(r"(^|[-_.])turbo($|[-_.])", re.IGNORECASE)
"""The word by which models name themselves that were distilled to a few steps without guidance."""


def why_untrained(name: str) -> str | None:
    """Why a model whose pipeline has this class is not trained; None where that is not known."""
    return REFUSED.get(name)


def why_unlisted(name: str) -> str | None:
    """Why a pipeline class of this name takes no negative; None where that is not known."""
    return next((reason for part, reason in _UNGUIDED if part in name), None)


def why_turbo(names: Iterable[object]) -> str | None:
    """Why a model is not trained that calls itself so: Hub ids in its configs, and its own; None
    where no name says so."""
    told = next((name for name in names if isinstance(name, str) and _TURBO.search(name.rpartition("/")[2])), None)
    if told is None:
        return None
    return f"{told} was distilled to draw in a few steps without guidance: it has no negative branch to replace"
