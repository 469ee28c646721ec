"""`tdft_step` against rollouts computed sample by sample (lives.py)."""

from __future__ import annotations

from dataclasses import replace

import cases
import exact
import lives
import numpy as np
import pytest
import torch
from cases import F32, F64, SEED, draw, wide
from hypothesis import given, settings
from hypothesis import strategies as st

from selfnpo_kernels import Draw, NoiseKey, backends, draw_id, normal, tdft_step

STARTS = ("noise", "data")


def some_slots(world: lives.World, batch: int, first: int, on: str) -> torch.Tensor:
    """(4, B): every grid index with every way to go on; a third of the samples are at their end."""
    lane = torch.arange(batch)
    low = -1 if world.latents is not None else 0
    top = world.top - (world.latents is not None)
    index = low + lane % (top - low + 1)
    left = torch.where(lane % 3 == 1, 0, 1 + lane % 2)
    ids = first + lane * 5
    rows = torch.tensor([world.prompt_index(int(i)) + 1 for i in ids])
    return torch.stack([index, ids, left, rows]).to(on)


def call(world: lives.World, pos, neg, x, final, slots):
    """(results of the op, next slots), written into poisoned memory.

    The op must not change the slots that it reads.
    """
    following, kept = torch.full_like(slots, -(2**62)), slots.clone()
    out = tdft_step(pos, neg, x, final, slots, following, world.tables, world.rules, world.latents)
    assert torch.equal(slots, kept)
    return out, following


def told_slots(world: lives.World, x, final, slots, chosen) -> dict[int, lives.Slot]:
    """The slots of the numbers `chosen`, as lives.py holds them."""
    table = slots.tolist()

    def exactly(state: torch.Tensor | None, i: int):
        return None if state is None else (wide(state[i]), np.abs(wide(state[i])))

    return {i: lives.Slot(*(table[j][i] for j in range(3)), exactly(x, i), exactly(final, i)) for i in chosen}


def check(op, backend, mixture, world, told: dict[int, lives.Slot], pos, neg, x, final, out, following) -> None:
    """Results, states and tables of the slots in `told` are those of lives.py."""
    target, x_s, pairs, weight = out
    arrays = [None if a is None else wide(a) for a in (pos, neg)]
    for i, slot in told.items():
        pair = lives.advance(world, slot, *(None if a is None else a[i] for a in arrays))
        assert pairs[:, i].tolist() == pair.numbers
        assert weight[i].item() == pair.weight
        next_row = world.prompt_index(slot.sample) + 1
        assert following[:, i].tolist() == [slot.index, slot.sample, slot.left, next_row]
        expected = [(target, pair.target), (x_s, pair.x_s), (x, slot.x)] + [(final, slot.final)] * (final is not None)
        for tensor, terms in expected:
            cases.assert_rounded(op, backend, mixture, tensor[i], *terms)


@cases.over_grid(start=STARTS)
def test_one_step(backend, mixture, shape, start):
    """With both branches and Eq. 16, and with one and Eq. 15; ids beyond 2^32."""
    on = cases.device(backend)
    options = {"steps": 4, "start": start, "on": on, "latent_dtype": mixture.network}
    chosen = sorted({*range(0, shape[0], 1 + shape[0] // 20), shape[0] - 1})
    for branches, rules in (("both", {}), ("neg", {"naive": True, "shuffled": True, "dropout": 0.5})):
        world = lives.make_world(SEED, shape, w=2.5, **options, **rules)
        x, final = draw(1, shape, shape, dtype=mixture.state, on=on)
        pos, neg = draw(2, shape, shape, dtype=mixture.network, on=on)
        pos, final = pos if branches == "both" else None, final if start == "noise" else None
        slots = some_slots(world, shape[0], 2**33 + 7, on)
        told = told_slots(world, x, final, slots, chosen)
        kept, address = [x.clone(), final], x.data_ptr()
        if final is not None:
            kept[1] = final.clone()
        out, following = call(world, pos, neg, x, final, slots)
        assert [t.dtype for t in out] == [mixture.state, mixture.state, torch.int64, F32]
        assert x.data_ptr() == address
        assert out[0].data_ptr() != out[1].data_ptr() != address
        check("tdft_step", backend, mixture, world, told, pos, neg, x, final, out, following)
        if final is not None:  # it stays the same where no sample has ended
            going = slots[2] != 0
            assert torch.equal(final[going], kept[1][going])


RUNS = {  # start, grid steps, w, batch, rules
    "no-guidance": ("noise", 4, 0.0, 5, {}),
    "empty-prompt-only": ("noise", 4, -1.0, 6, {"shuffled": True}),
    "guided": ("noise", 5, -3.0, 5, {"dropout": 0.3}),
    "naive": ("noise", 4, -3.0, 3, {"naive": True, "dropout": 0.3, "shuffled": True}),
    "one-step": ("noise", 1, -3.0, 4, {"dropout": 0.5}),
    "one-step-naive": ("noise", 1, -1.0, 4, {"naive": True}),
    "data": ("data", 5, -1.0, 5, {"max_steps": 2, "dropout": 0.3}),
    "data-guided": ("data", 5, -3.0, 7, {"max_steps": 5, "shuffled": True}),
    "data-naive": ("data", 4, 0.0, 3, {"naive": True, "max_steps": 1}),
    "data-two-steps": ("data", 2, -3.0, 4, {"max_steps": 9, "num_prompts": 1}),
}


QUICK = ("guided", "naive", "one-step-naive", "data")


@pytest.mark.parametrize(("backend", "name"), cases.some_slow(RUNS, QUICK), indirect=["backend"])
def test_whole_runs(backend, name):
    """Several samples of every slot, in two tables by turns, while lives.py goes on in float64."""
    start, steps, w, batch, rules = RUNS[name]
    on, shape = cases.device(backend), (batch, 2, 3, 3)
    world = lives.make_world(SEED - 1, shape, steps=steps, w=w, start=start, on=on, **({"stride": batch} | rules))
    x, final = draw(3, shape, shape, on=on)
    final = final if start == "noise" else None
    slots = some_slots(world, batch, 0 if start == "data" else 50, on)
    slots[1] = slots[1, 0] + torch.arange(batch, device=on)  # a slot's samples are `stride` ids apart
    slots[2] = slots[0] if start == "noise" else torch.minimum(slots[2], slots[0] + 1)
    told, seen = told_slots(world, x, final, slots, range(batch)), set()
    for _ in range(3 * steps + 2):
        shift = 0.1 * slots[0].view(-1, 1, 1, 1)
        pos, neg = torch.tanh(x + shift), torch.tanh(x - shift)
        pos, neg = (None if w == -1 else pos), (None if w == 0 else neg)
        out, slots = call(world, pos, neg, x, final, slots)
        check("tdft_step run", backend, cases.FLOAT32, world, told, pos, neg, x, final, out, slots)
        facts = list(zip(*out[2][[2, 0]].tolist(), strict=True))
        assert seen.isdisjoint(facts), "a state gives one pair only"
        seen.update(facts)
        t, s = out[2][0], out[2][1]
        assert (t < s).all()
        assert (s < 30).all()
    lifetimes = {slot.sample // batch for slot in told.values()}
    assert min(lifetimes) >= 3 or start == "data"


SEEDS = (0, -1, 2**32, 2**63 - 1, -(2**63), 2**63 + 5)


@pytest.mark.parametrize(("backend", "seed"), cases.some_slow(SEEDS, (-1, 2**63 - 1)), indirect=["backend"])
@pytest.mark.parametrize("start", STARTS)
def test_integers(backend, start, seed):
    """t, s, ids, prompts, dropout and start index, for any seeds, ids and numbers of prompts."""
    on, shape = cases.device(backend), (8, 1)
    for num_prompts, first in ((1, 2**62), (2, 3), (1000, 2**40), (1024, 2**32 - 20)):
        # The op is given the seed's 64 bits; the second order of prompts belongs to seed + 1.
        rules = {"num_prompts": num_prompts, "dropout": 0.5, "shuffled": True, "stride": 2**31 - 1}
        world = lives.make_world(1, shape, steps=4, w=0.0, start=start, on=on, **rules)
        world.rules = replace(world.rules, seed=seed)
        x, final, pos = draw(4, shape, shape, shape, on=on)
        final = final if start == "noise" else None
        slots = some_slots(world, 8, first, on)
        slots[2] = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
        told = told_slots(world, x, final, slots, range(8))
        out, following = call(world, pos, None, x, final, slots)
        check("tdft_step", backend, cases.FLOAT32, world, told, pos, None, x, final, out, following)


def test_ids_below_the_stride(backend):
    """The samples before the first of a run have negative ids, and prompts like all others."""
    on, shape = cases.device(backend), (4, 6)
    world = lives.make_world(2, shape, steps=3, w=0.0, start="noise", on=on, stride=4, num_prompts=3)
    x, final, pos = draw(5, shape, shape, shape, on=on)
    slots = some_slots(world, 4, 0, on)
    slots[0] = world.top
    slots[1] = torch.arange(4)
    told = told_slots(world, x, final, slots, range(4))
    out, following = call(world, pos, None, x, final, slots)
    assert out[2][2].tolist() == [-4, -3, -2, -1]
    check("tdft_step", backend, cases.FLOAT32, world, told, pos, None, x, final, out, following)


def test_a_reseeded_slot_restarts(backend):
    """From noise the state is the new sample's start noise; from data, its noised latent."""
    on, shape = cases.device(backend), (5, 3, 7)
    for start in STARTS:
        world = lives.make_world(SEED, shape, steps=3, w=0.0, start=start, on=on, stride=5)
        x, pos = draw(6, shape, shape, on=on)
        final = torch.zeros_like(x) if start == "noise" else None
        slots = some_slots(world, 5, 100, on)
        slots[2] = 0
        _, following = call(world, pos, None, x, final, slots)
        assert torch.equal(following[1], slots[1] + 5)
        noise = normal(NoiseKey(SEED, following[1], draw_id(Draw.START_NOISE)), shape[1:])
        if start == "noise":
            torch.testing.assert_close(x, noise, rtol=0, atol=1e-6)
            assert (following[0] == world.top).all()
            continue
        signal, disturbance = world.tables.start[following[0] + 1].view(5, 2, 1, 1).unbind(1)
        expected = signal * world.latents[following[3] - 1] + disturbance * noise
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


def test_slots_noise_is_independent(backend):
    """The noise of Eq. 16 without a signal, in neighbouring slots, samples and grid indices."""
    on, shape = cases.device(backend), (6, 2**10 if cases.interpreted(backend) else 2**14)
    world = lives.make_world(SEED, shape, steps=4, w=0.0, start="noise", on=on, stride=1)
    world.tables.renoise[:] = torch.tensor([0.0, 1.0], device=on)
    zeros, drawn = torch.zeros(shape, device=on), []
    slots = torch.tensor([[0, 1, 2, 0, 1, 2], [7, 7, 7, 8, 8, 9], [1] * 6, [1] * 6], device=on)
    for _ in range(2):
        x = zeros.clone()
        out, _ = call(world, zeros, None, x, zeros.clone(), slots)
        drawn.append(out[1])
        slots = slots + torch.tensor([[0], [1000], [0], [0]], device=on)
    rows = torch.cat(drawn).double().cpu()
    assert rows.std(1).sub(1).abs().max() < 5 / (2 * shape[1]) ** 0.5
    correlations = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlations.abs().max() < 5 / shape[1] ** 0.5


def test_dropout(backend):
    """Dropout 0 drops no prompt, and dropout 1 every prompt.

    A prompt whose uniform is 0.7 in float32 is not dropped at dropout 0.7.
    """
    on, shape = cases.device(backend), (6, 3)
    x, pos = draw(7, shape, shape, on=on)
    for dropout, dropped in ((0.0, 0), (1.0, 6)):
        world = lives.make_world(3, shape, steps=3, w=0.0, start="noise", on=on, dropout=dropout)
        out, _ = call(world, pos, None, x.clone(), x.clone(), some_slots(world, 6, 40, on))
        assert (out[2][3] == 0).sum() == dropped
    sample = 19_964_955  # found by search
    assert exact.uniform(0, sample, exact.draw_id(Draw.PROMPT_DROPOUT, 0)) == float(np.float32(0.7)) < 0.7
    world = lives.make_world(0, (1, 3), steps=3, w=0.0, start="noise", on=on, dropout=0.7)
    slots = torch.tensor([[0], [sample], [1], [1]], device=on)
    out, _ = call(world, pos[:1], None, x[:1].clone(), x[:1].clone(), slots)
    assert out[2][3].item() != 0


def test_float64():
    shape = (5, 2, 3)
    for start in STARTS:
        world = lives.make_world(SEED, shape, steps=4, w=-3.0, start=start, latent_dtype=F64, dropout=0.5)
        x, final, pos, neg = draw(8, shape, shape, shape, shape, dtype=F64)
        final = final if start == "noise" else None
        slots = some_slots(world, 5, 60, "cpu")
        told = told_slots(world, x, final, slots, range(5))
        out, following = call(world, pos, neg, x, final, slots)
        check("tdft_step", "reference", cases.FLOAT64, world, told, pos, neg, x, final, out, following)


@pytest.mark.parametrize("name", ["reference", "cpp"])
@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple),
    seed=st.integers(-(2**63), 2**63 - 1),
    mixture=st.sampled_from(cases.EVERY_MIXTURE),
    steps=st.integers(2, 9),
    start=st.sampled_from(STARTS),
    first=st.integers(2**31, 2**62),
    num_prompts=st.integers(1, 2**20),
    rules=st.fixed_dictionaries(
        {
            "naive": st.booleans(),
            "shuffled": st.booleans(),
            "dropout": st.floats(0, 1),
            "max_steps": st.integers(1, 9),
            "stride": st.integers(1, 2**31 - 1),
        }
    ),
)
def test_any_step(name, shape, seed, mixture, steps, start, first, num_prompts, rules):
    num_prompts = num_prompts if start == "noise" else 1 + num_prompts % 5
    options = {"latent_dtype": mixture.network, "num_prompts": num_prompts, **rules}
    world = lives.make_world(5, shape, steps=steps, w=-2.0, start=start, **options)
    world.rules = replace(world.rules, seed=seed)
    x, final = draw(9, shape, shape, dtype=mixture.state)
    pos, neg = draw(10, shape, shape, dtype=mixture.network)
    final = final if start == "noise" else None
    slots = some_slots(world, shape[0], first, "cpu")
    told = told_slots(world, x, final, slots, range(shape[0]))
    with backends.use(name):
        out, following = call(world, pos, neg, x, final, slots)
    check("tdft_step", name, mixture, world, told, pos, neg, x, final, out, following)


@pytest.mark.parametrize("start", STARTS)
def test_the_same_call_twice_is_the_same(backend, start):
    on, shape = cases.device(backend), cases.large(backend)
    world = lives.make_world(SEED, shape, steps=4, w=2.0, start=start, on=on)
    x, final, pos, neg = draw(11, shape, shape, shape, shape, on=on)
    slots = some_slots(world, shape[0], 60, on)

    def once() -> tuple[torch.Tensor, ...]:
        state, end = x.clone(), final.clone() if start == "noise" else None
        out, following = call(world, pos, neg, state, end, slots)
        return *out, following, state, state if end is None else end

    cases.assert_repeatable(once)
