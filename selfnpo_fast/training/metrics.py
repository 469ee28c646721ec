"""Sums of a run's metrics, kept on the device between two flushes.

Shape letters: B pairs of one micro-batch, U updates between two flushes, L quarters of the noise
levels.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.rollout import Pairs
from selfnpo_fast.runtime.layout import check_layout, layout_of
from selfnpo_fast.runtime.world import World

NOISE_BINS = 4
"""L."""
_RANK_SUMS = ("loss", "count", "update_loss", "update_count", "forwards")
"""The sums that differ between ranks."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The sums of all ranks since the last flush, on the host."""

    loss: torch.Tensor
    """(L,) sums of the losses of pairs, by the quarter of their noise level."""
    count: torch.Tensor
    """(L,) numbers of these pairs."""
    forwards: float
    """Samples that the reference has forwarded."""
    update_loss: torch.Tensor
    """(U,) mean loss of each update; NaN where no pair's loss was finite."""
    grad_norm: float
    """Mean gradient norm of the updates whose norm was finite; 0 where there were none."""
    seconds: float
    """Seconds since the last flush."""

    @property
    def mean_loss(self) -> float:
        """The mean over all pairs; NaN where there were none."""
        return (self.loss.sum() / self.count.sum()).item() if self.count.sum() else math.nan

    def quarter_loss(self, index: int) -> float:
        """Mean loss of a quarter of the noise levels; NaN where it had no pairs."""
        count = self.count[index].item()
        return self.loss[index].item() / count if count else math.nan


class Metrics:
    """Sums on the device. The host reads them only in `totals`, which all ranks call together.

    A pair that weighs 0, or whose loss is not finite, enters no sum.
    """

    def __init__(self, config: TrainConfig, world: World, timesteps: int) -> None:
        """Empty sums; `timesteps` are those of the model's training."""
        self.world, self.timesteps, self.every = world, timesteps, config.log.every
        every, device = config.log.every, world.device
        # This rank's sums over pairs: loss and count by noise level, then by update.
        self.loss, self.count = torch.zeros(NOISE_BINS, device=device), torch.zeros(NOISE_BINS, device=device)
        self.update_loss, self.update_count = torch.zeros(every, device=device), torch.zeros(every, device=device)
        self.forwards = torch.zeros(1, dtype=torch.float64)
        # The same on all ranks: sum and number of finite norms, and which updates moved weights.
        # Norms are finite in float32, and so is their sum in float64.
        self.norm = torch.zeros((), dtype=torch.float64, device=device)
        self.finite = torch.zeros((), device=device)
        self.applied = torch.ones(every, dtype=torch.bool, device=device)
        self.pending = 0  # updates since the last flush
        self.clock = time.perf_counter()

    def add(self, pairs: Pairs, per_pair: torch.Tensor) -> None:
        """Add the losses `per_pair` (B,) of one micro-batch of the present update."""
        level = pairs.s * NOISE_BINS // self.timesteps
        finite = per_pair.isfinite() & (pairs.weight > 0)
        loss, one = torch.where(finite, per_pair.float(), 0), finite.float()
        self.loss.index_add_(0, level, loss)
        self.count.index_add_(0, level, one)
        self.update_loss[self.pending] += loss.sum()
        self.update_count[self.pending] += one.sum()

    def close_update(self, norm: torch.Tensor, applied: torch.Tensor, forwards: int) -> None:
        """End the present update.

        norm        scalar, its gradient norm
        applied     scalar, whether it moved the weights
        forwards    samples that this rank's reference forwarded for it
        """
        norm = norm.to(self.norm.device)
        self.norm += torch.where(norm.isfinite(), norm, 0)
        self.finite += norm.isfinite()
        self.applied[self.pending].copy_(applied)
        self.forwards += forwards
        self.pending += 1

    def totals(self) -> Totals:
        """The sums of all ranks, and the time since the last call; all ranks call this together."""
        sums = [self.loss, self.count, self.forwards.to(self.loss), self.update_loss, self.update_count]
        joined = torch.cat(sums)
        if self.world.size > 1:
            torch.distributed.all_reduce(joined)
        loss, count, forwards, update_loss, update_count = joined.cpu().split([len(part) for part in sums])
        # The host has waited for the device: the time is that of all updates.
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        return Totals(
            loss=loss,
            count=count,
            forwards=forwards.item(),
            update_loss=update_loss / update_count,
            grad_norm=(self.norm / self.finite.clamp(min=1)).item(),
            seconds=seconds,
        )

    def reset(self) -> None:
        """Start all sums from zero."""
        for name in (*_RANK_SUMS, "norm", "finite"):
            getattr(self, name).zero_()
        self.pending = 0

    def restart_clock(self) -> None:
        """Leave the time since the last flush (of drawing or saving) out of the rates."""
        self.clock = time.perf_counter()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's sums since the last flush; those of all ranks may be added up."""
        return {name: getattr(self, name) for name in _RANK_SUMS}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state_dict()`. With another `log.every` the sums start from zero.

        Raises ValueError where `state` holds other tensors.
        """
        expected = layout_of(self.state_dict().items())
        if "update_loss" in state and state["update_loss"].ndim == 1:
            every = tuple(state["update_loss"].shape)
            expected |= {name: (torch.float32, every) for name in ("update_loss", "update_count")}
        check_layout(layout_of(state.items()), expected)
        if len(state["update_loss"]) == self.every:
            for name in _RANK_SUMS:
                getattr(self, name).copy_(state[name])

    def reshard(self, states: list[dict[str, torch.Tensor]], world: World) -> dict[str, torch.Tensor]:
        """One rank's part of the states that another number of ranks have saved.

        The sums belong to no rank in particular: the first rank continues all of them.
        """
        total = {name: sum(state[name] for state in states) for name in states[0]}
        return total if world.is_main else {name: torch.zeros_like(value) for name, value in total.items()}
