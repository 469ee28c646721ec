"""Updates that stand out: losses far above the usual, and updates that left the weights unchanged.

Shape letters: B pairs of one micro-batch, U updates between two flushes, W = WORST pairs.
"""

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
RECENT = 100
"""A loss is compared with the median of this many updates before it."""
LEAST_RECENT = 20
"""No loss is called a spike before there are this many."""


@dataclass(frozen=True)
class Skip:
    """An update that left the weights unchanged."""

    update: int
    """The number of the update, from 1."""
    in_a_row: int
    """Skipped updates in a row, this one included."""
    in_all: int
    """Skipped updates of the run, this one included."""


class Spikes:
    """Warns of updates whose loss is a spike, and names their worst pairs.

    The worst pairs of each update since the last flush stay on the device.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.factor, self.world = config.log.spike, world
        every, device = config.log.every, world.device
        self.worst = torch.full((every, WORST), -math.inf, device=device)
        """(U, W) highest losses of each update; -inf where there are fewer pairs."""
        self.worst_pairs = torch.zeros(every, WORST, 3, dtype=torch.int64, device=device)
        """(U, W, 3) sample id, t and s of these pairs."""
        self.recent: deque[float] = deque(maxlen=RECENT)
        """Mean losses of recent updates, oldest first."""

    def add(self, position: int, pairs: Pairs, per_pair: torch.Tensor) -> None:
        """Add the losses `per_pair` (B,) of a micro-batch.

        `position` is the update's since the last flush, from 0 to U - 1. A pair that weighs 0 does not
        count.
        """
        per_pair = torch.where(pairs.weight > 0, per_pair, -math.inf)
        # A loss that is not finite counts as the worst of all; NaN would not sort among numbers.
        losses = torch.cat([self.worst[position], torch.where(per_pair < math.inf, per_pair.float(), math.inf)])
        names = torch.cat([self.worst_pairs[position], torch.stack([pairs.sample_ids, pairs.t, pairs.s], dim=1)])
        top = losses.topk(WORST)
        self.worst[position], self.worst_pairs[position] = top.values, names[top.indices]

    def warn(self, first: int, losses: list[float]) -> None:
        """Warn of each spike among the mean losses of the updates from number `first` on.

        All ranks call this together with the same losses.
        """
        for position, loss in enumerate(losses):
            usual = statistics.median(self.recent) if len(self.recent) >= LEAST_RECENT else math.inf
            if self.factor > 0 and loss > self.factor * usual:
                ratio = loss / usual if usual else math.inf
                reason = f"{ratio:.1f} times the median of the {len(self.recent)} before"
                self._warn(position, first + position, loss, reason)
            elif not math.isfinite(loss):
                self._warn(position, first + position, loss, "no pair's is finite")
            if math.isfinite(loss):
                self.recent.append(loss)

    def _warn(self, position: int, update: int, loss: float, reason: str) -> None:
        """Gather the worst pairs of all ranks, and log one line."""
        by_rank = self.world.gather((self.worst[position].tolist(), self.worst_pairs[position].tolist()))
        pairs = [pair for values, names in by_rank for pair in zip(values, names, strict=True)]
        worst = sorted((pair for pair in pairs if pair[0] > -math.inf), reverse=True)
        logger.warning(
            "update %d: loss %.4g, %s; worst pairs: %s; see them with --replay-step %d",
            update,
            loss,
            reason,
            "; ".join(f"sample {i} t {t} s {s} loss {value:.4g}" for value, (i, t, s) in worst[:WORST]),
            update,
        )

    def reset(self) -> None:
        """Forget the worst pairs."""
        self.worst.fill_(-math.inf)


class Skips:
    """Counts updates that left the weights unchanged."""

    def __init__(self) -> None:
        self.in_all = self.in_a_row = 0
        self.last: list[Skip] = []
        """The skips that the last call of `count` has found."""

    def count(self, first: int, applied: list[bool]) -> None:
        """Count the skips among the updates from number `first` on.

        `applied` says of each whether it moved the weights.
        """
        self.last = []
        for update, moved in enumerate(applied, first):
            self.in_all += not moved
            self.in_a_row = 0 if moved else self.in_a_row + 1
            if not moved:
                self.last.append(Skip(update, self.in_a_row, self.in_all))
