"""How slots are filled: in forwards of one size, with about as many rows as there are steps."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rollout import CPU, SHAPE, TABLE, Run, config, network, scheduler

from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.rollout import ContinuousRollout, Grid, GuidedPredictor, walk
from selfnpo_fast.rollout.continuous import fill_width
from selfnpo_fast.rollout.lockstep import Turns


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.integers(0, 9), min_size=1, max_size=12), width=st.integers(1, 12))
def test_packed_turns_take_every_step_once_and_in_order(steps, width):
    """In as few forwards as there can be: a sample is in one row of a forward at most."""
    width = min(width, len(steps))
    turns = Turns.packed(torch.tensor(steps), width)
    assert turns.sizes == [width] * max(max(steps), math.ceil(sum(steps) / width))
    taken, real = Counter(), 0
    rows = zip(turns.sample.split(turns.sizes), turns.taken.split(turns.sizes), strict=True)
    for sample, before in rows:
        assert len(set(sample.tolist())) == width, "no state is written twice"
        for one, step in zip(sample.tolist(), before.tolist(), strict=True):
            if one < len(steps):
                assert step == taken[one]
                taken[one] += 1
                real += 1
    assert [taken[sample] for sample in range(len(steps))] == steps
    assert real == sum(steps)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("w", [-1.0, -3.0])
def test_the_size_of_a_forward_changes_no_bit(width, w):
    """Of a network whose rows do not depend on the batch. A sample that has arrived stays."""
    predictor = GuidedPredictor(network, TABLE, w, "batched")
    grid = Grid.build(Levels.of(scheduler()), 10, CPU, omega=w)
    x, rows = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 2, 3, 4, 5])
    index, stop = torch.tensor([9, 3, 5, 9, 0]), torch.tensor([-1, 3, 2, 8, -1])
    kept = x.clone()
    found = walk(predictor, grid, x, index, stop, rows, width)
    assert torch.equal(x, kept)
    alone = [walk(predictor, grid, *(part[i : i + 1] for part in (x, index, stop, rows))) for i in range(5)]
    assert torch.equal(found, torch.cat(alone))
    assert torch.equal(found, walk(predictor, grid, x, index, stop, rows))


def watched(run: Run, branches: str = "auto") -> tuple[ContinuousRollout, set[int]]:
    """A rollout, and the sizes of the batches that its network is given."""
    rollout, seen = run.make(), set()

    def predict(x, t, cond):
        seen.add(len(x))
        return network(x, t, cond)

    old = rollout.maker.predictor
    rollout.maker.predictor = GuidedPredictor(predict, TABLE, old.omega, branches)
    rollout.maker.predictor.full_batch = old.full_batch
    return rollout, seen


# Rows that the network is given, of batches of b and fills of c samples.
SIZES = {
    (-1.0, "auto"): lambda b, c: {c, b},
    (0.0, "auto"): lambda b, c: {c, b},
    (-3.0, "batched"): lambda b, c: {2 * c, 2 * b},
    (-3.0, "split"): lambda b, c: {c, b},
    (-3.0, "auto"): lambda b, c: {2 * c, b, 2 * b},
}


@pytest.mark.parametrize("start", ["noise", "data"])
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize(("w", "branches"), SIZES)
def test_a_network_sees_two_or_three_sizes_of_batch(w, branches, batch, start):
    for steps, pool, world_size in ((10, 1, 1), (25, 3, 1), (5, 2, 2)):
        setting = config(omega=w, start=start, grid_steps=steps, k=4 if start == "data" else steps)
        rollout, seen = watched(Run(setting, batch=batch, pool=pool, world_size=world_size), branches)
        for _ in range(pool + 8):
            rollout.next_pairs()
        assert seen <= SIZES[w, branches](batch, fill_width(batch))


@pytest.mark.parametrize("turns", [1, 2])
def test_a_run_that_goes_on_sees_the_same_sizes(turns):
    run = Run(config(omega=-1.0), batch=6, pool=3)
    first, seen = watched(run)
    for _ in range(turns):
        first.next_pairs()
    second, seen_later = watched(run)
    second.load_state_dict(first.state_dict())
    for _ in range(6):
        second.next_pairs()
    assert seen == seen_later == {3, 6}


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_forwards_are_counted_in_closed_form(batch):
    run = Run(config(omega=-3.0), batch=batch, pool=4)
    rollout = run.make()
    rollout.fill()
    rows = 0
    for index in rollout.index.tolist():
        # A slot at the start of a sample needs the end of the sample before.
        steps = [10 if i == 9 else 9 - i for i in index]
        width = math.ceil(batch / 2)
        rows += width * max(*steps, math.ceil(sum(steps) / width))
    assert rollout.maker.predictor.forwards == 2 * rows


@pytest.mark.parametrize(("start", "most"), [("noise", 1.12 * 5.5), ("data", 3.5)])
def test_hardly_a_row_is_thrown_away(start, most):
    """A slot needs (N + 1) / 2 = 5.5 steps in the mean from noise, and at most 5 from data."""
    rollout = Run(config(omega=-1.0, start=start, k=10 if start == "noise" else 5), batch=40, pool=5).make()
    rollout.fill()
    assert rollout.maker.predictor.forwards <= most * 200
    if start == "noise":
        needed = torch.where(rollout.index == 9, 10, 9 - rollout.index).sum().item()
        assert needed <= rollout.maker.predictor.forwards <= 1.05 * needed
