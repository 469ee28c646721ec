"""A sweep of guidance scales over several arms, on paired prompts and seeds.

A negative changes how strong a guidance scale acts, so no arm is judged at one scale: each of its
rows is held against the baseline at every scale. The sweep knows neither how pictures are made
(`Generate`) nor how they are measured (`measures.Measures`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.scoring.intervals import Interval, mean_interval, paired_difference, recall_gain, win_rate_interval
from selfnpo_fast.scoring.measures import Measures, Roles, Terms
from selfnpo_fast.scoring.results import Case, Comparison, RecallGain, Results, Row


class Generate(Protocol):
    """Makes pictures: float32 (N, 3, H, W) in [-1, 1], the same ones for the same arguments."""

    def __call__(self, arm: str, guidance_scale: float, prompts: list[str], seeds: list[int]) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What the measures say of one row's pictures; intervals are drawn from it."""

    scores: dict[str, torch.Tensor]
    """By picture measure: (N,)."""
    sets: dict[str, float | Terms]
    """By set measure."""


_RowKey = tuple[str, float]
"""(arm, guidance scale)."""


def evaluate(
    generate: Generate,
    cases: Sequence[Case],
    arms: Sequence[str],
    guidance_scales: Sequence[float],
    measures: Measures,
    *,
    baseline: str = "base",
    batch_size: int = 64,
    keep: int = 12,
    on_row: Callable[[Row], None] | None = None,
) -> Results:
    """Makes and measures the pictures of all cases in every arm at every scale.

    `keep` is the number of first cases whose pictures the results keep. `on_row` is called as each
    row is done. Raises UserError where the arguments make no sweep (`check_sweep`), ValueError
    where `generate` or a measure returns what it must not.
    """
    check_sweep(cases, arms, guidance_scales, baseline, measures)
    rows: list[Row] = []
    measured: dict[_RowKey, _Measured] = {}
    pictures: dict[_RowKey, torch.Tensor] = {}
    prompts = [case.prompt for case in cases]
    # One row after the other: only scores, terms and the first pictures of a row are kept.
    for arm in arms:
        for scale in guidance_scales:
            images = _generate(generate, arm, scale, cases, batch_size)
            found = _Measured(scores=measures.score(images, prompts), sets=measures.compare(images))
            rows.append(_row(arm, scale, found, cases, measures.roles))
            measured[arm, scale], pictures[arm, scale] = found, images[:keep].clone()
            if on_row is not None:
                on_row(rows[-1])
    # Every row of every other arm is held against every row of the baseline.
    challengers = [key for key in measured if key[0] != baseline]
    groups, roles = np.array(prompts), measures.roles
    return Results(
        baseline=baseline,
        roles=roles,
        over_real=_over_real(next(iter(measured.values()))),
        rows=rows,
        comparisons=[
            _compare(key, (baseline, scale), measured, groups, roles)
            for key in challengers
            for scale in guidance_scales
        ],
        recall_gains=[
            _recall_gain(key, baseline, measured, groups, roles) for key in challengers if roles.precision is not None
        ],
        cases=list(cases[:keep]),
        pictures=pictures,
    )


def check_sweep(
    cases: Sequence[Case],
    arms: Sequence[str],
    guidance_scales: Sequence[float],
    baseline: str,
    measures: Measures,
) -> None:
    """Raises UserError where the arguments make no sweep; called before any picture is drawn."""
    if baseline not in arms:
        raise UserError(f"arms: {list(arms)} lack the baseline {baseline!r}; every arm is held against it")
    if len(set(arms)) != len(arms):
        raise UserError(f"arms: {list(arms)} repeat; name each arm once")
    if not guidance_scales or len(set(guidance_scales)) != len(guidance_scales):
        raise UserError(f"guidance_scales: {list(guidance_scales)} is not possible; give at least one, each once")
    if len({case.prompt for case in cases}) < 2 or len(cases) < measures.least_images:
        most_refused = max(1, measures.least_images - 1)
        raise UserError(f"cases: {len(cases)} are too few; give more than {most_refused}, of at least 2 prompts")


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


def _row(arm: str, scale: float, found: _Measured, cases: Sequence[Case], roles: Roles) -> Row:
    """One arm at one scale with its intervals."""
    prompts = np.array([case.prompt for case in cases])
    held_out = np.array([case.held_out for case in cases])
    accuracy = found.scores[roles.accuracy].numpy()
    enough = len(set(prompts[held_out])) >= 2
    return Row(
        arm=arm,
        guidance_scale=scale,
        images=len(cases),
        means={name: mean_interval(values, prompts) for name, values in found.scores.items()},
        held_out=mean_interval(accuracy[held_out], prompts[held_out]) if enough else None,
        sets={name: _with_interval(value, prompts) for name, value in found.sets.items()},
    )


def _with_interval(value: float | Terms, prompts: np.ndarray) -> float | Interval:
    """A set measure's value for a row: with an interval where there are terms."""
    if not isinstance(value, Terms):
        return float(value)
    # Real samples have no prompt.
    return mean_interval(value.values, prompts if value.side == "generated" else None)


def _over_real(found: _Measured) -> tuple[str, ...]:
    """Names of the set measures that gave terms of real samples."""
    return tuple(name for name, value in found.sets.items() if isinstance(value, Terms) and value.side == "real")


def _compare(
    key: _RowKey, base: _RowKey, measured: dict[_RowKey, _Measured], prompts: np.ndarray, roles: Roles
) -> Comparison:
    """One arm at one scale against the baseline at one scale.

    `prompts` (N,) are those of the pictures.
    """
    ours, theirs = measured[key], measured[base]
    differences = {
        name: paired_difference(ours.scores[name], theirs.scores[name], prompts)
        for name in dict.fromkeys((roles.accuracy, *roles.compared))
    }
    if roles.precision is not None:
        for name, groups in ((roles.precision, prompts), (roles.recall, None)):
            differences[name] = paired_difference(ours.sets[name].values, theirs.sets[name].values, groups)
    return Comparison(
        arm=key[0],
        guidance_scale=key[1],
        baseline_guidance_scale=base[1],
        wins={name: win_rate_interval(ours.scores[name], theirs.scores[name], prompts) for name in roles.compared},
        differences=differences,
    )


def _recall_gain(
    key: _RowKey, baseline: str, measured: dict[_RowKey, _Measured], prompts: np.ndarray, roles: Roles
) -> RecallGain:
    """What one row gains over the baseline's rows; `prompts` (N,) are those of the pictures."""
    ours = measured[key].sets
    base = [measured[other].sets for other in sorted(measured) if other[0] == baseline]
    gain = recall_gain(
        ours[roles.precision].values,
        ours[roles.recall].values,
        [sets[roles.precision].values for sets in base],
        [sets[roles.recall].values for sets in base],
        prompts,
    )
    return RecallGain(arm=key[0], guidance_scale=key[1], recall=gain)
