"""Updates that stand out: losses far above the usual, and updates that left the weights as they were."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

import torch

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.rollout import Pairs
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.world import World

WORST = 4
"""Pairs of each update that are remembered in case its loss is a spike."""
RECENT, LEAST_RECENT = 100, 20
"""A spike is held against the median of the last RECENT updates, once there are LEAST_RECENT."""


@dataclass(frozen=True)
class Skip:
    """An update that left the weights as they were, and how many there have been with it."""

    update: int
    in_a_row: int
    in_all: int


class Spikes:
    """The worst pairs of each update since the last flush, on the device, and the losses of recent updates."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.factor, self.world = config.log.spike, world
        every, device = config.log.every, world.device
        self.worst = torch.full((every, WORST), -math.inf, device=device)
        self.worst_facts = torch.zeros(every, WORST, 3, dtype=torch.int64, device=device)  # sample id, t, s
        self.recent: deque[float] = deque(maxlen=RECENT)

    def add(self, position: int, pairs: Pairs, per_pair: torch.Tensor) -> None:
        """Note the losses (B,) of one micro-batch of the update at `position` since the last flush."""
        # NaN would hide among numbers: what is not finite counts as the worst of all.
        ranked = torch.cat([self.worst[position], torch.where(per_pair.isfinite(), per_pair.float(), math.inf)])
        facts = torch.cat([self.worst_facts[position], torch.stack([pairs.sample_ids, pairs.t, pairs.s], dim=1)])
        top = ranked.topk(WORST)
        self.worst[position], self.worst_facts[position] = top.values, facts[top.indices]

    def look(self, first: int, losses: list[float]) -> None:
        """Warn of spikes among the mean losses of the updates from `first` on; all ranks call this together."""
        for position, loss in enumerate(losses):
            usual = statistics.median(self.recent) if len(self.recent) >= LEAST_RECENT else math.inf
            spike = self.factor > 0 and loss > self.factor * usual
            if spike or not math.isfinite(loss):
                usually = f"{loss / usual:.1f} times the median of the {len(self.recent)} before"
                self._warn(position, first + position, loss, usually if spike else "no pair's is finite")
            if math.isfinite(loss):
                self.recent.append(loss)

    def _warn(self, position: int, update: int, loss: float, what: str) -> None:
        found = self.world.gather((self.worst[position].tolist(), self.worst_facts[position].tolist()))
        pairs = [pair for values, facts in found for pair in zip(values, facts, strict=True)]
        worst = sorted((pair for pair in pairs if pair[0] > -math.inf), reverse=True)
        logger.warning(
            "update %d: loss %.4g, %s; worst pairs: %s; see them with --replay-step %d",
            update,
            loss,
            what,
            "; ".join(f"sample {i} t {t} s {s} loss {value:.4g}" for value, (i, t, s) in worst[:WORST]),
            update,
        )

    def reset(self) -> None:
        """Forget the worst pairs."""
        self.worst.fill_(-math.inf)


class Skips:
    """Counts updates that left the weights as they were."""

    def __init__(self) -> None:
        self.in_all = self.in_a_row = 0
        self.last: list[Skip] = []
        """Those since the flush before the last one."""

    def count(self, first: int, applied: list[bool]) -> None:
        """Note which of the updates from `first` on moved the weights."""
        self.last = []
        for update, moved in enumerate(applied, first):
            self.in_all += not moved
            self.in_a_row = 0 if moved else self.in_a_row + 1
            if not moved:
                self.last.append(Skip(update, self.in_a_row, self.in_all))
