"""The fitted digits scorer: its files, and its outputs for a set of pictures.

Shape letters: N pictures, M real pictures, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.scoring.digits.domain import DIGITS_DIR
from selfnpo_fast.scoring.digits.network import DigitScorer
from selfnpo_fast.scoring.measures import RememberLast

BATCH_SIZE = 256
"""Pictures per forward of the scorer."""


@dataclass(frozen=True, kw_only=True)
class ScorerOutputs:
    """What the network says of N pictures; one row per picture in every field."""

    features: torch.Tensor
    """(N, D) float32: what the heads read, used for distances between sets of pictures."""
    digit_logits: torch.Tensor
    """(N, 10) float32: before the softmax over the ten digits."""
    realness_logit: torch.Tensor
    """(N,) float32: before the sigmoid; the log-odds of a real picture over a corrupted one."""


class FittedScorer:
    """A fitted `DigitScorer`, the features of the real test pictures, and how good the fit is.

    benchmarks/digits_model fits it on a split of real digits that serves nothing else, never on
    generated pictures.
    """

    def __init__(self, network: DigitScorer, real_features: torch.Tensor, quality: Mapping[str, str]) -> None:
        self.network = network.eval()
        self.real_features = real_features
        """(M, D) float32: features of the real test pictures."""
        self.quality = dict(quality)
        """Accuracies on the test split, as text."""
        self._remembered = RememberLast(self._forward)

    @classmethod
    def load(cls, folder: Path = DIGITS_DIR / "scorers") -> FittedScorer:
        """Reads what `save` wrote. Raises UserError where a file is missing or damaged."""
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
        """Writes the network, real features (M, D), and `quality`, its accuracies as text."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
        save_file(weights, folder / "scorer.safetensors")
        stored = {"features": features.detach().float().cpu().contiguous()}
        save_file(stored, folder / "test_features.safetensors", metadata=dict(quality))

    def outputs(self, images: torch.Tensor) -> ScorerOutputs:
        """The network's outputs for images (N, 3, 32, 32) float in [-1, 1].

        The outputs for the last images are remembered, so that all measures of a set of pictures
        share one forward. Raises UserError for images of another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (3, 32, 32):
            raise UserError(f"images: shape {tuple(images.shape)} is not (N, 3, 32, 32); score digit pictures only")
        return self._remembered(images)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, D) of images (N, 3, 32, 32)."""
        return self.outputs(images).features

    @torch.inference_mode()
    def _forward(self, images: torch.Tensor) -> ScorerOutputs:
        batches = [self.network(batch.float().cpu()) for batch in images.split(BATCH_SIZE)]
        names = [field.name for field in fields(ScorerOutputs)]
        return ScorerOutputs(
            **{name: torch.cat(parts) for name, parts in zip(names, zip(*batches, strict=True), strict=True)}
        )
