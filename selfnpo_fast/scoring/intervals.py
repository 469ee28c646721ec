"""Bootstrap intervals of means over pictures, paired differences and win rates.

Pictures of one prompt are no independent draws. So prompts are resampled, each with all its
pictures.

Shape letters: N pictures, M real samples, S guidance scales, K the estimate and its resamples.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
"""Share of resampled estimates that an interval holds."""
RESAMPLES = 2000
"""Resamples of the groups per interval."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95% interval.

    Where all samples are equal (every digit right, say) the bootstrap sees no spread and both ends
    are the estimate.
    """

    value: float
    """The estimate."""
    low: float
    """The lower end: the 2.5th percentile of the resampled estimates."""
    high: float
    """The upper end: the 97.5th percentile of the resampled estimates."""

    def above(self, value: float) -> bool:
        """Whether the whole interval lies above `value`."""
        return self.low > value

    def below(self, value: float) -> bool:
        """Whether the whole interval lies below `value`."""
        return self.high < value


def mean_interval(values: ArrayLike, groups: ArrayLike | None = None, seed: int = 0) -> Interval:
    """Mean of values (N,) with a percentile bootstrap interval.

    `groups` (N,), such as the prompt of each picture, are resampled as wholes; without them every
    value is a group. Calls with equal seed and number of groups use the same resamples. Raises
    ValueError for fewer than 2 groups, values that are not finite, or lengths that differ.
    """
    return _interval(_means(values, groups, seed))


def paired_difference(a: ArrayLike, b: ArrayLike, groups: ArrayLike | None = None, seed: int = 0) -> Interval:
    """Mean of a - b over pairs (N,), with its interval. Raises as `mean_interval` does."""
    a, b = _pairs(a, b)
    return mean_interval(a - b, groups, seed)


def win_rate_interval(a: ArrayLike, b: ArrayLike, groups: ArrayLike | None = None, seed: int = 0) -> Interval:
    """Share of pairs (N,) in which a is greater than b, a tie counted half, with its interval.

    Raises as `mean_interval` does.
    """
    a, b = _pairs(a, b)
    return mean_interval((a > b) + 0.5 * (a == b), groups, seed)


def recall_gain(
    precision: ArrayLike,
    recall: ArrayLike,
    base_precision: ArrayLike,
    base_recall: ArrayLike,
    groups: ArrayLike | None = None,
    seed: int = 0,
) -> Interval:
    """Recall that a point gains over plain guidance of at least equal precision, with its interval.

    `precision`: (N,), the point's terms per generated picture.
    `recall`: (M,), the point's terms per real sample.
    `base_precision`: (S, N), the same of plain guidance at S scales in ascending order.
    `base_recall`: (S, M), the same of plain guidance at these scales.
    `groups`: (N,), the prompts.

    The scales of plain guidance are joined by straight lines; more guidance slides along these
    lines and gains nothing. Where the point is more precise than plain guidance at any scale, its
    recall is held against that of the most precise scale. Raises as `mean_interval` does.
    """
    base_precision_KS = np.stack([_means(terms, groups, seed) for terms in base_precision], axis=1)
    # Another seed: real samples are drawn independently of generated pictures.
    base_recall_KS = np.stack([_means(terms, None, seed + 1) for terms in base_recall], axis=1)
    best_K = _best_recall(_means(precision, groups, seed), base_precision_KS, base_recall_KS)
    return _interval(_means(recall, None, seed + 1) - best_K)


def _best_recall(precision_K: np.ndarray, base_precision_KS: np.ndarray, base_recall_KS: np.ndarray) -> np.ndarray:
    """(K,): the highest recall on each polyline where its precision is no less than the given one.

    `precision_K`: (K,), the given precision.
    `base_precision_KS`, `base_recall_KS`: (K, S), the corners of the polylines.
    """
    above_KS = base_precision_KS >= precision_K[:, None]
    best_K = np.where(above_KS, base_recall_KS, -np.inf).max(axis=1)
    # Between two scales, a line may cross the given precision at a point of more recall than its
    # ends above it.
    for i in range(base_precision_KS.shape[1] - 1):
        start_K, end_K = base_precision_KS[:, i], base_precision_KS[:, i + 1]
        crossed_K = above_KS[:, i] != above_KS[:, i + 1]
        along_K = np.divide(precision_K - start_K, end_K - start_K, where=crossed_K, out=np.zeros_like(precision_K))
        recall_at_crossing_K = base_recall_KS[:, i] + along_K * (base_recall_KS[:, i + 1] - base_recall_KS[:, i])
        best_K = np.where(crossed_K, np.maximum(best_K, recall_at_crossing_K), best_K)
    # A precision above the whole polyline is held against the polyline's most precise corner.
    most_precise_K = base_precision_KS.argmax(axis=1)[:, None]
    return np.where(above_KS.any(axis=1), best_K, np.take_along_axis(base_recall_KS, most_precise_K, axis=1)[:, 0])


def _means(values: ArrayLike, groups: ArrayLike | None, seed: int) -> np.ndarray:
    """(1 + RESAMPLES,): the mean of values (N,), then its resampled means."""
    values = _vector("values", values)
    if groups is None:
        sums, sizes = values, np.ones_like(values)
    else:
        inverse = np.unique(np.asarray(groups), return_inverse=True)[1].ravel()
        if len(inverse) != len(values):
            raise ValueError(f"groups: {len(inverse)} of them for {len(values)} values; give one per value")
        sums, sizes = np.bincount(inverse, weights=values), np.bincount(inverse).astype(np.float64)
    if len(sums) < 2:
        raise ValueError(f"groups: {len(sums)} of them give no interval; at least 2 prompts are needed")
    counts = _resample_counts(len(sums), seed)
    return np.append(values.mean(), (counts @ sums) / (counts @ sizes))


def _interval(draws: np.ndarray) -> Interval:
    """The estimate, first of the draws, between the percentiles of the others."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(draws[1:], [tail, 100 - tail])
    return Interval(float(draws[0]), float(low), float(high))


@functools.lru_cache(maxsize=4)
def _resample_counts(groups: int, seed: int) -> np.ndarray:
    """How often each group is drawn in each resample: (RESAMPLES, groups) float64.

    Rows sum to `groups`. With counts, the resampled means are one matrix product, and hundreds of
    intervals of a sweep share one set of draws.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES).astype(np.float64)


def _pairs(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = _vector("a", a), _vector("b", b)
    if len(a) != len(b):
        raise ValueError(f"a, b: {len(a)} and {len(b)} values are not paired; score the same cases in both arms")
    return a, b


def _vector(name: str, values: ArrayLike) -> np.ndarray:
    """Values as float64 (N,); raises ValueError for what would turn an interval into NaN."""
    values = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    values = values.astype(np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name}: shape {values.shape} is not possible; give a vector with at least one value")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: some values are not finite; look for NaN in the pictures or the scorer")
    return values
