"""A sweep of guidance scales over several arms on paired prompts and seeds, and what follows from its numbers.

An arm is a way to make pictures: plain guidance ("base"), or the same model with a negative in its unconditional
branch. A negative changes how strong a guidance scale acts, so no arm is judged at one scale: each of its points is
held against the baseline at every scale. How pictures are made and what they show is the business of `generate` and
`scorers`. Scales are diffusers' `guidance_scale` (omega + 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.scoring.digits.domain import Domain, digits_domain
from selfnpo_fast.scoring.intervals import Interval, mean_interval, paired_difference, recall_gain, win_rate_interval
from selfnpo_fast.scoring.metrics import KnnSamples, frechet_distance, knn_samples

SEEDS_PER_RUN = 10**6
ACCURATE = 0.95
"""Accuracy from which on a point counts when measures are compared at their highest."""


@dataclass(frozen=True)
class Case:
    """One picture to make in every arm and at every scale."""

    label: Any
    """What the scorers compare the picture with."""
    prompt: str
    seed: int
    held_out: bool = False
    """The prompt combines what the model has never seen together; scored apart as well."""


class Generate(Protocol):
    """Makes pictures: float32 (N, 3, H, W) in [-1, 1], a function of its arguments alone."""

    def __call__(self, arm: str, guidance_scale: float, prompts: list[str], seeds: list[int]) -> torch.Tensor: ...


class Scorers(Protocol):
    """What `evaluate` needs of scorers; DigitsScorers is one."""

    accuracy: str
    """The measure that says whether a picture shows what was asked for."""
    compared: Sequence[str]
    """Measures on which paired pictures play against each other; more is better."""
    real_features: torch.Tensor
    """(M, D): features of real pictures."""

    def score(self, images: torch.Tensor, labels: Sequence[Any]) -> Any:
        """A dataclass of tensors: `features` (N, D), and one measure (N,) per further field."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm at one scale."""

    arm: str
    guidance_scale: float
    images: int
    means: dict[str, Interval]
    """Mean over pictures of every measure of the scorers."""
    held_out: Interval | None
    """Accuracy on held-out cases; None with fewer than two such prompts."""
    frechet: float
    precision: Interval
    density: Interval
    recall: Interval
    coverage: Interval

    def dominates(self, other: Row) -> bool:
        """At least the other's precision and recall, and more of one."""
        ours, theirs = (self.precision.value, self.recall.value), (other.precision.value, other.recall.value)
        return ours != theirs and all(a >= b for a, b in zip(ours, theirs, strict=True))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm at one scale against the baseline at one scale, on the same cases."""

    arm: str
    guidance_scale: float
    baseline_guidance_scale: float
    wins: dict[str, Interval]
    """Share of pairs that the arm wins, per compared measure; ties count half."""
    differences: dict[str, Interval]
    """Mean paired difference, arm minus baseline: accuracy, compared measures, precision, recall."""


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """A row, and the rows of the opposing arm that have no less precision and recall, and more of one."""

    arm: str
    guidance_scale: float
    opponent: str
    dominated_by: list[float]
    """Guidance scales of the opponent."""


@dataclass(frozen=True, kw_only=True)
class RecallGain:
    """What an arm's point gains over plain guidance interpolated between its scales; see `intervals.recall_gain`."""

    arm: str
    guidance_scale: float
    recall: Interval


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What an arm gains over plain guidance at all scales that were tried."""

    arm: str
    gains: list[RecallGain]
    """Points that clearly have more recall at equal precision, and dominate a point of the baseline's frontier.

    The first alone may come of the straight lines between scales, the second alone of noise where recall is flat."""
    beyond_reach: list[float]
    """Scales with clearly more precision than the baseline at any scale: a trade, not a gain by itself."""
    best: Comparison
    """The arm at its best scale against the baseline at its own; best is the lowest Frechet distance."""
    unbeaten: list[float]
    """Baseline scales that the arm at its best scale does not clearly beat on any compared measure."""

    @property
    def gain(self) -> bool:
        """Whether there is a gain. Wins at single scales do not count: stronger guidance alone brings them too."""
        return bool(self.gains)


@dataclass(frozen=True, kw_only=True)
class Results:
    """All numbers of a sweep, and the pictures of its first cases."""

    baseline: str
    accuracy: str
    compared: tuple[str, ...]
    rows: list[Row]
    comparisons: list[Comparison]
    recall_gains: list[RecallGain]
    cases: list[Case]
    """The first few cases: not picked by hand."""
    pictures: dict[tuple[str, float], torch.Tensor]
    """By (arm, scale), the pictures of `cases`: (N, 3, H, W) float32 in [-1, 1]."""

    @property
    def arms(self) -> list[str]:
        """The arms, in order."""
        return list(dict.fromkeys(row.arm for row in self.rows))

    @property
    def challengers(self) -> list[str]:
        """The arms that are not the baseline."""
        return [arm for arm in self.arms if arm != self.baseline]

    def of(self, arm: str) -> list[Row]:
        """The arm's rows, in the order of the sweep."""
        return [row for row in self.rows if row.arm == arm]

    def best(self, arm: str) -> Row:
        """The arm's row of lowest Frechet distance: the one number here that weighs quality and variety together."""
        return min(self.of(arm), key=lambda row: row.frechet)

    def comparison(self, arm: str, guidance_scale: float, baseline_guidance_scale: float) -> Comparison:
        """The arm at a scale against the baseline at a scale."""
        wanted = (arm, guidance_scale, baseline_guidance_scale)
        found = [c for c in self.comparisons if (c.arm, c.guidance_scale, c.baseline_guidance_scale) == wanted]
        if not found:
            raise ValueError(f"comparison: {wanted} was not part of the sweep; ask for an arm and scales that were")
        return found[0]

    def highest(self, arm: str, measure: str) -> Row | None:
        """The arm's row of highest mean `measure` among those that draw what was asked for (ACCURATE of the time)."""
        accurate = [row for row in self.of(arm) if row.means[self.accuracy].value >= ACCURATE]
        return max(accurate, key=lambda row: row.means[measure].value, default=None)

    def reach(self, arm: str, measure: str) -> Comparison | None:
        """The arm's highest point in `measure` against the baseline's own; None where either is nowhere accurate."""
        ours, theirs = self.highest(arm, measure), self.highest(self.baseline, measure)
        if ours is None or theirs is None:
            return None
        return self.comparison(arm, ours.guidance_scale, theirs.guidance_scale)

    def recall_gains_of(self, arm: str) -> list[RecallGain]:
        """What each of the arm's points gains in recall at equal precision."""
        return [gain for gain in self.recall_gains if gain.arm == arm]

    def frontier(self, arm: str) -> list[FrontierPoint]:
        """Which points of the arm the baseline dominates, and which of the baseline's the arm dominates."""
        pairs = [(row, self.baseline) for row in self.of(arm)] + [(row, arm) for row in self.of(self.baseline)]
        return [
            FrontierPoint(
                arm=row.arm,
                guidance_scale=row.guidance_scale,
                opponent=opponent,
                dominated_by=[other.guidance_scale for other in self.of(opponent) if other.dominates(row)],
            )
            for row, opponent in pairs
        ]

    def verdict(self, arm: str) -> Verdict:
        """What the arm gains over the baseline at all scales."""
        base = self.of(self.baseline)
        frontier = [row for row in base if not any(other.dominates(row) for other in base)]
        gains = {gain.guidance_scale: gain for gain in self.recall_gains_of(arm)}
        against = {
            row.guidance_scale: [self.comparison(arm, row.guidance_scale, other.guidance_scale) for other in base]
            for row in self.of(arm)
        }
        best = self.best(arm).guidance_scale
        return Verdict(
            arm=arm,
            gains=[
                gains[row.guidance_scale]
                for row in self.of(arm)
                if gains[row.guidance_scale].recall.above(0) and any(row.dominates(other) for other in frontier)
            ],
            beyond_reach=[
                scale
                for scale, comparisons in against.items()
                if all(comparison.differences["precision"].above(0) for comparison in comparisons)
            ],
            best=self.comparison(arm, best, self.best(self.baseline).guidance_scale),
            unbeaten=[
                comparison.baseline_guidance_scale
                for comparison in against[best]
                if not any(win.above(0.5) for win in comparison.wins.values())
            ],
        )


@dataclass(frozen=True, kw_only=True)
class _Point:
    """Values per picture of one arm at one scale, from which intervals are drawn."""

    measures: dict[str, torch.Tensor]
    features: torch.Tensor
    knn: KnnSamples


_Points = dict[tuple[str, float], _Point]  # by (arm, guidance scale)


def make_cases(n: int, seed: int = 0, domain: Domain | None = None) -> list[Case]:
    """n cases over all prompts of a domain (the digits by default), in a shuffled order that repeats when used up.

    Seeds differ between cases; fewer cases are the first of more.
    """
    if not 1 <= n <= SEEDS_PER_RUN:
        raise UserError(f"cases: {n} is not possible; give a number from 1 to {SEEDS_PER_RUN}")
    if seed < 0:
        raise UserError(f"seed: {seed} is not possible; give 0 or more")
    domain = domain or digits_domain()
    labels = domain.labels()
    order = np.random.default_rng(seed).permutation(len(labels))
    asked = [labels[order[i % len(order)]] for i in range(n)]
    return [
        Case(label, domain.prompt(label), seed * SEEDS_PER_RUN + i, domain.is_held_out(label))
        for i, label in enumerate(asked)
    ]


def evaluate(
    generate: Generate,
    cases: Sequence[Case],
    arms: Sequence[str],
    guidance_scales: Sequence[float],
    scorers: Scorers,
    *,
    baseline: str = "base",
    k: int = 5,
    batch_size: int = 64,
    keep: int = 12,
    on_row: Callable[[Row], None] | None = None,
) -> Results:
    """Make and score the pictures of all cases in every arm at every scale.

    `k` is the neighbour of the k-NN metrics, `keep` the number of first cases whose pictures are kept, `on_row` is
    called as each row is done.
    """
    check_sweep(cases, arms, guidance_scales, baseline, k)
    rows: list[Row] = []
    points: _Points = {}
    pictures: dict[tuple[str, float], torch.Tensor] = {}
    for arm in arms:
        for scale in guidance_scales:
            images = _generate(generate, arm, scale, cases, batch_size)
            point = _score(images, cases, scorers, k)
            rows.append(_row(arm, scale, point, cases, scorers))
            points[arm, scale], pictures[arm, scale] = point, images[:keep].clone()
            if on_row is not None:
                on_row(rows[-1])
    return Results(
        baseline=baseline,
        accuracy=scorers.accuracy,
        compared=tuple(scorers.compared),
        rows=rows,
        comparisons=[
            _compare(key, (baseline, scale), points, cases, scorers)
            for key in points
            if key[0] != baseline
            for scale in guidance_scales
        ],
        recall_gains=[_recall_gain(key, baseline, points, cases) for key in points if key[0] != baseline],
        cases=list(cases[:keep]),
        pictures=pictures,
    )


def _generate(generate: Generate, arm: str, scale: float, cases: Sequence[Case], batch_size: int) -> torch.Tensor:
    """The pictures of all cases, (N, 3, H, W) float32 on the CPU."""
    parts = []
    for start in range(0, len(cases), batch_size):
        batch = cases[start : start + batch_size]
        part = generate(arm, scale, [case.prompt for case in batch], [case.seed for case in batch])
        if part.ndim != 4 or part.shape[:2] != (len(batch), 3):
            raise ValueError(
                f"generate: shape {tuple(part.shape)} for {len(batch)} prompts; return ({len(batch)}, 3, H, W)"
            )
        if not part.isfinite().all():
            raise ValueError(
                f"generate: {arm!r} at guidance_scale {scale:g} made NaN or infinite pixels; see the model"
            )
        parts.append(part.float().cpu())
    return torch.cat(parts)


def _score(images: torch.Tensor, cases: Sequence[Case], scorers: Scorers, k: int) -> _Point:
    scores = scorers.score(images, [case.label for case in cases])
    measures = {field.name: getattr(scores, field.name) for field in dataclasses.fields(scores)}
    features = measures.pop("features")
    return _Point(measures=measures, features=features, knn=knn_samples(features, scorers.real_features, k))


def _row(arm: str, scale: float, point: _Point, cases: Sequence[Case], scorers: Scorers) -> Row:
    prompts = np.array([case.prompt for case in cases])
    held_out = np.array([case.held_out for case in cases])
    accuracy = point.measures[scorers.accuracy].numpy()
    enough = len(set(prompts[held_out])) >= 2
    return Row(
        arm=arm,
        guidance_scale=scale,
        images=len(cases),
        means={name: mean_interval(values, prompts) for name, values in point.measures.items()},
        held_out=mean_interval(accuracy[held_out], prompts[held_out]) if enough else None,
        frechet=frechet_distance(point.features, scorers.real_features),
        precision=mean_interval(point.knn.precision, prompts),
        density=mean_interval(point.knn.density, prompts),
        # Means over real pictures, which have no prompt.
        recall=mean_interval(point.knn.recall),
        coverage=mean_interval(point.knn.coverage),
    )


def _compare(
    key: tuple[str, float], base: tuple[str, float], points: _Points, cases: Sequence[Case], scorers: Scorers
) -> Comparison:
    prompts = np.array([case.prompt for case in cases])
    ours, theirs = points[key], points[base]
    differences = {
        name: paired_difference(ours.measures[name], theirs.measures[name], prompts)
        for name in dict.fromkeys((scorers.accuracy, *scorers.compared))
    }
    differences["precision"] = paired_difference(ours.knn.precision, theirs.knn.precision, prompts)
    differences["recall"] = paired_difference(ours.knn.recall, theirs.knn.recall)
    return Comparison(
        arm=key[0],
        guidance_scale=key[1],
        baseline_guidance_scale=base[1],
        wins={
            name: win_rate_interval(ours.measures[name], theirs.measures[name], prompts) for name in scorers.compared
        },
        differences=differences,
    )


def _recall_gain(key: tuple[str, float], baseline: str, points: _Points, cases: Sequence[Case]) -> RecallGain:
    base = [points[other].knn for other in sorted(points) if other[0] == baseline]
    ours = points[key].knn
    gain = recall_gain(
        ours.precision,
        ours.recall,
        [knn.precision for knn in base],
        [knn.recall for knn in base],
        np.array([case.prompt for case in cases]),
    )
    return RecallGain(arm=key[0], guidance_scale=key[1], recall=gain)


def check_sweep(
    cases: Sequence[Case], arms: Sequence[str], guidance_scales: Sequence[float], baseline: str, k: int
) -> None:
    """UserError where these cannot make a sweep; called before any picture is drawn."""
    if baseline not in arms:
        raise UserError(f"arms: {list(arms)} lack the baseline {baseline!r}; every arm is held against it")
    if len(set(arms)) != len(arms):
        raise UserError(f"arms: {list(arms)} repeat; name each arm once")
    if not guidance_scales or len(set(guidance_scales)) != len(guidance_scales):
        raise UserError(f"guidance_scales: {list(guidance_scales)} is not possible; give at least one, each once")
    if len({case.prompt for case in cases}) < 2 or len(cases) <= k:
        raise UserError(f"cases: {len(cases)} are too few; give more than {k}, of at least 2 prompts")
