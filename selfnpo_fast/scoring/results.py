"""What a sweep found, and what follows from its numbers: comparisons, the frontier, verdicts.

An arm is a way to make pictures: plain guidance (the baseline), or the same model with a negative
in its unconditional branch. A row is one arm at one guidance scale. Scales are diffusers'
`guidance_scale` (omega + 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from selfnpo_fast.scoring.intervals import Interval
from selfnpo_fast.scoring.measures import Roles

ACCURATE = 0.95
"""Accuracy from which on a row counts when arms are compared at their highest."""


@dataclass(frozen=True)
class Case:
    """One picture to make in every arm and at every scale."""

    prompt: str
    """What the picture is to show."""
    seed: int
    """Seed of the picture's start noise."""
    held_out: bool = False
    """Whether the prompt combines what the model has never seen together.

    The accuracy on such cases is also reported by itself."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm at one guidance scale."""

    arm: str
    """The arm's name."""
    guidance_scale: float
    """diffusers' guidance_scale."""
    images: int
    """Number of pictures."""
    means: dict[str, Interval]
    """By picture measure, the mean over pictures."""
    held_out: Interval | None
    """Accuracy on held-out cases; None with fewer than two such prompts."""
    sets: dict[str, Interval | float]
    """By set measure, its value; an interval where the measure gave terms."""

    def value(self, set_measure: str) -> float:
        """The value of a set measure, without its interval."""
        found = self.sets[set_measure]
        return found.value if isinstance(found, Interval) else found

    def record(self) -> dict[str, Any]:
        """The row for JSON; set measures are keys next to the row's fields."""
        record = dataclasses.asdict(self)
        sets = record.pop("sets")
        return record | sets

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Row:
        """The row that `record` came from."""
        known = {name: record[name] for name in ("arm", "guidance_scale", "images")}
        sets = {name: value for name, value in record.items() if name not in (*known, "means", "held_out")}
        return cls(
            **known,
            means={name: Interval(**mean) for name, mean in record["means"].items()},
            held_out=Interval(**record["held_out"]) if record["held_out"] else None,
            sets={name: Interval(**value) if isinstance(value, Mapping) else value for name, value in sets.items()},
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm at one scale against the baseline at one scale, on the same cases."""

    arm: str
    """The arm's name."""
    guidance_scale: float
    """The arm's scale."""
    baseline_guidance_scale: float
    """The baseline's scale."""
    wins: dict[str, Interval]
    """By compared measure, the share of pairs that the arm wins; ties count half."""
    differences: dict[str, Interval]
    """By measure, the mean paired difference, arm minus baseline.

    There are accuracy, the compared measures, precision and recall."""


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """A row, and the rows of the opposing arm that dominate it."""

    arm: str
    """The row's arm."""
    guidance_scale: float
    """The row's scale."""
    opponent: str
    """The opposing arm."""
    dominated_by: list[float]
    """Guidance scales at which the opponent dominates the row."""


@dataclass(frozen=True, kw_only=True)
class RecallGain:
    """What a row gains over plain guidance between its scales; see `intervals.recall_gain`."""

    arm: str
    """The row's arm."""
    guidance_scale: float
    """The row's scale."""
    recall: Interval
    """Recall gained at equal precision."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What an arm gains over plain guidance at all scales that were tried.

    A field is None where the sweep lacks the set measures that the field rests on.
    """

    arm: str
    """The arm's name."""
    gains: list[RecallGain] | None
    """Rows that clearly have more recall at equal precision, and dominate a row of the frontier.

    The frontier is the baseline's. The first condition by itself may hold because of the straight
    lines between scales, the second by itself because of noise where recall is flat."""
    beyond_reach: list[float] | None
    """Scales of clearly more precision than the baseline has anywhere: a trade, not a gain."""
    best: Comparison | None
    """The arm at its best scale against the baseline at its best; best is the lowest distance."""
    unbeaten: list[float] | None
    """Baseline scales that the arm at its best does not clearly beat on any compared measure."""

    @property
    def gain(self) -> bool | None:
        """Whether there is a gain; None where the sweep cannot tell.

        Wins at single scales do not count: stronger guidance brings them too.
        """
        return None if self.gains is None else bool(self.gains)


@dataclass(frozen=True, kw_only=True)
class Results:
    """All numbers of a sweep, and the pictures of its first cases."""

    baseline: str
    """The arm that all others are held against."""
    roles: Roles
    """Which measures the statements rest on."""
    over_real: tuple[str, ...]
    """Set measures whose intervals are over real samples; all other intervals are over prompts."""
    rows: list[Row]
    """Every arm at every scale."""
    comparisons: list[Comparison]
    """Every arm but the baseline at every scale, against the baseline at every scale."""
    recall_gains: list[RecallGain]
    """One for each row of an arm that is not the baseline; empty without precision and recall."""
    cases: list[Case]
    """The first few cases: not picked by hand."""
    pictures: dict[tuple[str, float], torch.Tensor]
    """By (arm, scale), the pictures of `cases`: (N, 3, H, W) float32 in [-1, 1]."""

    @property
    def arms(self) -> list[str]:
        """The arms, in the order of the sweep."""
        return list(dict.fromkeys(row.arm for row in self.rows))

    @property
    def challengers(self) -> list[str]:
        """The arms that are not the baseline."""
        return [arm for arm in self.arms if arm != self.baseline]

    @property
    def has_frontier(self) -> bool:
        """Whether the sweep measured precision and recall."""
        return self.roles.precision is not None

    def of(self, arm: str) -> list[Row]:
        """The arm's rows, in the order of the sweep."""
        return [row for row in self.rows if row.arm == arm]

    def best(self, arm: str) -> Row | None:
        """The arm's row of lowest distance; None where the sweep measured no distance.

        The distance is the one number that weighs quality and variety together.
        """
        distance = self.roles.distance
        return None if distance is None else min(self.of(arm), key=lambda row: row.value(distance))

    def representative(self, arm: str) -> Row:
        """The row that stands for the arm: its best, or without a distance its most accurate."""
        return self.best(arm) or max(self.of(arm), key=lambda row: row.means[self.roles.accuracy].value)

    def comparison(self, arm: str, guidance_scale: float, baseline_guidance_scale: float) -> Comparison:
        """The arm at a scale against the baseline at a scale.

        Raises ValueError where the sweep has no such pair.
        """
        wanted = (arm, guidance_scale, baseline_guidance_scale)
        found = [c for c in self.comparisons if (c.arm, c.guidance_scale, c.baseline_guidance_scale) == wanted]
        if not found:
            raise ValueError(f"comparison: {wanted} was not part of the sweep; ask for an arm and scales that were")
        return found[0]

    def highest(self, arm: str, measure: str) -> Row | None:
        """The arm's row of highest mean `measure` among the accurate ones; None without any."""
        accurate = [row for row in self.of(arm) if row.means[self.roles.accuracy].value >= ACCURATE]
        return max(accurate, key=lambda row: row.means[measure].value, default=None)

    def reach(self, arm: str, measure: str) -> Comparison | None:
        """The arm's highest row in `measure` against the baseline's; None where one has none."""
        ours, theirs = self.highest(arm, measure), self.highest(self.baseline, measure)
        if ours is None or theirs is None:
            return None
        return self.comparison(arm, ours.guidance_scale, theirs.guidance_scale)

    def recall_gains_of(self, arm: str) -> list[RecallGain]:
        """What each of the arm's rows gains in recall at equal precision."""
        return [gain for gain in self.recall_gains if gain.arm == arm]

    def dominates(self, row: Row, other: Row) -> bool:
        """Whether `row` has no less precision and recall than `other`, and more of one."""
        names = (self.roles.precision, self.roles.recall)
        ours, theirs = [row.value(name) for name in names], [other.value(name) for name in names]
        return ours != theirs and all(a >= b for a, b in zip(ours, theirs, strict=True))

    def frontier(self, arm: str) -> list[FrontierPoint]:
        """Which rows of the arm the baseline dominates, and the other way round.

        Empty where the sweep did not measure precision and recall.
        """
        if not self.has_frontier:
            return []
        pairs = [(row, self.baseline) for row in self.of(arm)] + [(row, arm) for row in self.of(self.baseline)]
        return [
            FrontierPoint(
                arm=row.arm,
                guidance_scale=row.guidance_scale,
                opponent=opponent,
                dominated_by=[other.guidance_scale for other in self.of(opponent) if self.dominates(other, row)],
            )
            for row, opponent in pairs
        ]

    def verdict(self, arm: str) -> Verdict:
        """What the arm gains over the baseline at all scales."""
        best, base_best = self.best(arm), self.best(self.baseline)
        comparable = best is not None and base_best is not None
        return Verdict(
            arm=arm,
            gains=self._gains(arm) if self.has_frontier else None,
            beyond_reach=self._beyond_reach(arm) if self.has_frontier else None,
            best=self.comparison(arm, best.guidance_scale, base_best.guidance_scale) if comparable else None,
            unbeaten=self._unbeaten(arm, best.guidance_scale) if comparable else None,
        )

    def _against_baseline(self, arm: str, guidance_scale: float) -> list[Comparison]:
        """The arm at a scale against the baseline at every scale."""
        base = self.of(self.baseline)
        return [self.comparison(arm, guidance_scale, other.guidance_scale) for other in base]

    def _gains(self, arm: str) -> list[RecallGain]:
        base = self.of(self.baseline)
        frontier = [row for row in base if not any(self.dominates(other, row) for other in base)]
        gains = {gain.guidance_scale: gain for gain in self.recall_gains_of(arm)}
        return [
            gains[row.guidance_scale]
            for row in self.of(arm)
            if gains[row.guidance_scale].recall.above(0) and any(self.dominates(row, other) for other in frontier)
        ]

    def _beyond_reach(self, arm: str) -> list[float]:
        return [
            row.guidance_scale
            for row in self.of(arm)
            if all(
                comparison.differences[self.roles.precision].above(0)
                for comparison in self._against_baseline(arm, row.guidance_scale)
            )
        ]

    def _unbeaten(self, arm: str, guidance_scale: float) -> list[float]:
        return [
            comparison.baseline_guidance_scale
            for comparison in self._against_baseline(arm, guidance_scale)
            if not any(win.above(0.5) for win in comparison.wins.values())
        ]
