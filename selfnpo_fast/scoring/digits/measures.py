"""The measures of digit pictures: is it the digit, are its colours right, does it look real.

Shape letters: N pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.scoring.digits.colours import match_colours
from selfnpo_fast.scoring.digits.domain import Label, digits_domain
from selfnpo_fast.scoring.digits.scorer import FittedScorer
from selfnpo_fast.scoring.measures import Measures, Roles
from selfnpo_fast.scoring.set_measures import FrechetDistance, knn_measures

ROLES = Roles(
    accuracy="digit_correct",
    compared=("digit_log_prob", "realness"),
    precision="precision",
    recall="recall",
    distance="frechet",
)
"""What the verdicts on digits rest on."""


@dataclass(frozen=True)
class DigitLogProb:
    """(N,) float32, nats: log-probability of the digit that the prompt asks for."""

    scorer: FittedScorer
    name: ClassVar[str] = "digit_log_prob"

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """See the class. Raises UserError for prompts or images that are no digits'."""
        asked = _asked_digits(images, prompts)
        log_probs = self.scorer.outputs(images).digit_logits.log_softmax(dim=1)
        return log_probs.gather(1, asked[:, None]).squeeze(1)


@dataclass(frozen=True)
class DigitCorrect:
    """(N,) bool: the digit that the prompt asks for is the likeliest of the ten."""

    scorer: FittedScorer
    name: ClassVar[str] = "digit_correct"

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """See the class."""
        asked = _asked_digits(images, prompts)
        return self.scorer.outputs(images).digit_logits.argmax(dim=1) == asked


@dataclass(frozen=True)
class ColourMatch:
    """(N,) bool: ink and background are both nearest to the colours that the prompt asks for."""

    name: ClassVar[str] = "colour_match"

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """See the class."""
        return match_colours(images.float().cpu(), _asked(images, prompts))


@dataclass(frozen=True)
class Realness:
    """(N,) float32 in 0..1: probability of being a real picture, not a corrupted one."""

    scorer: FittedScorer
    name: ClassVar[str] = "realness"

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """See the class; any prompts are taken."""
        return self.scorer.outputs(images).realness_logit.sigmoid()


def digits_measures(scorer: FittedScorer, k: int = 5) -> Measures:
    """All measures of digit pictures; `k` is the neighbour of the k-NN measures."""
    return Measures(
        picture=[DigitLogProb(scorer), DigitCorrect(scorer), ColourMatch(), Realness(scorer)],
        sets=[
            FrechetDistance(scorer.features, scorer.real_features),
            *knn_measures(scorer.features, scorer.real_features, k),
        ],
        roles=ROLES,
    )


def _asked(images: torch.Tensor, prompts: Sequence[str]) -> list[Label]:
    """What the prompts ask for; raises UserError where they do not fit the images or the domain."""
    if len(prompts) != len(images):
        raise UserError(f"prompts: {len(prompts)} of them for {len(images)} images; give one per image")
    domain = digits_domain()
    return [domain.label(prompt) for prompt in prompts]


def _asked_digits(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """(N,) int64."""
    return torch.tensor([label.digit for label in _asked(images, prompts)])
