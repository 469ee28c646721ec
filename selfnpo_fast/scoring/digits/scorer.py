"""Scores of digit pictures: is it the digit, are its colours the ones asked for, does it look real.

The only module of `scoring`, beside `domain` and `network`, that knows digits. `evaluate` takes any object with the
members of `evaluate.Scorers`.

Shape letters: B pictures of a batch, N pictures, P pixels, C colours of a palette, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.scoring.digits.domain import DIGITS_DIR, Label, digits_domain
from selfnpo_fast.scoring.digits.network import DigitScorer

BORDER = 2  # pixels; digits are padded by more than this, so the ring shows nothing but background
INK_SHARE = 1 / 64  # of all pixels: 16 of 32 x 32, as many as the thinnest "one" of the test split has near full ink


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What each of N pictures scored; one row per picture in every field."""

    digit_log_prob: torch.Tensor
    """(N,) float32, nats: log-probability of the digit that was asked for."""
    digit_correct: torch.Tensor
    """(N,) bool: that digit is the likeliest of the ten."""
    colour_match: torch.Tensor
    """(N,) bool: ink and background are both nearest to the colours that were asked for."""
    realness: torch.Tensor
    """(N,) float32 in 0..1: probability of being a real picture, not a corrupted one."""
    features: torch.Tensor
    """(N, D) float32: the scorer's features, for distances between sets of pictures."""


def background_colour(images: torch.Tensor) -> torch.Tensor:
    """Median colour of the outer ring, (N, 3) in 0..1, of images (N, 3, H, W) in [-1, 1]."""
    ring = torch.ones(images.shape[-2:], dtype=torch.bool, device=images.device)
    ring[BORDER:-BORDER, BORDER:-BORDER] = False
    return (images[:, :, ring].median(dim=2).values + 1) / 2


def ink_colour(images: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Mean colour, (N, 3) in 0..1, of the pixels of images (N, 3, H, W) that are farthest from `background` (N, 3).

    The edges of a stroke are mixtures of ink and background. They lie on the straight line between the two in RGB, so
    that the pixels farthest along it are the pure ones; Lab bends that line, and tells our palettes apart less surely
    under noise.
    """
    pixels_NP3 = (images.flatten(2).transpose(1, 2) + 1) / 2
    distance_NP = (pixels_NP3 - background[:, None]).norm(dim=2)
    farthest = distance_NP.topk(max(1, round(INK_SHARE * distance_NP.shape[1])), dim=1).indices
    return pixels_NP3.gather(1, farthest[:, :, None].expand(-1, -1, 3)).mean(dim=1)


def match_colours(images: torch.Tensor, labels: Sequence[Label]) -> torch.Tensor:
    """(N,) bool: background and ink of images (N, 3, H, W) are both the ones that the labels ask for.

    A picture whose "ink" is nearer to its background than to any ink of the palette is blank and matches nothing.
    """
    domain = digits_domain()
    background_N3 = background_colour(images)
    ink_N3 = ink_colour(images, background_N3)
    to_backgrounds_NC = torch.cdist(background_N3, domain.background_rgb.to(images.device))
    to_inks_NC = torch.cdist(ink_N3, domain.ink_rgb.to(images.device))
    asked_background = torch.tensor([label.background for label in labels], device=images.device)
    asked_ink = torch.tensor([label.ink for label in labels], device=images.device)
    drawn = (ink_N3 - background_N3).norm(dim=1) > to_inks_NC.amin(dim=1)
    return drawn & (to_backgrounds_NC.argmin(dim=1) == asked_background) & (to_inks_NC.argmin(dim=1) == asked_ink)


class DigitsScorers:
    """The scorers of the embedded digits model, and the features of its real test pictures.

    Fitted by benchmarks/digits_model on real digits of a split of their own; never on generated pictures.
    """

    accuracy = "digit_correct"
    compared = ("digit_log_prob", "realness")

    def __init__(self, network: DigitScorer, real_features: torch.Tensor, quality: Mapping[str, str]) -> None:
        self.network = network.eval()
        self.real_features = real_features
        self.quality = dict(quality)

    @classmethod
    def load(cls, folder: Path = DIGITS_DIR / "scorers") -> DigitsScorers:
        """Read what `save` wrote; UserError where a file is missing or damaged."""
        weights, stored = Path(folder) / "scorer.safetensors", Path(folder) / "test_features.safetensors"
        network = DigitScorer()
        try:
            network.load_state_dict(load_file(weights))
            features = load_file(stored)["features"]
            with safe_open(stored, "pt") as file:
                quality = file.metadata() or {}
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"scorers: cannot be read from {str(folder)!r} ({reason}); rebuild them with "
                "`python -m benchmarks.digits_model.build`"
            ) from error
        return cls(network, features, quality)

    @staticmethod
    def save(folder: Path, network: DigitScorer, features: torch.Tensor, quality: Mapping[str, str]) -> None:
        """Write the network, the features (M, D) of the real test split and `quality`, their accuracies as text."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
        save_file(weights, folder / "scorer.safetensors")
        stored = {"features": features.detach().float().cpu().contiguous()}
        save_file(stored, folder / "test_features.safetensors", metadata=dict(quality))

    @torch.inference_mode()
    def score(self, images: torch.Tensor, labels: Sequence[Label], batch_size: int = 256) -> Scores:
        """Score images (N, 3, 32, 32) float in [-1, 1] against what the N labels ask for."""
        if images.ndim != 4 or images.shape[1:] != (3, 32, 32):
            raise UserError(f"images: shape {tuple(images.shape)} is not (N, 3, 32, 32); score digit pictures only")
        if len(labels) != len(images):
            raise UserError(f"labels: {len(labels)} of them for {len(images)} images; give one per image")
        parts = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size].float().cpu()
            parts.append(self._score_batch(batch, labels[start : start + batch_size]))
        columns = {field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Scores)}
        return Scores(**columns)

    def _score_batch(self, images: torch.Tensor, labels: Sequence[Label]) -> Scores:
        asked_B = torch.tensor([label.digit for label in labels])
        features_BD, logits, realness_logit = self.network(images)
        return Scores(
            digit_log_prob=logits.log_softmax(dim=1).gather(1, asked_B[:, None]).squeeze(1),
            digit_correct=logits.argmax(dim=1) == asked_B,
            colour_match=match_colours(images, labels),
            realness=realness_logit.sigmoid(),
            features=features_BD,
        )
