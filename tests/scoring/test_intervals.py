"""Bootstrap intervals against scipy's, against theory, and under clustering."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from selfnpo_fast.scoring.intervals import (
    Interval,
    mean_interval,
    paired_difference,
    recall_gain,
    win_rate_interval,
)

finite = st.floats(-1e3, 1e3)


def sample(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).exponential(size=n)


def test_agrees_with_scipy():
    values = sample(300)
    ours = mean_interval(values)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    spread = theirs.high - theirs.low
    assert ours.value == values.mean()
    # The Monte Carlo error of a 2.5% quantile from 2,000 draws is about 2.5% of the spread; observed
    # 1%.
    assert ours.low == pytest.approx(theirs.low, abs=0.06 * spread)
    assert ours.high == pytest.approx(theirs.high, abs=0.06 * spread)


def test_clustered_prompts_widen_the_interval_as_theory_says():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), 4)
    # Four equal pictures per prompt hold no more information than one.
    values = rng.normal(size=200)[groups]
    spread = [interval.high - interval.low for interval in (mean_interval(values, groups), mean_interval(values))]
    assert spread[0] / spread[1] == pytest.approx(2, rel=0.1)


def test_groups_of_unequal_size_weigh_by_their_pictures():
    values, groups = np.array([1.0, 1, 1, 0]), np.array(["a", "a", "a", "b"])
    interval = mean_interval(values, groups)
    assert interval.value == 0.75
    assert (interval.low, interval.high) == (0, 1)


def test_coverage_is_near_95_percent():
    hits = 0
    for seed in range(400):
        interval = mean_interval(np.random.default_rng(seed).normal(size=60))
        hits += interval.low <= 0 <= interval.high
    # The binomial standard deviation of 400 trials at 95% is 4.4; the percentile bootstrap itself
    # falls short by about 1%.
    assert 0.91 <= hits / 400 <= 0.98


@given(st.lists(finite, min_size=2, max_size=30), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_interval_holds_its_mean_within_the_range_of_values(values, seed):
    interval = mean_interval(values, seed=seed)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= interval.low <= interval.high <= max(values) + slack
    assert interval == mean_interval(values, seed=seed)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=30))
def test_win_rate_counts_ties_half(pairs):
    a, b = zip(*pairs, strict=True)
    points = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x, y in pairs)
    assert win_rate_interval(a, b).value == pytest.approx(points / len(pairs))
    assert win_rate_interval(a, b).value + win_rate_interval(b, a).value == pytest.approx(1)


def test_win_rate_interval_separates_a_real_difference_only():
    a, b = sample(500, 0), sample(500, 1)
    nothing, something = win_rate_interval(a, b), win_rate_interval(a + 0.5, b)
    assert nothing.low < 0.5 < nothing.high
    assert something.above(0.5)
    assert not something.below(0.5)
    assert something.value == np.mean(a + 0.5 > b)


def test_pairing_narrows_the_difference():
    a = sample(300)
    b = a + 0.01 * np.random.default_rng(3).normal(size=300) - 0.01
    assert paired_difference(a, b).above(0)
    assert paired_difference(a, a) == Interval(0.0, 0.0, 0.0)


def test_takes_boolean_tensors():
    right = torch.tensor([True, False, True, True])
    assert mean_interval(right).value == 0.75
    assert paired_difference(right, ~right).value == 0.5


def terms(share: float, n: int = 1000) -> np.ndarray:
    """(n,) of zeros and ones with the given mean."""
    return (np.arange(n) < round(share * n)).astype(float)


@pytest.mark.parametrize(
    ("precision", "recall", "gain"),
    [
        (0.7, 0.9, 0.05),  # halfway along the first line, where recall is .85
        (0.8, 0.8, 0.0),  # on a point of the base
        (0.5, 0.85, -0.05),  # below all of the base: its highest recall has more precision
        (0.85, 0.55, -0.05),  # halfway along the second line, where recall is .6
        (0.95, 0.5, 0.1),  # beyond its highest precision: against that point
    ],
)
def test_recall_gain_is_measured_from_the_lines_of_the_base(precision, recall, gain):
    base_precision = [terms(0.6), terms(0.8), terms(0.9)]
    base_recall = [terms(0.9), terms(0.8), terms(0.4)]
    found = recall_gain(terms(precision), terms(recall), base_precision, base_recall)
    assert found.value == pytest.approx(gain, abs=1e-12)
    assert found.low <= found.value + 1e-12


def test_recall_gain_knows_the_noise_of_both_axes():
    # A thousandth more recall than a flat base is nothing; a tenth is something.
    base_precision, base_recall = [terms(0.6, 96), terms(0.9, 96)], [terms(0.5), terms(0.5)]
    flat = np.roll(terms(0.501), 250)
    assert not recall_gain(terms(0.7, 96), flat, base_precision, base_recall).above(0)
    assert recall_gain(terms(0.7, 96), terms(0.6), base_precision, base_recall).above(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), r"values: shape \(0,\)"),
        (lambda: mean_interval([1.0, np.nan]), "values: some values are not finite"),
        (lambda: mean_interval([1.0, 2.0], ["a", "a"]), "groups: 1 of them give no interval"),
        (lambda: mean_interval([1.0, 2.0], ["a"]), "groups: 1 of them for 2 values"),
        (lambda: win_rate_interval([1.0], [1.0, 2.0]), "a, b: 1 and 2 values are not paired"),
    ],
)
def test_impossible_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
