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


@torch.no_grad()
def walk(
    predictor: GuidedPredictor,
    grid: Grid,
    x: torch.Tensor,
    index: torch.Tensor,
    stop: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """DDIM steps from states x at grid indices `index` down to grid indices `stop`.

    x              (B, ...), on the device; so is the result (B, ...)
    index, stop    (B,) int64, on the host: the device is never asked how many samples still move
    rows           (B,) int64, on the device: the prompts' rows of the conditioning table
    """
    # Samples with the most steps come first, so that those that still move are always a prefix.
    order = (index - stop).argsort(descending=True, stable=True)
    steps = (index - stop)[order].tolist()
    device_order = order.to(x.device)
    x, index, rows = x[device_order], index[order].to(x.device), rows[device_order]
    arrived = []
    for step in range(steps[0]):
        # Leave samples that have arrived out of the network's batch.
        moving = sum(n > step for n in steps)
        if moving < len(x):
            arrived.append(x[moving:])
            x, index, rows = x[:moving], index[:moving], rows[:moving]
        # One guided step of all others.
        pos, neg = predictor(x, grid.timestep(index), rows)
        x, _ = guided_step(pos, neg, x, grid.step, index=index + 1)
        index = index - 1
    # The last to arrive come first: join all in sorted order, then restore the caller's order.
    return torch.cat([x, *reversed(arrived)])[device_order.argsort()]


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
        x_start = affine_noise(latents, grid.start, draws.noise, index=start.to(latents.device) + 1)
    x = walk(predictor, grid, x_start, start, stop, rows)
    stop = stop.to(x.device)
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

    def draws(self, ids: torch.Tensor) -> LockstepDraws:
        """The keyed draws of samples `ids` (B,), which are on the host."""
        maker, config = self.maker, self.maker.config
        n = config.grid_steps
        if config.start == "data":
            start_index = randint(maker.key(Draw.START_INDEX, ids), n)
        else:
            start_index = torch.full_like(ids, n - 1)
        steps = torch.full_like(ids, config.max_steps)
        if config.start == "noise" and config.stop == "uniform":
            steps = 1 + randint(maker.key(Draw.STEPS, ids), config.max_steps)
        ids, stop = ids.to(maker.device), (start_index - steps).clamp(min=-1).to(maker.device)
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
        ids = torch.arange(self.next_id, self.next_id + self.batch)
        self.next_id += self.stride
        draws = self.draws(ids)
        ids = ids.to(maker.device)
        latents = maker.start_latents(ids)
        out = lockstep_rollout(maker.predictor, maker.grid, draws, latents, maker.rows(ids))
        return Pairs(
            x_s=out.x_s,
            s=draws.s,
            target=out.target,
            t=out.t,
            rows=maker.student_rows(ids, draws.stop_index().to(maker.device)),
            weight=torch.ones(self.batch, device=maker.device),
            sample_ids=ids,
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
