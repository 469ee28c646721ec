"""The rollout engine: a reference model walks down a DDIM grid and leaves training pairs (x_s, s, target).

A grid index i stands for the timestep grid[i]; index -1 stands for t = 0, the end of every trajectory. Shape letters:
B pairs of one micro-batch, S slots of this rank, N grid steps, T training timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from selfnpo_fast.conditioning import EMPTY_ROW, ConditioningTable
from selfnpo_fast.config import RolloutConfig
from selfnpo_fast.schedule import (
    NoiseSchedule,
    ddim_coefficients,
    ddim_grid,
    forward_coefficients,
    renoise_coefficients,
)
from selfnpo_kernels import Draw, NoiseKey, affine_noise, draw_id, guided_step, normal, permute, randint, uniform

Predict = Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]
"""(x (B, ...), t (B,), conditioning rows) -> raw network output (B, ...)."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """One micro-batch of training pairs, everything on the device of the latents."""

    x_s: torch.Tensor  # (B, ...) float32, the student's input
    s: torch.Tensor  # (B,) int64
    target: torch.Tensor  # (B, ...) float32, x_{t->0}
    t: torch.Tensor  # (B,) int64
    rows: torch.Tensor  # (B,) int64, the student's row of the conditioning table
    weight: torch.Tensor  # (B,) float32
    sample_ids: torch.Tensor  # (B,) int64


@dataclass(frozen=True)
class Grid:
    """Timesteps and coefficients of one rollout grid; row i + 1 of each table belongs to grid index i."""

    schedule: NoiseSchedule
    timesteps: torch.Tensor  # (N + 1,) int64: 0, then the grid in ascending order
    step: torch.Tensor  # (N + 1, 4) float32: x0 and DDIM coefficients; row 0 (t = 0) steps nowhere
    start: torch.Tensor  # (N + 1, 2) float32: forward diffusion to the grid

    @classmethod
    def build(cls, schedule: NoiseSchedule, grid_steps: int, device: torch.device) -> Grid:
        """The DDIM grid of `grid_steps` steps; the step from grid index 0 ends at timestep 0."""
        schedule = schedule.to(device)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        timesteps = torch.cat([zero, ddim_grid(schedule.num_train_timesteps, grid_steps).to(device)])
        previous = torch.cat([zero, timesteps[:-1]])
        return cls(
            schedule,
            timesteps,
            ddim_coefficients(schedule, timesteps, previous).float(),
            forward_coefficients(schedule, timesteps).float(),
        )

    @property
    def steps(self) -> int:
        """N."""
        return len(self.timesteps) - 1

    def timestep(self, index: torch.Tensor) -> torch.Tensor:
        """Timesteps (B,) of grid indices (B,)."""
        return self.timesteps[index + 1]

    def renoise(self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, noise) -> torch.Tensor:
        """x_s from x_t (Eq. 16), both (B, ...)."""
        return affine_noise(x, renoise_coefficients(self.schedule, t, s).float(), noise)

    def diffuse(self, x0: torch.Tensor, s: torch.Tensor, noise) -> torch.Tensor:
        """x_s from a clean estimate (Eq. 15), both (B, ...)."""
        return affine_noise(x0, forward_coefficients(self.schedule, s).float(), noise)


class GuidedPredictor:
    """The reference network under rollout guidance w; counts the samples it has forwarded.

    w = -1 needs the unconditional output alone and w = 0 the conditional one; otherwise both run as one batch.
    """

    def __init__(self, predict: Predict, table: ConditioningTable, w: float) -> None:
        self.predict, self.table, self.w = predict, table, w
        self.forwards = 0

    def __call__(self, x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor):
        """`(pos or None, neg or None)` at states x (B, ...), timesteps t (B,), table rows (B,)."""
        batch = len(x)
        if self.w == -1:
            self.forwards += batch
            return None, self.predict(x, t, self.table.empty(batch))
        if self.w == 0:
            self.forwards += batch
            return self.predict(x, t, self.table.gather(rows)), None
        self.forwards += 2 * batch
        both = self.table.gather(torch.cat([rows, torch.full_like(rows, EMPTY_ROW)]))
        pos, neg = self.predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return pos, neg


@dataclass(frozen=True, kw_only=True)
class LockstepDraws:
    """All that chance decides about one lockstep micro-batch."""

    start_index: torch.Tensor  # (B,) int64 grid index
    steps: torch.Tensor  # (B,) int64 number of DDIM steps
    noise: torch.Tensor  # (B, ...) start noise
    s: torch.Tensor  # (B,) int64
    renoise: torch.Tensor  # (B, ...) noise of Eq. 16

    def stop_index(self) -> torch.Tensor:
        """Grid index (B,) at which each rollout ends; a sample that has passed index 0 stays at t = 0."""
        return (self.start_index - self.steps).clamp(min=-1)


@dataclass(frozen=True, kw_only=True)
class LockstepResult:
    """A finished lockstep rollout."""

    x_start: torch.Tensor
    x_t: torch.Tensor
    t: torch.Tensor
    target: torch.Tensor
    x_s: torch.Tensor


@torch.no_grad()
def walk(
    predictor: GuidedPredictor,
    grid: Grid,
    x: torch.Tensor,
    index: torch.Tensor,
    stop: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """DDIM steps from states x (B, ...) at grid indices `index` (B,) down to indices `stop` (B,); returns (B, ...).

    A sample that has arrived stays where it is while the others go on.
    """
    for _ in range(int((index - stop).max())):
        pos, neg = predictor(x, grid.timestep(index), rows)
        moved, _ = guided_step(pos, neg, x, predictor.w, grid.step[index + 1])
        going = index > stop
        x = torch.where(going.view(-1, *[1] * (x.ndim - 1)), moved, x)
        index = torch.where(going, index - 1, index)
    return x


@torch.no_grad()
def lockstep_rollout(
    predictor: GuidedPredictor,
    grid: Grid,
    draws: LockstepDraws,
    latents: torch.Tensor | None,
    rows: torch.Tensor,
    noising: str = "from_x_t",
) -> LockstepResult:
    """Eq. 13 (latents None) or Eq. 14 from scaled latents (B, ...): all samples run together, each for its own number
    of steps; one more evaluation gives the Tweedie target. rows (B,) are the table rows of the prompts.
    """
    start, stop = draws.start_index, draws.stop_index()
    x_start = draws.noise if latents is None else affine_noise(latents, grid.start[start + 1], draws.noise)
    x = walk(predictor, grid, x_start, start, stop, rows)
    t = grid.timestep(stop)
    pos, neg = predictor(x, t, rows)
    _, target = guided_step(pos, neg, x, predictor.w, grid.step[stop + 1])
    x_s = (
        grid.renoise(x, t, draws.s, draws.renoise)
        if noising == "from_x_t"
        else grid.diffuse(target, draws.s, draws.renoise)
    )
    return LockstepResult(x_start=x_start, x_t=x, t=t, target=target, x_s=x_s)


def lockstep_frequencies(config: RolloutConfig) -> torch.Tensor:
    """(N + 1,) float64: how often lockstep mode stops at t = 0 (entry 0) and at each grid index i (entry i + 1)."""
    n, k = config.grid_steps, config.max_steps
    out = torch.zeros(n + 1, dtype=torch.float64)
    if config.start == "data":
        starts, step_counts = range(n), [k]
    else:
        starts, step_counts = [n - 1], range(1, k + 1) if config.stop == "uniform" else [k]
    for start in starts:
        for steps in step_counts:
            out[max(start - steps, -1) + 1] += 1
    return out / out.sum()


def continuous_frequencies(config: RolloutConfig) -> torch.Tensor:
    """(N + 1,) float64: how often continuous mode gives a pair at t = 0 (entry 0) and at grid index i (entry i + 1)."""
    out = torch.zeros(config.grid_steps + 1, dtype=torch.float64)
    for _, index, _ in life_states(config):
        # From noise, the state at the last grid index has no s above it; the finished x at t = 0 takes its place.
        out[0 if index == config.grid_steps - 1 else index + 1] += 1
    return out / out.sum()


def life_states(config: RolloutConfig) -> list[tuple[int, int, int]]:
    """Every (start index, grid index, states left after this one) of a slot; all are equally frequent."""
    n = config.grid_steps
    if config.start == "noise":
        return [(n - 1, i, i) for i in range(n)]
    # The last grid index has no s above it, so data starts below it; t = 0 is a state like any other.
    ends = {start: max(start - config.max_steps, -1) for start in range(n - 1)}
    return [(start, i, i - end) for start, end in ends.items() for i in range(start, end - 1, -1)]


class PairMaker:
    """What both modes share: which prompt a sample has, where s falls, what the student sees."""

    def __init__(
        self,
        predictor: GuidedPredictor,
        grid: Grid,
        config: RolloutConfig,
        *,
        latent_shape: tuple[int, ...],
        items: int,
        latents: torch.Tensor | None,
        seed: int,
        dropout: float,
        device: torch.device,
        shuffled: bool = False,
    ) -> None:
        self.predictor, self.grid, self.config = predictor, grid, config
        self.latent_shape, self.items, self.latents = latent_shape, items, latents
        self.seed, self.dropout, self.device, self.shuffled = seed, dropout, device, shuffled

    def item(self, sample_ids: torch.Tensor, order: int = 0) -> torch.Tensor:
        """Prompt (or image) number of each sample id (B,): a keyed permutation of the items per epoch.

        Another `order` is another permutation.
        """
        return permute(sample_ids % self.items, self.items, self.seed + order, sample_ids // self.items)

    def rows(self, sample_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the conditioning table, (B,)."""
        return self.item(sample_ids) + 1

    def key(self, kind: Draw, sample_ids: torch.Tensor, index: torch.Tensor | int = -1) -> NoiseKey:
        """The noise key of one use for these samples."""
        return NoiseKey(self.seed, sample_ids, draw_id(kind, index))

    def draw_s(self, sample_ids: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """s (B,) uniform in {t + 1, ..., T - 1} for pairs taken at grid `index` (B,)."""
        t = self.grid.timestep(index)
        room = self.grid.schedule.num_train_timesteps - 1 - t
        return t + 1 + randint(self.key(Draw.RENOISE_TIME, sample_ids, index), room)

    def student_rows(self, sample_ids: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The prompts' rows with `dropout` of them replaced by the empty prompt, (B,)."""
        dropped = uniform(self.key(Draw.PROMPT_DROPOUT, sample_ids, index)) < self.dropout
        rows = self.item(sample_ids, order=1) + 1 if self.shuffled else self.rows(sample_ids)
        return torch.where(dropped, EMPTY_ROW, rows)

    def start_latents(self, sample_ids: torch.Tensor) -> torch.Tensor | None:
        """Scaled latents (B, ...) of real data, or None when rollouts start from noise."""
        if self.latents is None:
            return None
        return self.latents[self.item(sample_ids).to(self.latents.device)].to(self.device)

    def finish(self, x_t, index, target, sample_ids) -> Pairs:
        """Re-noise states x_t (B, ...) at grid indices (B,) and pack the pairs."""
        s = self.draw_s(sample_ids, index)
        t = self.grid.timestep(index)
        noise = self.key(Draw.RENOISE, sample_ids, index)
        from_x_t = self.config.noising == "from_x_t"
        return Pairs(
            x_s=self.grid.renoise(x_t, t, s, noise) if from_x_t else self.grid.diffuse(target, s, noise),
            s=s,
            target=target,
            t=t,
            rows=self.student_rows(sample_ids, index),
            weight=torch.ones(len(s), device=x_t.device),
            sample_ids=sample_ids,
        )


class LockstepRollout:
    """The paper's rollouts: every micro-batch starts anew, and only the last state gives a pair."""

    def __init__(self, maker: PairMaker, *, batch: int, rank: int, world_size: int) -> None:
        self.maker, self.batch = maker, batch
        self.offset, self.stride = rank * batch, world_size * batch
        self.next_id = self.offset

    def draws(self, ids: torch.Tensor) -> LockstepDraws:
        """The counter-based draws of samples `ids` (B,)."""
        maker, config = self.maker, self.maker.config
        n = config.grid_steps
        if config.start == "data":
            start_index = randint(maker.key(Draw.START_INDEX, ids), n)
        else:
            start_index = torch.full_like(ids, n - 1)
        steps = torch.full_like(ids, config.max_steps)
        if config.start == "noise" and config.stop == "uniform":
            steps = 1 + randint(maker.key(Draw.STEPS, ids), config.max_steps)
        stop = (start_index - steps).clamp(min=-1)
        return LockstepDraws(
            start_index=start_index,
            steps=steps,
            noise=normal(maker.key(Draw.START_NOISE, ids), maker.latent_shape),
            s=maker.draw_s(ids, stop),
            renoise=normal(maker.key(Draw.RENOISE, ids, stop), maker.latent_shape),
        )

    @torch.no_grad()
    def next_pairs(self) -> Pairs:
        """The next micro-batch."""
        maker = self.maker
        ids = torch.arange(self.next_id, self.next_id + self.batch, device=maker.device)
        self.next_id += self.stride
        draws = self.draws(ids)
        latents = maker.start_latents(ids)
        out = lockstep_rollout(maker.predictor, maker.grid, draws, latents, maker.rows(ids), maker.config.noising)
        return Pairs(
            x_s=out.x_s,
            s=draws.s,
            target=out.target,
            t=out.t,
            rows=maker.student_rows(ids, draws.stop_index()),
            weight=torch.ones(self.batch, device=maker.device),
            sample_ids=ids,
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Where the next micro-batch of all ranks begins."""
        return {"next_id": torch.tensor(self.next_id - self.offset)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state_dict()`."""
        self.next_id = int(state["next_id"]) + self.offset


class ContinuousRollout:
    """In-flight batching: each slot is at its own grid index, one forward moves a group of slots, every state gives a
    pair, and a slot that ends its trajectory starts a new one. A group has as many slots as a micro-batch has pairs.

    From noise, the state at the last grid index has no s above it; in its stead the sample that just ended in that slot
    gives its final x as a pair at t = 0, so N forwards give N pairs.
    """

    def __init__(self, maker: PairMaker, *, batch: int, groups: int, rank: int, world_size: int) -> None:
        self.maker, self.batch, self.groups, self.cursor = maker, batch, groups, 0
        self.total_slots = batch * groups * world_size
        group = torch.arange(groups, device=maker.device)[:, None]
        lane = torch.arange(batch, device=maker.device)[None] + rank * batch
        # Ids start at one whole set of slots: the set below it are the samples that ended just before the run began.
        self.ids = self.total_slots + (group * batch * world_size + lane).flatten()  # (S,)
        self.index = torch.zeros_like(self.ids)
        self.left = torch.zeros_like(self.ids)  # states left in this life after the present one
        self.x = torch.zeros(len(self.ids), *maker.latent_shape, device=maker.device)
        self.final = torch.zeros_like(self.x)  # where this slot's previous sample ended
        weight = torch.ones(maker.config.grid_steps + 1, dtype=torch.float64)
        if maker.config.pair_weight == "lockstep":
            ours = continuous_frequencies(maker.config)
            weight = torch.where(ours > 0, lockstep_frequencies(maker.config) / ours.clamp(min=1e-12), 0)
        self.weight = weight.float().to(maker.device)  # row i + 1 belongs to grid index i
        self.filled = False

    def _begin(self, ids: torch.Tensor, start: torch.Tensor | None = None):
        """First state (B, ...), its grid index and the states left after it (B,) of new samples."""
        maker, config = self.maker, self.maker.config
        n = config.grid_steps
        noise = normal(maker.key(Draw.START_NOISE, ids), maker.latent_shape)
        if config.start == "noise":
            index = torch.full_like(ids, n - 1)
            return noise, index, index
        index = randint(maker.key(Draw.START_INDEX, ids), n - 1) if start is None else start
        x = affine_noise(maker.start_latents(ids), maker.grid.start[index + 1], noise)
        return x, index, (index + 1).clamp(max=config.max_steps)

    @torch.no_grad()
    def _stagger(self) -> None:
        """Fill the slots and walk each to a state drawn from the long-run distribution of states."""
        maker = self.maker
        states = torch.tensor(life_states(maker.config), device=maker.device)
        from_noise = maker.config.start == "noise"
        for group in range(self.groups):
            part = slice(group * self.batch, (group + 1) * self.batch)
            ids = self.ids[part]
            start, index, left = states[randint(maker.key(Draw.STAGGER, ids), len(states))].unbind(1)
            # A slot at the very start of a sample needs the end of the one before it, for the pair at t = 0.
            fresh = (index == start) & from_noise
            walkers = torch.where(fresh, ids - self.total_slots, ids)
            x, first, _ = self._begin(walkers, start)
            x = walk(maker.predictor, maker.grid, x, first, torch.where(fresh, -1, index), maker.rows(walkers))
            self.final[part] = x
            here = fresh.view(-1, *[1] * (x.ndim - 1))
            self.x[part] = torch.where(here, self._begin(ids)[0], x) if from_noise else x
            self.index[part], self.left[part] = index, left

    @torch.no_grad()
    def next_pairs(self) -> Pairs:
        """Advance one group of slots by one grid step and return the pairs of the states they were in."""
        if not self.filled:
            self._stagger()
            self.filled = True
        maker, grid = self.maker, self.maker.grid
        part = slice(self.cursor * self.batch, (self.cursor + 1) * self.batch)
        self.cursor = (self.cursor + 1) % self.groups
        x, index, ids, left = self.x[part], self.index[part], self.ids[part], self.left[part]
        pos, neg = maker.predictor(x, grid.timestep(index), maker.rows(ids))
        x_next, x0 = guided_step(pos, neg, x, maker.predictor.w, grid.step[index + 1])

        no_room = index == grid.steps - 1
        here = no_room.view(-1, *[1] * (x.ndim - 1))
        final = self.final[part]
        pair_index = torch.where(no_room, -1, index)
        pair_ids = torch.where(no_room, ids - self.total_slots, ids)
        pairs = maker.finish(torch.where(here, final, x), pair_index, torch.where(here, final, x0), pair_ids)
        pairs = replace(pairs, weight=self.weight[pair_index + 1])

        ended = left == 0
        gone = ended.view(-1, *[1] * (x.ndim - 1))
        new_ids = torch.where(ended, ids + self.total_slots, ids)
        first, first_index, first_left = self._begin(new_ids)
        self.final[part] = torch.where(gone, x_next, final)
        self.x[part] = torch.where(gone, first, x_next)
        self.index[part] = torch.where(ended, first_index, index - 1)
        self.left[part] = torch.where(ended, first_left, left - 1)
        self.ids[part] = new_ids
        return pairs

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All slots of this rank as (groups, lanes, ...); the lanes of all ranks side by side are those of one."""
        lanes = (self.groups, self.batch)
        state = {name: getattr(self, name).unflatten(0, lanes) for name in ("x", "final", "index", "left", "ids")}
        return {**state, "cursor": torch.tensor(self.cursor)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state_dict()`."""
        for name in ("x", "final", "index", "left", "ids"):
            getattr(self, name).copy_(state[name].flatten(0, 1))
        self.cursor, self.filled = int(state["cursor"]), True
