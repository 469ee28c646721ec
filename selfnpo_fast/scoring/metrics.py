"""Distances between two sets of pictures by their features: pure functions, float64 inside.

Shape letters: N generated, M real, D feature width, C rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CHUNK = 512
"""Rows of a distance matrix that are held at a time."""


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of the Gaussians fitted to features `a` (N, D) and `b` (M, D).

    With means mu and covariances A and B it is |mu_a - mu_b|^2 + tr(A + B - 2 (AB)^1/2).

    The trace of (AB)^1/2 is the sum of the singular values of R_a R_b^T, where A = R_a^T R_a comes
    from a QR decomposition of the centred samples. This form needs no matrix square root and no
    positive definite covariance. Estimates from few samples are biased upwards: compare only sets
    of the same size. Raises ValueError where a set has fewer than 2 samples, or features do not fit
    together or are not finite.
    """
    _check_features(a, b, at_least=2)
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    between = (a.double().mean(0) - b.double().mean(0)).square().sum()
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = between + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(distance.item(), 0.0)  # zero within rounding may come out as -1e-15


def _covariance_root(features: torch.Tensor) -> torch.Tensor:
    """R (min(N, D), D) float64 with R^T R = the unbiased covariance of features (N, D)."""
    features = features.double()
    return torch.linalg.qr((features - features.mean(0)) / (len(features) - 1) ** 0.5, mode="r").R


@dataclass(frozen=True, kw_only=True)
class KnnSamples:
    """How two sets overlap, by balls around each sample to its k-th nearest neighbour in its set.

    Each field holds one term per sample; the metric of that name is the mean of its terms. All
    metrics lie in 0..1, except density, which may exceed 1.

    [1] Kynkaanniemi et al., Improved precision and recall metric, 2019.
    [2] Naeem et al., Reliable fidelity and diversity metrics, 2020.
    """

    precision: torch.Tensor
    """(N,) bool: the generated sample lies in some ball of a real one [1]."""
    density: torch.Tensor
    """(N,) float64: number of real balls that the generated sample lies in, over k [2]."""
    recall: torch.Tensor
    """(M,) bool: the real sample lies in some ball of a generated one [1]."""
    coverage: torch.Tensor
    """(M,) bool: the ball of the real sample holds a generated one [2]."""


def knn_samples(generated: torch.Tensor, real: torch.Tensor, k: int = 5) -> KnnSamples:
    """The terms of all k-NN metrics of `generated` (N, D) against `real` (M, D).

    Balls are closed, so that a copy of a sample always lies in its ball. Raises ValueError where k
    is below 1, a set has no more than k samples, or features do not fit together or are not finite.
    """
    if k < 1:
        raise ValueError(f"k: {k} is not possible; give at least 1 neighbour")
    _check_features(generated, real, at_least=k + 1)
    generated, real = generated.double(), real.double()
    real_radius_M, generated_radius_N = _kth_neighbour(real, k), _kth_neighbour(generated, k)
    inside_real_N = torch.zeros(len(generated), dtype=torch.int64)
    recall_M = torch.zeros(len(real), dtype=torch.bool)
    coverage_M = torch.zeros(len(real), dtype=torch.bool)
    for start in range(0, len(generated), CHUNK):
        rows = slice(start, start + CHUNK)
        distance_CM = _distances(generated[rows], real)
        in_real_ball_CM = distance_CM <= real_radius_M
        inside_real_N[rows] = in_real_ball_CM.sum(dim=1)
        coverage_M |= in_real_ball_CM.any(dim=0)
        recall_M |= (distance_CM <= generated_radius_N[rows, None]).any(dim=0)
    return KnnSamples(
        precision=inside_real_N > 0, density=inside_real_N.double() / k, recall=recall_M, coverage=coverage_M
    )


def _kth_neighbour(samples: torch.Tensor, k: int) -> torch.Tensor:
    """Distance (N,) of each sample (N, D) to its k-th nearest neighbour among the others."""
    parts = []
    for start in range(0, len(samples), CHUNK):
        # The nearest of all is the sample itself at distance 0 (or an equal one: the count is the
        # same).
        parts.append(_distances(samples[start : start + CHUNK], samples).kthvalue(k + 1, dim=1).values)
    return torch.cat(parts)


def _distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Euclidean distances (C, M) of rows (C, D) to columns (M, D)."""
    # The form |a|^2 + |b|^2 - 2ab would be faster, but its cancellation puts equal points apart and
    # breaks ties differently in each chunk.
    return torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist")


def _check_features(a: torch.Tensor, b: torch.Tensor, *, at_least: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features: shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared; give (N, D) and (M, D)"
        )
    if min(len(a), len(b)) < at_least:
        raise ValueError(f"features: {min(len(a), len(b))} samples are too few; give at least {at_least} in each set")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features: some are not finite; look for NaN in the pictures or the scorer")
