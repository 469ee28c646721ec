"""Set measures on the features of pictures: Frechet distance and the k-NN metrics.

Shape letters: N generated pictures, M real samples, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from selfnpo_fast.scoring.measures import RememberLast, Terms
from selfnpo_fast.scoring.metrics import KnnSamples, frechet_distance, knn_samples

Features = Callable[[torch.Tensor], torch.Tensor]
"""Takes images (N, 3, H, W) in [-1, 1] to their features (N, D)."""


@dataclass(frozen=True)
class FrechetDistance:
    """Frechet distance of the pictures' features to real ones; see `metrics.frechet_distance`."""

    features: Features
    """What the distance compares."""
    real_features: torch.Tensor
    """(M, D)."""
    name: ClassVar[str] = "frechet"
    """The measure's key in report.json."""
    least_images: ClassVar[int] = 2
    """A covariance needs two samples."""

    def compare(self, images: torch.Tensor) -> float:
        """The distance, in squared units of the features."""
        return frechet_distance(self.features(images), self.real_features)


@dataclass(frozen=True)
class KnnMeasure:
    """One of the four k-NN metrics; see `metrics.KnnSamples`, whose field `name` it reports."""

    samples: Callable[[torch.Tensor], KnnSamples]
    """Takes images (N, 3, H, W) to the terms of all four metrics."""
    name: Literal["precision", "density", "recall", "coverage"]
    """The measure's key in report.json."""
    least_images: int
    """More than neighbours are counted."""

    def compare(self, images: torch.Tensor) -> Terms:
        """Terms of pictures for precision and density, of real samples for recall and coverage."""
        side = "generated" if self.name in ("precision", "density") else "real"
        return Terms(getattr(self.samples(images), self.name), side)


def knn_measures(features: Features, real_features: torch.Tensor, k: int = 5) -> list[KnnMeasure]:
    """Precision, density, recall and coverage against real features (M, D); see `KnnMeasure`.

    The four share one computation for each set of pictures.
    """
    samples = RememberLast(lambda images: knn_samples(features(images), real_features, k))
    return [KnnMeasure(samples, name, k + 1) for name in ("precision", "density", "recall", "coverage")]
