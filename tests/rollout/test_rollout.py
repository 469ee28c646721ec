"""The rollout engine against diffusers' DDIM trajectories and counted frequencies."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import tiny
import torch
from diffusers import DDIMScheduler

from selfnpo_fast.config import RolloutConfig
from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.rollout import (
    ContinuousRollout,
    Grid,
    GuidedPredictor,
    LockstepRollout,
    PairMaker,
    continuous_frequencies,
    lockstep_frequencies,
)
from selfnpo_fast.runtime.batch_or_split import BatchOrSplit
from selfnpo_kernels import Draw, NoiseKey, draw_id, normal, randint

CPU = torch.device("cpu")
SHAPE = (2, 3, 3)
PROMPTS = 5


def scheduler() -> DDIMScheduler:
    return tiny.scheduler(timestep_spacing="trailing")


def network(x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
    """Smooth in the state, different for every timestep and prompt."""
    shift = cond["rows"].view(-1, 1, 1, 1)
    return torch.tanh(x + 0.3 * shift + t.view(-1, 1, 1, 1) / 1000)


TABLE = ConditioningTable.build({"rows": torch.zeros(1, 1)}, {"rows": torch.arange(1.0, PROMPTS + 1)[:, None]})


@dataclass
class Run:
    config: RolloutConfig
    seed: int = 3
    dropout: float = 0.0
    batch: int = 6
    pool: int = 2
    rank: int = 0
    world_size: int = 1
    num_prompts: int = PROMPTS

    def make(self):
        grid = Grid.build(
            Levels.of(scheduler()),
            self.config.grid_steps,
            CPU,
            omega=self.config.omega,
            noising=self.config.noising,
        )
        latents = torch.randn(PROMPTS, *SHAPE, generator=torch.Generator().manual_seed(0))
        maker = PairMaker(
            GuidedPredictor(network, TABLE, self.config.omega),
            grid,
            self.config,
            latent_shape=SHAPE,
            num_prompts=self.num_prompts,
            latents=latents if self.config.start == "data" else None,
            seed=self.seed,
            dropout=self.dropout,
            device=CPU,
        )
        shard = {"batch": self.batch, "rank": self.rank, "world_size": self.world_size}
        if self.config.mode == "lockstep":
            return LockstepRollout(maker, **shard)
        return ContinuousRollout(maker, groups=self.pool, **shard)


def config(**changes) -> RolloutConfig:
    return RolloutConfig(**({"grid_steps": 10, "k": 10, "mode": "continuous"} | changes))


def diffusers_trajectory(sample_id: int, row: int, seed: int, steps: int, w: float) -> dict[int, torch.Tensor]:
    """x at every grid timestep and at t = 0, by diffusers' DDIM steps from the sample's noise."""
    theirs = scheduler()
    theirs.set_timesteps(steps)
    ids = torch.tensor([sample_id])
    x = normal(NoiseKey(seed, ids, draw_id(Draw.START_NOISE)), SHAPE)
    states = {}
    for t in theirs.timesteps:
        states[int(t)] = x
        pos = network(x, t[None], TABLE.gather(torch.tensor([row])))
        neg = network(x, t[None], TABLE.empty(1))
        x = theirs.step(pos + w * (pos - neg), t, x).prev_sample
    states[0] = x  # set_alpha_to_one=False: the last step ends at alphas_cumprod[0]
    return states


def tweedie(x: torch.Tensor, t: int, row: int, w: float) -> torch.Tensor:
    a = scheduler().alphas_cumprod[t]
    pos = network(x, torch.tensor([t]), TABLE.gather(torch.tensor([row])))
    neg = network(x, torch.tensor([t]), TABLE.empty(1))
    return (x - (1 - a).sqrt() * (pos + w * (pos - neg))) / a.sqrt()


@pytest.mark.parametrize("w", [-1.0, 0.0, -3.0])
def test_continuous_pairs_lie_on_diffusers_trajectories(w):
    """Every pair's target and x_s are of its sample's trajectory, over several lives of a slot."""
    run = Run(config(omega=w))
    rollout = run.make()
    a = scheduler().alphas_cumprod.double().sqrt()
    seen = set()
    for _ in range(2 * 10 * 2 + 3):
        pairs = rollout.next_pairs()
        rows = rollout.maker.rows(pairs.sample_ids)
        assert torch.equal(rows, pairs.rows)
        facts = zip(pairs.sample_ids.tolist(), pairs.t.tolist(), pairs.s.tolist(), strict=True)
        for i, (sample, t, s) in enumerate(facts):
            states = diffusers_trajectory(sample, int(rows[i]), run.seed, 10, w)
            x_t = states[t]
            target = x_t if t == 0 else tweedie(x_t, t, int(rows[i]), w)
            torch.testing.assert_close(pairs.target[i], target[0], rtol=1e-4, atol=2e-5)
            index = t // 100 if t else -1
            noise = normal(NoiseKey(run.seed, torch.tensor([sample]), draw_id(Draw.RENOISE, index)), SHAPE)
            ratio = (a[s] / a[t]).item()
            fresh = ((1 - a[s] ** 2) - (1 - a[t] ** 2) * ratio**2).sqrt().item()
            torch.testing.assert_close(pairs.x_s[i], (ratio * x_t + fresh * noise)[0], rtol=1e-4, atol=2e-5)
            assert t < s <= 999
            assert (sample, t) not in seen, "a state gives one pair only"
            seen.add((sample, t))
    assert any(t == 0 for _, t in seen)
    assert all(t != 999 for _, t in seen)


@pytest.mark.parametrize("mode", ["lockstep", "continuous"])
def test_data_started_pairs_lie_on_diffusers_trajectories(mode):
    """x_t is the sample's noised latent after diffusers' steps.

    The target is the estimate, also at t = 0.
    """
    run = Run(config(mode=mode, start="data", k=3, omega=-2.0), batch=5)
    rollout = run.make()
    maker = rollout.maker
    first_life_ends = 2 * getattr(rollout, "total_slots", 0)  # the very first samples begin where the stagger puts them
    theirs, seen = scheduler(), set()
    theirs.set_timesteps(10)
    a = theirs.alphas_cumprod.sqrt()
    for _ in range(40):
        pairs = rollout.next_pairs()
        for i, (sample, t) in enumerate(zip(pairs.sample_ids.tolist(), pairs.t.tolist(), strict=True)):
            if sample < first_life_ends:
                continue
            ids = torch.tensor([sample])
            starts = 10 if mode == "lockstep" else 9
            start = int(randint(NoiseKey(run.seed, ids, draw_id(Draw.START_INDEX)), starts))
            row = int(maker.rows(ids))
            now = 100 * start + 99
            noise = normal(NoiseKey(run.seed, ids, draw_id(Draw.START_NOISE)), SHAPE)
            x = a[now] * maker.latents[row - 1] + (1 - a[now] ** 2).sqrt() * noise
            while now != t:
                pos = network(x, torch.tensor([now]), TABLE.gather(torch.tensor([row])))
                neg = network(x, torch.tensor([now]), TABLE.empty(1))
                x = theirs.step(pos - 2 * (pos - neg), now, x).prev_sample
                now = max(now - 100, 0)
            torch.testing.assert_close(pairs.target[i], tweedie(x, t, row, -2.0)[0], rtol=1e-4, atol=2e-5)
            seen.add(t)
    assert 0 in seen
    assert len(seen) > 4


def test_one_forward_gives_one_pair():
    rollout = Run(config()).make()
    rollout.fill()
    before = rollout.maker.predictor.forwards
    for _ in range(10):
        rollout.next_pairs()
    assert rollout.maker.predictor.forwards - before == 10 * 6


def test_a_group_is_filled_on_its_first_turn():
    """Its states and their order are as if all groups had been filled at once."""
    lazy, eager = (Run(config(), pool=3).make() for _ in range(2))
    eager.fill()
    eager.fill()  # a second time changes nothing
    forwards = []
    for turn in range(7):
        before = lazy.maker.predictor.forwards
        one, other = lazy.next_pairs(), eager.next_pairs()
        for field in fields(one):
            assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name
        forwards.append(lazy.maker.predictor.forwards - before)
        assert lazy.filled == min(turn + 1, 3)
    assert min(forwards[:3]) > 6 == max(forwards[3:])
    assert lazy.maker.predictor.forwards == eager.maker.predictor.forwards


@pytest.mark.parametrize("turns", [1, 2, 5])
def test_a_rollout_that_was_saved_while_it_filled_goes_on(turns):
    first, second = (Run(config(), pool=3).make() for _ in range(2))
    for _ in range(turns):
        first.next_pairs()
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for _ in range(7):
        one, other = first.next_pairs(), second.next_pairs()
        for field in fields(one):
            assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


def test_pool_advances_one_group_per_call():
    rollout = Run(config(), pool=3).make()
    groups = [rollout.next_pairs().sample_ids % (3 * 6) // 6 for _ in range(6)]
    assert [set(group.tolist()) for group in groups] == [{0}, {1}, {2}] * 2


CASES = [
    {"start": "noise", "k": 10, "stop": "uniform"},
    {"start": "noise", "k": 4, "stop": "uniform"},
    {"start": "noise", "k": 4, "stop": "fixed"},
    {"start": "noise", "k": 10, "stop": "fixed"},
    {"start": "data", "k": 3},
    {"start": "data", "k": 10},
]


@pytest.mark.parametrize("mode", ["lockstep", "continuous"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_noise_levels_come_as_often_as_closed_form_says(mode, case):
    """Counts of t within five standard deviations; in continuous mode from the first update on."""
    if mode == "continuous" and case["start"] == "noise":
        case = {"start": "noise"}  # runs to the end, wherever lockstep would stop
    setting = config(mode=mode, **case)
    run = Run(setting, batch=50, pool=4)
    rollout = run.make()
    expected = (lockstep_frequencies if mode == "lockstep" else continuous_frequencies)(setting)
    counts, weighted, total = torch.zeros(11), torch.zeros(11), 0
    for _ in range(60):
        pairs = rollout.next_pairs()
        index = torch.where(pairs.t == 0, 0, pairs.t // 100 + 1)
        counts += index.bincount(minlength=11)
        weighted.index_add_(0, index, pairs.weight)
        total += len(index)
        assert torch.equal(pairs.weight, torch.ones(50))
    deviation = (expected * (1 - expected) / total).sqrt()
    assert ((counts / total - expected).abs() <= 5 * deviation + 1e-9).all()


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
def test_pair_weight_gives_the_lockstep_frequencies(case):
    setting = config(pair_weight="lockstep", **case)
    rollout = Run(setting, batch=50, pool=4).make()
    weighted, total = torch.zeros(11), 0
    for _ in range(80):
        pairs = rollout.next_pairs()
        weighted.index_add_(0, torch.where(pairs.t == 0, 0, pairs.t // 100 + 1), pairs.weight)
        total += len(pairs.t)
    assert ((weighted / total - lockstep_frequencies(setting)).abs() < 0.03).all()


def test_s_is_uniform_above_t():
    rollout = Run(config(mode="lockstep", start="data", k=3), batch=500).make()
    position = []
    for _ in range(20):
        pairs = rollout.next_pairs()
        position.append((pairs.s - pairs.t - 1) / (999 - pairs.t))
    share = torch.cat(position).mul(10).long().bincount(minlength=10) / 10_000
    assert ((share - 0.1).abs() < 0.015).all()


@pytest.mark.parametrize("mode", ["lockstep", "continuous"])
@pytest.mark.parametrize("start", ["noise", "data"])
def test_two_ranks_make_the_pairs_of_one(mode, start):
    setting = config(mode=mode, start=start, k=10 if start == "noise" else 4)
    whole = Run(setting, batch=6).make()
    halves = [Run(setting, batch=3, rank=rank, world_size=2).make() for rank in (0, 1)]
    for _ in range(12):
        one, two = whole.next_pairs(), [half.next_pairs() for half in halves]
        for name in ("sample_ids", "s", "t", "rows"):
            assert torch.equal(getattr(one, name), torch.cat([getattr(part, name) for part in two])), name
        torch.testing.assert_close(one.x_s, torch.cat([part.x_s for part in two]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.target, torch.cat([part.target for part in two]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["lockstep", "continuous"])
def test_state_dict_goes_on_where_it_was(mode):
    rollout, other = Run(config(mode=mode)).make(), Run(config(mode=mode)).make()
    for _ in range(7):
        rollout.next_pairs()
    other.load_state_dict({name: value.clone() for name, value in rollout.state_dict().items()})
    for _ in range(15):
        mine, theirs = rollout.next_pairs(), other.next_pairs()
        assert torch.equal(mine.x_s, theirs.x_s)
        assert torch.equal(mine.sample_ids, theirs.sample_ids)


def test_every_epoch_uses_every_prompt_once():
    rollout = Run(config(mode="lockstep"), batch=PROMPTS).make()
    epochs = [rollout.next_pairs().rows.tolist() for _ in range(6)]
    assert all(sorted(rows) == [1, 2, 3, 4, 5] for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) > 1, "the order changes"


def test_prompt_dropout_drops_its_share():
    rollout = Run(config(mode="lockstep", k=1), batch=400, dropout=0.25).make()
    rows = torch.cat([rollout.next_pairs().rows for _ in range(20)])
    assert abs((rows == 0).float().mean().item() - 0.25) < 0.03


def test_without_the_prompt_in_the_rollout_pairs_do_not_depend_on_it():
    """w = -1 from noise: the trajectory never sees a prompt."""
    # The same samples with other prompts.
    first, second = (Run(config(omega=-1.0), num_prompts=count).make() for count in (PROMPTS, 3))
    one, other = first.next_pairs(), second.next_pairs()
    assert torch.equal(one.x_s, other.x_s)
    assert not torch.equal(one.rows, other.rows)


def test_shuffled_prompts_do_not_change_the_rollout():
    """The control has equal states and targets, but the student sees other prompts.

    Each prompt comes as often as before.
    """
    setting = config(mode="lockstep", omega=-3.0)
    plain, control = Run(setting, batch=PROMPTS).make(), Run(setting, batch=PROMPTS).make()
    control.maker.shuffled = True
    differ = 0
    for _ in range(8):
        mine, theirs = plain.next_pairs(), control.next_pairs()
        assert torch.equal(mine.x_s, theirs.x_s)
        assert torch.equal(mine.target, theirs.target)
        assert sorted(theirs.rows.tolist()) == [1, 2, 3, 4, 5]
        differ += int((mine.rows != theirs.rows).sum())
    assert differ > 20  # of 40; a fifth stay by chance


def test_naive_noising_starts_from_the_estimate():
    """Eq. 15: x_s = alpha_s x_{t->0} + sigma_s noise."""
    rollout = Run(config(mode="lockstep", noising="naive")).make()
    pairs = rollout.next_pairs()
    stop = torch.where(pairs.t == 0, -1, pairs.t // 100)
    noise = normal(NoiseKey(3, pairs.sample_ids, draw_id(Draw.RENOISE, stop)), SHAPE)
    a = scheduler().alphas_cumprod[pairs.s].view(-1, 1, 1, 1)
    torch.testing.assert_close(pairs.x_s, a.sqrt() * pairs.target + (1 - a).sqrt() * noise, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["data", "noise"])
def test_lockstep_forwards_no_sample_that_has_arrived(start):
    """Each sample costs its steps and one evaluation for the target; then no forward holds it."""
    run = Run(config(mode="lockstep", start=start, k=6), batch=16).make()
    seen, predict = [], run.maker.predictor.predict

    def counted(x, t, cond):
        seen.append(len(x))
        return predict(x, t, cond)

    run.maker.predictor.predict = counted
    draws = run.draws(torch.arange(16))
    steps = (draws.start_index - draws.stop_index()).tolist()
    assert len(set(steps)) > 2
    run.next_pairs()
    assert sum(seen) == run.maker.predictor.forwards == sum(steps) + 16
    assert len(seen) == max(steps) + 1
    assert seen[:-1] == sorted(seen[:-1], reverse=True)


class Slow:
    """A network whose calls take a fixed time, and more for every sample, by a simulated clock."""

    def __init__(self, call: float, sample: float) -> None:
        self.call, self.sample, self.now, self.calls = call, sample, 0.0, []

    def __call__(self, x, t, cond):
        self.now += self.call + self.sample * len(x)
        self.calls.append(len(x))
        return network(x, t, cond)


@pytest.mark.parametrize(("call", "sample", "batched"), [(1.0, 0.01, True), (0.0, 1.0, True), (-0.5, 1.0, False)])
def test_branches_run_as_is_faster_here(monkeypatch, call, sample, batched):
    """One batch where a call has a cost, or none; two batches where two small ones are cheaper."""
    slow = Slow(call, sample)
    monkeypatch.setattr("selfnpo_fast.runtime.batch_or_split.time.perf_counter", lambda: slow.now)
    predictor = GuidedPredictor(slow, TABLE, -3.0)
    x, t, rows = torch.randn(4, *SHAPE), torch.full((4,), 500), torch.tensor([1, 2, 3, 4])
    calls = 0
    predictor(x[:2], t[:2], rows[:2])  # fewer samples than a full batch: their time does not count
    while not predictor.decided:
        pos, neg = predictor(x, t, rows)
        calls += 1
        predictor(x[:2], t[:2], rows[:2])
    assert predictor.branches.batched == batched
    assert calls == 2 * BatchOrSplit.TRIALS
    assert predictor.forwards == 8 * calls + 4 * (calls + 1), "every measured call was a real step"
    slow.calls.clear()
    predictor(x, t, rows)
    assert slow.calls == ([8] if batched else [4, 4])
    for choice in ("batched", "split"):
        for a, b in zip(GuidedPredictor(network, TABLE, -3.0, choice)(x, t, rows), (pos, neg), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["lockstep", "continuous"])
@pytest.mark.parametrize("choice", [None, True, False])
def test_how_branches_run_is_part_of_the_state(mode, choice):
    first, second = (Run(config(mode=mode, omega=-3.0)).make() for _ in range(2))
    first.maker.predictor.branches.batched = choice
    second.load_state_dict(first.state_dict())
    assert second.maker.predictor.branches.batched is choice
