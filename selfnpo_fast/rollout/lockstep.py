"""Lockstep rollouts, the paper's: samples start together, and only their last states give pairs.

Shape letter: B samples of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from selfnpo_fast.rollout.grid import Grid
from selfnpo_fast.rollout.pairs import GuidedPredictor, PairMaker, Pairs
from selfnpo_fast.runtime.layout import check_layout, check_range, layout_of
from selfnpo_fast.runtime.limits import MAX_SAMPLE_ID
from selfnpo_fast.runtime.upload import upload
from selfnpo_kernels import Draw, NoiseKey, affine_noise, guided_step, normal, randint


@dataclass(frozen=True, kw_only=True)
class LockstepDraws:
    """All random draws of one lockstep micro-batch."""

    start_index: torch.Tensor
    """(B,) int64 grid index, on the host: it decides which forwards are run."""
    steps: torch.Tensor
    """(B,) int64 number of DDIM steps, on the host."""
    noise: torch.Tensor | NoiseKey
    """(B, ...) start noise; may be its key where rollouts start from data."""
    s: torch.Tensor
    """(B,) int64 timestep of the student's input."""
    renoise: torch.Tensor | NoiseKey
    """(B, ...) noise of Eq. 16, or its key."""

    def stop_index(self) -> torch.Tensor:
        """Grid index (B,) at which each rollout ends, on the host; -1 where it reaches t = 0."""
        return (self.start_index - self.steps).clamp(min=-1)


@dataclass(frozen=True, kw_only=True)
class LockstepResult:
    """A finished lockstep rollout."""

    x_start: torch.Tensor
    """(B, ...) first state."""
    x_t: torch.Tensor
    """(B, ...) last state."""
    t: torch.Tensor
    """(B,) int64 timestep of the last state."""
    target: torch.Tensor
    """(B, ...) x_{t->0}, the Tweedie estimate at the last state."""
    x_s: torch.Tensor
    """(B, ...) the student's input."""


@dataclass(frozen=True)
class Turns:
    """Which samples take their next step in which forward; F forwards of R rows in all."""

    sizes: list[int]
    """(F) rows of each forward."""
    sample: torch.Tensor
    """(R,) int64, on the host: the sample of each row; beyond the last sample where none is left,
    and the row is computed and thrown away."""
    taken: torch.Tensor
    """(R,) int64, on the host: the steps that the row's sample has taken before."""

    @classmethod
    def together(cls, steps: torch.Tensor) -> Turns:
        """All samples that still move, in one forward for each step; `steps` (B,) is how many each
        takes."""
        # Those with the most steps come first: what still moves is always a prefix.
        order = steps.argsort(descending=True, stable=True)
        sizes = [int((steps > taken).sum()) for taken in range(int(steps.max()))]
        samples = [order[:size] for size in sizes]
        taken = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64))
        return cls(sizes, torch.cat([order[:0], *samples]), taken)

    @classmethod
    def packed(cls, steps: torch.Tensor, width: int) -> Turns:
        """Forwards of `width` rows each, as few as there can be: max(max d, ceil(sum d / width))
        for samples that take d steps, which are `steps` (B,).

        Source: McNaughton's rule. The steps of all samples fill one row of the forwards after the
        other. A sample that begins in a row's last forwards goes on in the next row's first ones;
        the two do not overlap, since no sample takes more steps than there are forwards.
        """
        total = int(steps.sum())
        forwards = max(int(steps.max()), -(-total // width))
        # Where each step of each sample goes.
        place, owner = torch.arange(total), torch.repeat_interleave(steps)
        row, forward = place // forwards, place % forwards
        # The steps of a sample are taken in the order of their forwards.
        taken = torch.empty_like(owner)
        taken[(owner * forwards + forward).argsort()] = place - (steps.cumsum(0) - steps)[owner]
        samples = (len(steps) + torch.arange(width)).repeat(forwards, 1)
        samples[forward, row] = owner
        before = torch.zeros_like(samples)
        before[forward, row] = taken
        return cls([width] * forwards, samples.flatten(), before.flatten())


@torch.no_grad()
def walk(
    predictor: GuidedPredictor,
    grid: Grid,
    x: torch.Tensor,
    index: torch.Tensor,
    stop: torch.Tensor,
    rows: torch.Tensor,
    width: int | None = None,
) -> torch.Tensor:
    """DDIM steps from states x at grid indices `index` down to grid indices `stop`.

    x              (B, ...), on the device; so is the result (B, ...)
    index, stop    (B,) int64, on the host: the device is never asked how many samples still move
    rows           (B,) int64, on the device: the prompts' rows of the conditioning table
    width          rows of every forward, 1 to B; by default a forward has all samples that still
                   move, so that there are about as many sizes as steps
    """
    steps = index - stop
    turns = Turns.together(steps) if width is None else Turns.packed(steps, width)
    # A row without a sample has a state of its own, at grid index 0.
    spare = width or 0
    at = torch.cat([index, index.new_zeros(spare)])[turns.sample] - turns.taken
    x, rows = torch.cat([x, x[:spare]]), torch.cat([rows, rows[:spare]])
    samples, at = upload(turns.sample, x.device), upload(at, x.device)
    for sample, grid_index in zip(samples.split(turns.sizes), at.split(turns.sizes), strict=True):
        state = x[sample]
        pos, neg = predictor(state, grid.timestep(grid_index), rows[sample])
        state, _ = guided_step(pos, neg, state, grid.step, index=grid_index + 1)
        x.index_copy_(0, sample, state)
    return x[: len(steps)]


@torch.no_grad()
def lockstep_rollout(
    predictor: GuidedPredictor,
    grid: Grid,
    draws: LockstepDraws,
    latents: torch.Tensor | None,
    rows: torch.Tensor,
) -> LockstepResult:
    """One lockstep rollout from noise (Eq. 13, latents None) or from real data (Eq. 14).

    Each sample walks its own number of steps; one more evaluation gives the Tweedie target.

    latents    (B, ...) scaled latents, on the device
    rows       (B,) int64, on the device: the prompts' rows of the conditioning table
    """
    start, stop = draws.start_index, draws.stop_index()
    if latents is None:
        x_start = draws.noise
    else:
        x_start = affine_noise(latents, grid.start, draws.noise, index=upload(start, latents.device) + 1)
    x = walk(predictor, grid, x_start, start, stop, rows)
    stop = upload(stop, x.device)
    t = grid.timestep(stop)
    pos, neg = predictor(x, t, rows)
    _, target = guided_step(pos, neg, x, grid.step, index=stop + 1)
    x_s = grid.noised(x, target, stop, draws.s, draws.renoise)
    return LockstepResult(x_start=x_start, x_t=x, t=t, target=target, x_s=x_s)


class LockstepRollout:
    """The paper's rollouts: every micro-batch starts new samples, whose last states give its pairs.

    `batch` is the number of samples of a micro-batch on this rank.
    """

    def __init__(self, maker: PairMaker, *, batch: int, rank: int, world_size: int) -> None:
        self.maker, self.batch = maker, batch
        self.offset, self.stride = rank * batch, world_size * batch
        self.next_id = self.offset

    def _starts(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Start index and number of steps (B,) of samples `ids` (B,), all on the host."""
        maker, config = self.maker, self.maker.config
        n = config.grid_steps
        if config.start == "data":
            start_index = randint(maker.key(Draw.START_INDEX, ids), n)
        else:
            start_index = torch.full_like(ids, n - 1)
        steps = torch.full_like(ids, config.max_steps)
        if config.start == "noise" and config.stop == "uniform":
            steps = 1 + randint(maker.key(Draw.STEPS, ids), config.max_steps)
        return start_index, steps

    def _next(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next samples' ids, their table rows and the student's, each (B,) and on the host.

        What depends on ids alone is found there: the host would wait for a GPU's answers.
        """
        ids = torch.arange(self.next_id, self.next_id + self.batch)
        start_index, steps = self._starts(ids)
        stop = (start_index - steps).clamp(min=-1)
        return ids, self.maker.rows(ids), self.maker.student_rows(ids, stop)

    def draws(self, ids: torch.Tensor) -> LockstepDraws:
        """The keyed draws of samples `ids` (B,), which are on the host."""
        maker, config = self.maker, self.maker.config
        start_index, steps = self._starts(ids)
        stop = upload((start_index - steps).clamp(min=-1), maker.device)
        ids = upload(ids, maker.device)
        key = maker.key(Draw.START_NOISE, ids)
        return LockstepDraws(
            start_index=start_index,
            steps=steps,
            noise=key if config.start == "data" else normal(key, maker.latent_shape),
            s=maker.draw_s(ids, stop),
            renoise=maker.key(Draw.RENOISE, ids, stop),
        )

    def fill(self, turns: int | None = None, before_group: Callable[[], None] | None = None) -> None:
        """Does nothing: no sample outlives its micro-batch."""

    @torch.no_grad()
    def next_pairs(self) -> Pairs:
        """The pairs of the next micro-batch."""
        maker = self.maker
        ids, host_rows, student_rows = self._next()
        maker.prefetch(host_rows, student_rows)
        self.next_id += self.stride
        draws, latents = self.draws(ids), maker.start_latents(ids)
        rows, student_rows = upload(host_rows, maker.device), upload(student_rows, maker.device)
        out = lockstep_rollout(maker.predictor, maker.grid, draws, latents, rows)
        if maker.predictor.table.on_host:
            maker.prefetch(*self._next()[1:])  # while the device is busy
        return Pairs(
            x_s=out.x_s,
            s=draws.s,
            target=out.target,
            t=out.t,
            rows=student_rows,
            weight=maker.weights[upload(draws.stop_index(), maker.device) + 1],
            sample_ids=upload(ids, maker.device),
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The first id of the next micro-batch of all ranks, and how the guidance branches run."""
        return {"next_id": torch.tensor(self.next_id - self.offset), **self.maker.predictor.state_dict()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state_dict()`. Raises ValueError where it is none of this rollout's."""
        check_layout(layout_of(state.items()), layout_of(self.state_dict().items()))
        check_range("next_id", state["next_id"], 0, MAX_SAMPLE_ID)
        self.next_id = int(state["next_id"]) + self.offset
        self.maker.predictor.load_state_dict(state)
