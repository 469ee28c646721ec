"""The rollout engine: a reference model walks down a DDIM grid and leaves training pairs (x_s, s, target).

A grid index i stands for the timestep grid[i]; index -1 stands for t = 0, the end of every trajectory. Shape letters:
B pairs of one micro-batch, S slots of this rank, N grid steps, T training timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
from selfnpo_kernels import (
    Draw,
    NoiseKey,
    TdftRules,
    TdftTables,
    affine_noise,
    draw_id,
    guided_step,
    normal,
    permute,
    randint,
    tdft_step,
    uniform,
)

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
    """Timesteps and coefficients of one rollout grid; row i + 1 of a table belongs to grid index i, row 0 to t = 0."""

    schedule: NoiseSchedule
    timesteps: torch.Tensor  # (N + 1,) int64: 0, then the grid in ascending order
    step: torch.Tensor  # (N + 2, 7) float32: guided DDIM steps; row 0 steps nowhere, the last leaves x as it is
    start: torch.Tensor  # (N + 1, 2) float32: forward diffusion to the grid
    renoise: torch.Tensor  # (N + 1, T, 2) float32: from x_t (Eq. 16), or from x_{t->0} (Eq. 15), to timestep s
    naive: bool  # whether it is Eq. 15

    @classmethod
    def build(
        cls, schedule: NoiseSchedule, grid_steps: int, device: torch.device, *, w: float, noising: str = "from_x_t"
    ) -> Grid:
        """The DDIM grid of `grid_steps` steps under guidance w; the step from grid index 0 ends at timestep 0."""
        zero = torch.zeros(1, dtype=torch.int64)
        timesteps = torch.cat([zero, ddim_grid(schedule.num_train_timesteps, grid_steps)])
        previous = torch.cat([zero, timesteps[:-1]])
        stay = torch.tensor([[0, 0, 1, 0, 0, 0, w]], dtype=torch.float64)
        every_s = torch.arange(schedule.num_train_timesteps).expand(grid_steps + 1, -1)
        naive = noising != "from_x_t"
        if naive:
            renoise = forward_coefficients(schedule, every_s)
        else:
            renoise = renoise_coefficients(schedule, timesteps[:, None].expand_as(every_s), every_s)
        tables = (
            torch.cat([ddim_coefficients(schedule, timesteps, previous, w), stay]),
            forward_coefficients(schedule, timesteps),
            renoise,
        )
        return cls(schedule, timesteps.to(device), *(k.float().contiguous().to(device) for k in tables), naive)

    @property
    def steps(self) -> int:
        """N."""
        return len(self.timesteps) - 1

    def timestep(self, index: torch.Tensor) -> torch.Tensor:
        """Timesteps (B,) of grid indices (B,)."""
        return self.timesteps[index + 1]

    def noised(self, x_t: torch.Tensor, target: torch.Tensor, index: torch.Tensor, s: torch.Tensor, noise):
        """x_s (B, ...) for pairs taken at grid `index` (B,), by Eq. 16 from x_t or by Eq. 15 from the target."""
        rows = (index + 1) * self.renoise.shape[1] + s
        return affine_noise(target if self.naive else x_t, self.renoise.flatten(0, 1), noise, index=rows)


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
    noise: torch.Tensor | NoiseKey  # (B, ...) start noise; a key of it only beside data
    s: torch.Tensor  # (B,) int64
    renoise: torch.Tensor | NoiseKey  # (B, ...) noise of Eq. 16

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
    stay = torch.full_like(index, grid.steps + 1)
    for _ in range(int((index - stop).max())):
        pos, neg = predictor(x, grid.timestep(index), rows)
        going = index > stop
        x, _ = guided_step(pos, neg, x, grid.step, index=torch.where(going, index + 1, stay))
        index = torch.where(going, index - 1, index)
    return x


@torch.no_grad()
def lockstep_rollout(
    predictor: GuidedPredictor,
    grid: Grid,
    draws: LockstepDraws,
    latents: torch.Tensor | None,
    rows: torch.Tensor,
) -> LockstepResult:
    """Eq. 13 (latents None) or Eq. 14 from scaled latents (B, ...): all samples run together, each for its own number
    of steps; one more evaluation gives the Tweedie target. rows (B,) are the table rows of the prompts.
    """
    start, stop = draws.start_index, draws.stop_index()
    x_start = draws.noise if latents is None else affine_noise(latents, grid.start, draws.noise, index=start + 1)
    x = walk(predictor, grid, x_start, start, stop, rows)
    t = grid.timestep(stop)
    pos, neg = predictor(x, t, rows)
    _, target = guided_step(pos, neg, x, grid.step, index=stop + 1)
    x_s = grid.noised(x, target, stop, draws.s, draws.renoise)
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

    def rules(self, stride: int) -> TdftRules:
        """What `tdft_step` needs of this; `stride` is the number of slots of all ranks."""
        return TdftRules(
            items=self.items,
            stride=stride,
            max_steps=self.config.max_steps,
            seed=self.seed,
            dropout=self.dropout,
            shuffled=self.shuffled,
            naive=self.grid.naive,
        )

    def finish(self, x_t, index, target, sample_ids) -> Pairs:
        """Re-noise states x_t (B, ...) at grid indices (B,) and pack the pairs."""
        s = self.draw_s(sample_ids, index)
        return Pairs(
            x_s=self.grid.noised(x_t, target, index, s, self.key(Draw.RENOISE, sample_ids, index)),
            s=s,
            target=target,
            t=self.grid.timestep(index),
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
        key = maker.key(Draw.START_NOISE, ids)
        return LockstepDraws(
            start_index=start_index,
            steps=steps,
            noise=key if config.start == "data" else normal(key, maker.latent_shape),
            s=maker.draw_s(ids, stop),
            renoise=maker.key(Draw.RENOISE, ids, stop),
        )

    @torch.no_grad()
    def next_pairs(self) -> Pairs:
        """The next micro-batch."""
        maker = self.maker
        ids = torch.arange(self.next_id, self.next_id + self.batch, device=maker.device)
        self.next_id += self.stride
        draws = self.draws(ids)
        latents = maker.start_latents(ids)
        out = lockstep_rollout(maker.predictor, maker.grid, draws, latents, maker.rows(ids))
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
        # One table a group: grid index, sample id, states left in this life after the present one, prompt row.
        self.slots = torch.zeros(groups, 4, batch, dtype=torch.int64, device=maker.device)
        # Ids start at one whole set of slots: the set below it are the samples that ended just before the run began.
        self.slots[:, 1] = self.total_slots + group * batch * world_size + lane
        self._next_slots = torch.zeros_like(self.slots[0])
        self.x = torch.zeros(groups, batch, *maker.latent_shape, device=maker.device)
        from_noise = maker.config.start == "noise"
        self.final = torch.zeros_like(self.x) if from_noise else None  # where this slot's previous sample ended
        self.latents = None if from_noise else maker.latents.to(maker.device)
        weight = torch.ones(maker.config.grid_steps + 1, dtype=torch.float64)
        if maker.config.pair_weight == "lockstep":
            ours = continuous_frequencies(maker.config)
            weight = torch.where(ours > 0, lockstep_frequencies(maker.config) / ours.clamp(min=1e-12), 0)
        grid = maker.grid
        self.tables = TdftTables(
            step=grid.step,
            start=grid.start,
            renoise=grid.renoise,
            timesteps=grid.timesteps,
            weight=weight.float().to(maker.device),
        )
        self.rules = maker.rules(self.total_slots)
        self.filled = False

    @property
    def index(self) -> torch.Tensor:
        """Grid indices of all slots, (groups, B)."""
        return self.slots[:, 0]

    @property
    def ids(self) -> torch.Tensor:
        """Sample ids of all slots, (groups, B)."""
        return self.slots[:, 1]

    def _begin(self, ids: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """First state (B, ...) of samples that start at grid indices (B,)."""
        maker = self.maker
        key = maker.key(Draw.START_NOISE, ids)
        if self.latents is None:
            return normal(key, maker.latent_shape)
        return affine_noise(maker.start_latents(ids), maker.grid.start, key, index=start + 1)

    @torch.no_grad()
    def _stagger(self) -> None:
        """Fill the slots and walk each to a state drawn from the long-run distribution of states."""
        maker = self.maker
        states = torch.tensor(life_states(maker.config), device=maker.device)
        for group, slots in enumerate(self.slots):
            ids = slots[1]
            start, index, left = states[randint(maker.key(Draw.STAGGER, ids), len(states))].unbind(1)
            slots[0], slots[2], slots[3] = index, left, maker.rows(ids)
            # A slot at the very start of a sample needs the end of the one before it, for the pair at t = 0.
            fresh = (index == start) & (self.final is not None)
            walkers = torch.where(fresh, ids - self.total_slots, ids)
            first = self._begin(walkers, start)
            stop = torch.where(fresh, -1, index)
            x = walk(maker.predictor, maker.grid, first, start, stop, maker.rows(walkers))
            self.x[group] = x
            if self.final is not None:
                self.final[group] = x
                self.x[group][fresh] = self._begin(ids, start)[fresh]

    @torch.no_grad()
    def next_pairs(self) -> Pairs:
        """Advance one group of slots by one grid step and return the pairs of the states they were in."""
        if not self.filled:
            self._stagger()
            self.filled = True
        maker, group = self.maker, self.cursor
        self.cursor = (group + 1) % self.groups
        slots, x = self.slots[group], self.x[group]
        final = None if self.final is None else self.final[group]
        pos, neg = maker.predictor(x, maker.grid.timestep(slots[0]), slots[3])
        target, x_s, pairs, weight = tdft_step(
            pos, neg, x, final, slots, self._next_slots, self.tables, self.rules, self.latents
        )
        slots.copy_(self._next_slots)
        t, s, sample_ids, rows = pairs
        return Pairs(x_s=x_s, s=s, target=target, t=t, rows=rows, weight=weight, sample_ids=sample_ids)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All slots of this rank as (groups, lanes, ...); the lanes of all ranks side by side are those of one."""
        names = ("index", "ids", "left", "rows")
        state = {name: column.contiguous() for name, column in zip(names, self.slots.unbind(1), strict=True)}
        state |= {"x": self.x, "cursor": torch.tensor(self.cursor)}
        return state if self.final is None else state | {"final": self.final}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state_dict()`."""
        self.slots.copy_(torch.stack([state[name] for name in ("index", "ids", "left", "rows")], dim=1))
        self.x.copy_(state["x"])
        if self.final is not None:
            self.final.copy_(state["final"])
        self.cursor, self.filled = int(state["cursor"]), True
