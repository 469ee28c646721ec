"""The world of the embedded digits model: ten digits, eight inks, seven backgrounds, 560 prompts.

Everything that has to agree on what "teal" looks like (the data that the model learned from, the
colour measure, the reports) reads `assets/digits/domain.json` through this module.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from selfnpo_fast.runtime.errors import UserError

DIGITS_DIR = Path(__file__).resolve().parents[2] / "assets" / "digits"
"""The embedded digits model, a folder in diffusers format."""


@dataclass(frozen=True)
class Label:
    """What one prompt asks for, as indices into the domain's word lists."""

    digit: int
    """Index into `Domain.digits`."""
    ink: int
    """Index into `Domain.ink_names`."""
    background: int
    """Index into `Domain.background_names`."""


@dataclass(frozen=True)
class Domain:
    """Words, colours and the digit-ink pairs that the model never saw."""

    template: str
    """The prompt, with {ink}, {digit} and {background} in it."""
    digits: tuple[str, ...]
    """The ten digits as words, "zero" first."""
    ink_names: tuple[str, ...]
    """The inks as words."""
    ink_rgb: torch.Tensor
    """(inks, 3) float32 in 0..1."""
    background_names: tuple[str, ...]
    """The backgrounds as words."""
    background_rgb: torch.Tensor
    """(backgrounds, 3) float32 in 0..1."""
    held_out: frozenset[tuple[int, int]]
    """(digit, ink) pairs that the model never saw."""

    def labels(self) -> list[Label]:
        """All 560 combinations, digit-major."""
        return [
            Label(d, i, b)
            for d in range(len(self.digits))
            for i in range(len(self.ink_names))
            for b in range(len(self.background_names))
        ]

    def prompt(self, label: Label) -> str:
        """The sentence that asks for `label`."""
        return self.template.format(
            ink=self.ink_names[label.ink],
            digit=self.digits[label.digit],
            background=self.background_names[label.background],
        )

    def is_held_out(self, label: Label) -> bool:
        """Whether this digit in this ink was kept out of the model's training data."""
        return (label.digit, label.ink) in self.held_out

    def parse(self, prompt: str) -> Label | None:
        """The label that a prompt asks for; None where it is none of the 560 sentences."""
        return self._label_of_prompt.get(prompt.strip())

    def label(self, prompt: str) -> Label:
        """The label that a prompt asks for.

        Raises UserError where the prompt is none of the 560 sentences.
        """
        label = self.parse(prompt)
        if label is None:
            example = self.prompt(Label(0, 0, 0))
            raise UserError(f"prompt: {prompt!r} is none of the digits' sentences; give one such as {example!r}")
        return label

    @functools.cached_property
    def _label_of_prompt(self) -> dict[str, Label]:
        return {self.prompt(label): label for label in self.labels()}


@functools.cache
def digits_domain() -> Domain:
    """The domain of `assets/digits`."""
    raw = json.loads((DIGITS_DIR / "domain.json").read_text())
    digits, inks, backgrounds = raw["digits"], list(raw["inks"]), list(raw["backgrounds"])
    return Domain(
        template=raw["template"],
        digits=tuple(digits),
        ink_names=tuple(inks),
        ink_rgb=torch.tensor([raw["inks"][name] for name in inks], dtype=torch.float32) / 255,
        background_names=tuple(backgrounds),
        background_rgb=torch.tensor([raw["backgrounds"][name] for name in backgrounds], dtype=torch.float32) / 255,
        held_out=frozenset((digits.index(d), inks.index(i)) for d, i in raw["held_out"]),
    )
