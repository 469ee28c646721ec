"""Sums of a run's metrics, kept on the device between two flushes.

Shape letters: B pairs of a micro-batch, U updates between two flushes, L quarters of the noise levels.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.rollout import Pairs
from selfnpo_fast.runtime.world import World

NOISE_BINS = 4


@dataclass(frozen=True)
class Totals:
    """What all ranks together have summed up since the last flush, on the host."""

    loss: torch.Tensor
    """(L,) sums of the losses of pairs, by the quarter of their noise level."""
    count: torch.Tensor
    """(L,) numbers of these pairs."""
    forwards: float
    """Samples that the reference has forwarded."""
    update_loss: torch.Tensor
    """(U,) mean loss of each update; NaN where no pair's was finite."""
    grad_norm: float
    """Mean gradient norm of the updates whose norm was finite."""
    seconds: float
    """Since the last flush."""

    @property
    def mean_loss(self) -> float:
        """Over all pairs; NaN where there were none."""
        return (self.loss.sum() / self.count.sum()).item() if self.count.sum() else math.nan

    def quarter_loss(self, index: int) -> float:
        """Mean loss of a quarter of the noise levels; NaN where it had no pairs."""
        pairs = self.count[index].item()
        return self.loss[index].item() / pairs if pairs else math.nan


class Metrics:
    """Sums on the device; host reads happen in `totals` only, which all ranks call together.

    A pair whose loss is not finite enters no sum.
    """

    def __init__(self, config: TrainConfig, world: World, timesteps: int) -> None:
        self.world, self.timesteps, self.every = world, timesteps, config.log.every
        every, device = config.log.every, world.device
        # This rank's share of sums over pairs: loss and count by noise level, then by update since the last flush.
        self.loss, self.count = torch.zeros(NOISE_BINS, device=device), torch.zeros(NOISE_BINS, device=device)
        self.update_loss, self.update_count = torch.zeros(every, device=device), torch.zeros(every, device=device)
        self.forwards = torch.zeros(1, dtype=torch.float64)
        # The same on all ranks.
        self.norm = torch.zeros((), device=device)
        self.finite = torch.zeros((), device=device)
        self.applied = torch.ones(every, dtype=torch.bool, device=device)  # by update, as losses are
        self.pending = 0
        self.clock = time.perf_counter()

    def add(self, pairs: Pairs, per_pair: torch.Tensor) -> None:
        """Note the losses (B,) of one micro-batch of the present update."""
        level = pairs.s * NOISE_BINS // self.timesteps
        finite = per_pair.isfinite()
        loss, one = torch.where(finite, per_pair.float(), 0), finite.float()
        self.loss.index_add_(0, level, loss)
        self.count.index_add_(0, level, one)
        self.update_loss[self.pending] += loss.sum()
        self.update_count[self.pending] += one.sum()

    def close_update(self, norm: torch.Tensor, applied: torch.Tensor, forwards: int) -> None:
        """Note the end of an update: its gradient norm and whether weights moved (scalar tensors), and this rank's
        reference forwards."""
        norm = norm.to(self.norm.device)
        self.norm += torch.where(norm.isfinite(), norm, 0)
        self.finite += norm.isfinite()
        self.applied[self.pending].copy_(applied)
        self.forwards += forwards
        self.pending += 1

    def totals(self) -> Totals:
        """Sums over all ranks."""
        sums = [self.loss, self.count, self.forwards.to(self.loss), self.update_loss, self.update_count]
        joined = torch.cat(sums)
        if self.world.size > 1:
            torch.distributed.all_reduce(joined)
        now, sizes = time.perf_counter(), [NOISE_BINS, NOISE_BINS, 1, self.every, self.every]
        loss, count, used, update_loss, update_count = joined.cpu().split(sizes)
        grad_norm = (self.norm / self.finite.clamp(min=1)).item()
        seconds, self.clock = now - self.clock, now
        return Totals(loss, count, used.item(), update_loss / update_count, grad_norm, seconds)

    def reset(self) -> None:
        """Start the sums again."""
        for tensor in (self.loss, self.count, self.update_loss, self.update_count, self.forwards, self.norm):
            tensor.zero_()
        self.finite.zero_()
        self.pending = 0

    def restart_clock(self) -> None:
        """Leave what came since the last flush (drawing, saving) out of the rates."""
        self.clock = time.perf_counter()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's sums since the last flush; those of all ranks may be added up."""
        names = ("loss", "count", "update_loss", "update_count", "forwards")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state_dict()`. With another `log.every` the sums start from zero."""
        if len(state["update_loss"]) == len(self.update_loss):
            for name, value in state.items():
                getattr(self, name).copy_(value)

    def reshard(self, states: list[dict[str, torch.Tensor]], world: World) -> dict[str, torch.Tensor]:
        """Sums over ranks belong to no rank in particular: the first rank carries them on."""
        total = {name: sum(state[name] for state in states) for name in states[0]}
        return total if world.is_main else {name: torch.zeros_like(value) for name, value in total.items()}
