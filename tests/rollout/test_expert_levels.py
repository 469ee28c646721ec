"""Pairs of one of two experts: their s is uniform in its levels above t, and states without one weigh 0."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from gaussian_mixture import SHAPE, STEPS, config, make_maker, make_rollout
from scipy import stats

from selfnpo_fast.rollout import continuous_frequencies, lockstep_frequencies
from selfnpo_fast.runtime.errors import UserError
from selfnpo_kernels import Draw, NoiseKey, draw_id, normal

BOUNDARY = 583  # between the grid's levels 499 and 599
LEVELS = {"high": range(BOUNDARY, 1000), "low": range(BOUNDARY)}


def flow():
    return FlowMatchEulerDiscreteScheduler(shift=5.0)


def rollout_of(expert: str | None, batch: int = 8, **changes):
    return make_rollout(make_maker(config(**changes), flow(), levels=LEVELS.get(expert)), batch)


def allowed(expert: str, t: int) -> list[int]:
    """The s of an expert above t; where there is none, all above t."""
    own = [s for s in LEVELS[expert] if s > t]
    return own or list(range(t + 1, 1000))


@pytest.mark.parametrize("expert", LEVELS)
def test_each_level_of_the_expert_is_drawn_as_often_as_the_others(expert):
    """Every number that can be drawn stands for one of the levels, and no two for the same."""
    grid = rollout_of(expert).maker.grid
    for row, t in enumerate(grid.timesteps[:-1].tolist()):
        drawn = torch.arange(int(grid.draws_above[row]) + 1, 1000)
        assert grid.level_of(torch.tensor(row - 1), drawn).tolist() == allowed(expert, t)
        assert bool(grid.without_s[row]) == (expert == "low" and t >= BOUNDARY - 1)


@pytest.mark.parametrize("start", ["noise", "data"])
@pytest.mark.parametrize("mode", ["lockstep", "continuous"])
@pytest.mark.parametrize("expert", LEVELS)
def test_s_is_uniform_in_the_levels_of_the_expert(expert, mode, start):
    """Kolmogorov and Smirnov on the place of s among what is allowed, 6,400 pairs."""
    rollout, places, weighing = rollout_of(expert, 200, mode=mode, start=start), [], 0.0
    grid = rollout.maker.grid
    for _ in range(32):
        pairs = rollout.next_pairs()
        index = torch.searchsorted(grid.timesteps, pairs.t) - 1
        assert torch.equal(rollout.maker.draw_s(pairs.sample_ids, index), pairs.s)
        for t, s, weight in zip(pairs.t.tolist(), pairs.s.tolist(), pairs.weight.tolist(), strict=True):
            levels = allowed(expert, t)
            assert (weight > 0) == (s in LEVELS[expert])
            places.append((levels.index(s) + 0.5) / len(levels))
        weighing += float(pairs.weight.mean())
    assert stats.kstest(places, "uniform").pvalue > 1e-3
    assert abs(weighing / 32 - 1) < 0.1
    frequencies = (lockstep_frequencies if mode == "lockstep" else continuous_frequencies)(rollout.maker.config)
    expected = frequencies[grid.timesteps >= BOUNDARY - 1].sum().item() if expert == "low" else 0.0
    assert abs(rollout.maker.share_without_s - expected) < 1e-9


def test_pairs_of_the_expert_are_those_of_any_run_but_for_s():
    """States, targets, prompts and the noise of Eq. 16 are the same; x_s has the level that s says."""
    for mode in ("lockstep", "continuous"):
        plain, own = rollout_of(None, mode=mode), rollout_of("high", mode=mode)
        own.fill()
        for call in range(20):
            index = own.index[call % 3].clone() if mode == "continuous" else None
            x_t = own.x[call % 3].clone() if mode == "continuous" else None
            before, after = plain.next_pairs(), own.next_pairs()
            for name in ("t", "target", "rows", "sample_ids", "weight"):
                assert torch.equal(getattr(before, name), getattr(after, name)), name
            if mode == "lockstep":
                continue
            ended = (index == STEPS - 1).view(-1, 1, 1, 1)
            x_t = torch.where(ended, after.target, x_t).double()
            sigma_t, sigma_s = (own.maker.grid.schedule.sigma[level] for level in (after.t, after.s))
            ratio = (1 - sigma_s) / (1 - sigma_t)
            added = (sigma_s.square() - (ratio * sigma_t).square()).sqrt()
            at = torch.searchsorted(own.maker.grid.timesteps, after.t) - 1
            noise = normal(NoiseKey(3, after.sample_ids, draw_id(Draw.RENOISE, at)), SHAPE)
            r, c = (value.view(-1, 1, 1, 1) for value in (ratio, added))
            torch.testing.assert_close(after.x_s.double(), r * x_t + c * noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1 / 5, 4.0])
def test_a_shift_moves_s_within_the_levels_of_the_expert(shift):
    """The share of levels up to s has the distribution of f(u) given that it is one of the expert's."""
    for expert, levels in LEVELS.items():
        grid = rollout_of(expert, s_shift=shift).maker.grid
        for row in (0, 3):
            drawn = torch.arange(int(grid.draws_above[row]) + 1, 1000)
            s = grid.level_of(torch.tensor(row - 1), drawn)
            first, last = allowed(expert, int(grid.timesteps[row]))[0], levels.stop - 1
            assert (s.diff() >= 0).all() and s[0] >= first and s[-1] <= last
            u = (s.double() + 0.5) / 1000
            u = u / (shift - (shift - 1) * u)  # the inverse of f
            low, high = (x / (shift - (shift - 1) * x) for x in (first / 1000, (last + 1) / 1000))
            part = (torch.arange(len(s), dtype=torch.float64) + 0.5) / len(s)
            width = 2 * max(shift, 1 / shift) / 1000 / (high - low)
            torch.testing.assert_close((u - low) / (high - low), part, rtol=0, atol=width)


def test_rollouts_that_give_the_expert_nothing_are_refused():
    """Of full simulations that stop after two steps all states are above the low expert's levels."""
    with pytest.raises(UserError, match=r"^model\.expert: low learns nothing of these rollouts"):
        rollout_of("low", mode="lockstep", k=2, stop="fixed")
