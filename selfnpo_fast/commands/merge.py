"""`selfnpo merge`: writes the mixture theta + alpha eta + beta delta (Eq. 7) as one network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.folders import check_writable
from selfnpo_fast.runtime.locks import only_writer
from selfnpo_fast.runtime.options import parse_options
from selfnpo_fast.runtime.screen import show


@dataclass(kw_only=True)
class MergeOptions:
    """Write the negative model theta + alpha eta + beta delta (Eq. 7) as one network."""

    base: str | None = None
    """theta: a diffusers folder or a Hub id."""
    positive: str | None = None
    """theta + eta: a fine-tune of the base, full weights or a LoRA; by default the base itself."""
    negative: str | None = None
    """theta + delta: the negative model that was trained from the base; a run's output folder, full
    weights or a LoRA."""
    alpha: float = 1.0
    """Share of the positive's change eta, 0 to 1."""
    beta: float = 1.0
    """Share of the negative's change delta, 0 to 1."""
    output: str | None = None
    """A new or empty folder; the network is written to the denoiser's folder in it."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the result."""


def run(argv: list[str]) -> None:
    """`selfnpo merge` with the words that follow it. Raises UserError for bad options."""
    from selfnpo_fast.negatives.merge import merge

    options = parse_options(MergeOptions, argv, "selfnpo merge")
    for name in ("base", "negative", "output"):
        if getattr(options, name) is None:
            raise UserError(f"{name}: none given; expected --{name}")
    with only_writer(check_writable(str(options.output))):
        folder = merge(**vars(options))
    show(f"negative model: {folder}")
