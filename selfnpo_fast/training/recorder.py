"""The record of a run, on rank 0: progress bar, metrics.jsonl, TensorBoard scalars and pictures."""

from __future__ import annotations

import json
import math
import resource
import statistics
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.rollout import Pairs
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import one_line
from selfnpo_fast.runtime.folders import write_file
from selfnpo_fast.runtime.world import World

NOISE_BINS = 4
WORST = 4
"""Pairs of each update that are remembered in case its loss is a spike."""
RECENT, LEAST_RECENT = 100, 20
"""A spike is held against the median of the last RECENT updates, once there are LEAST_RECENT."""


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory: of the device on CUDA, of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


@dataclass(frozen=True)
class Skip:
    """An update that left the weights as they were, and how many there have been with it."""

    update: int
    in_a_row: int
    in_all: int


class Recorder:
    """Sums on the device between two flushes; host reads happen in `flush` alone, which all ranks call together.

    A pair whose loss is not finite enters no sum. `open` makes the files; until then nothing is written.
    """

    def __init__(self, config: TrainConfig, world: World, timesteps: int) -> None:
        self.config, self.world, self.timesteps = config, world, timesteps
        every, device = config.log.every, world.device
        # This rank's share of sums over pairs: loss and count by noise level, then by update since the last flush.
        self.loss, self.count = torch.zeros(NOISE_BINS, device=device), torch.zeros(NOISE_BINS, device=device)
        self.update_loss, self.update_count = torch.zeros(every, device=device), torch.zeros(every, device=device)
        self.forwards = torch.zeros(1, dtype=torch.float64)
        self.worst = torch.full((every, WORST), -math.inf, device=device)
        self.worst_facts = torch.zeros(every, WORST, 3, dtype=torch.int64, device=device)  # sample id, t, s
        # The same on all ranks.
        self.norm = torch.zeros((), device=device)
        self.finite = torch.zeros((), device=device)
        self.applied = torch.ones(every, dtype=torch.bool, device=device)  # by update, as losses are
        self.pending, self.skipped, self.skipped_in_a_row = 0, 0, 0
        self.skips: list[Skip] = []
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.clock = time.perf_counter()
        self.bar = self.writer = self.output = None

    def open(self, output: Path, update: int) -> None:
        """Start writing after update `update`; what an earlier run recorded beyond it is dropped."""
        self.output = output
        self.clock = time.perf_counter()
        if not self.world.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        _drop_rows_after(output / "metrics.jsonl", update)
        self.writer = SummaryWriter(output / "tensorboard", purge_step=update + 1 if update else None)
        self.bar = tqdm(total=self.config.updates, initial=update, unit="update", dynamic_ncols=True)

    def add(self, pairs: Pairs, per_pair: torch.Tensor) -> None:
        """Note the losses (B,) of one micro-batch of the present update."""
        level = pairs.s * NOISE_BINS // self.timesteps
        finite = per_pair.isfinite()
        loss, one = torch.where(finite, per_pair.float(), 0), finite.float()
        self.loss.index_add_(0, level, loss)
        self.count.index_add_(0, level, one)
        self.update_loss[self.pending] += loss.sum()
        self.update_count[self.pending] += one.sum()
        # NaN would hide among numbers: what is not finite counts as the worst of all.
        ranked = torch.cat([self.worst[self.pending], torch.where(finite, per_pair.float(), math.inf)])
        facts = torch.cat([self.worst_facts[self.pending], torch.stack([pairs.sample_ids, pairs.t, pairs.s], dim=1)])
        top = ranked.topk(WORST)
        self.worst[self.pending], self.worst_facts[self.pending] = top.values, facts[top.indices]

    def close_update(self, norm: torch.Tensor, applied: torch.Tensor, forwards: int) -> None:
        """Note the end of an update: its gradient norm and whether weights moved (scalar tensors), and this rank's
        reference forwards."""
        norm = norm.to(self.norm.device)
        self.norm += torch.where(norm.isfinite(), norm, 0)
        self.finite += norm.isfinite()
        self.applied[self.pending].copy_(applied)
        self.forwards += forwards
        self.pending += 1
        if self.bar is not None:
            self.bar.update(1)

    def flush(self, update: int, lr: float) -> dict[str, float]:
        """Write one line of metrics up to `update`, and a word about every spike of the loss; note the `skips`."""
        sums = [self.loss, self.count, self.forwards.to(self.loss), self.update_loss, self.update_count]
        totals = torch.cat(sums)
        if self.world.size > 1:
            torch.distributed.all_reduce(totals)
        now = time.perf_counter()
        every = self.config.log.every
        loss, count, used, update_loss, update_count = totals.cpu().split([NOISE_BINS, NOISE_BINS, 1, every, every])
        pairs = count.sum().item()
        made = self.pending * self.config.engine.batch_size
        self._count_skips(update)
        row = {
            "update": update,
            "loss": (loss.sum() / count.sum()).item(),
            "grad_norm": (self.norm / self.finite.clamp(min=1)).item(),
            "lr": lr,
            "skipped": self.skipped,
            "pairs_per_second": made / (now - self.clock),
            "reference_forwards_per_pair": used.item() / made,
            "peak_memory_gib": peak_memory_gib(self.world.device),
        }
        for i, (part, n) in enumerate(zip(loss.tolist(), count.tolist(), strict=True)):
            row[f"loss_s_quarter_{i + 1}"] = part / n if n else math.nan
        if not pairs:
            row["loss"] = math.nan
        self._look_for_spikes(update, update_loss / update_count)
        self.clock = now
        for tensor in (*sums, self.forwards, self.norm, self.finite):
            tensor.zero_()
        self.worst.fill_(-math.inf)
        self.pending = 0
        if self.world.is_main:
            self._try(lambda: self._write(update, row))
        return row

    def _count_skips(self, update: int) -> None:
        self.skips = []
        for place, applied in enumerate(self.applied[: self.pending].tolist()):
            self.skipped += not applied
            self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
            if not applied:
                self.skips.append(Skip(update - self.pending + place + 1, self.skipped_in_a_row, self.skipped))

    def _look_for_spikes(self, update: int, losses: torch.Tensor) -> None:
        """`losses` (log.every,): the mean loss of each update since the last flush."""
        for place, loss in enumerate(losses[: self.pending].tolist()):
            usual = statistics.median(self.recent) if len(self.recent) >= LEAST_RECENT else math.inf
            spike = self.config.log.spike > 0 and loss > self.config.log.spike * usual
            if spike or not math.isfinite(loss):
                said = self.world.gather((self.worst[place].tolist(), self.worst_facts[place].tolist()))
                pairs = [pair for values, facts in said for pair in zip(values, facts, strict=True)]
                worst = sorted((pair for pair in pairs if pair[0] > -math.inf), reverse=True)
                number = update - self.pending + place + 1
                usually = f"{loss / usual:.1f} times the median of the {len(self.recent)} before"
                logger.warning(
                    "update %d: loss %.4g, %s; worst pairs: %s; see them with --replay-step %d",
                    number,
                    loss,
                    usually if spike else "no pair's is finite",
                    "; ".join(f"sample {i} t {t} s {s} loss {value:.4g}" for value, (i, t, s) in worst[:WORST]),
                    number,
                )
            if math.isfinite(loss):
                self.recent.append(loss)

    def _write(self, update: int, row: dict[str, float]) -> None:
        with (self.output / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: value if math.isfinite(value) else None for key, value in row.items()}) + "\n")
        for key, value in row.items():
            if key != "update":
                self.writer.add_scalar(f"train/{key}", value, update)
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['pairs_per_second']:.1f} pairs/s")

    def _try(self, action) -> None:
        """A record that cannot be written costs a warning, not the run."""
        try:
            action()
        except OSError as error:
            logger.warning("the record in %s could not be written: %s; training goes on", self.output, one_line(error))

    def restart_clock(self) -> None:
        """Leave what came since the last flush (drawing, saving) out of the rates."""
        self.clock = time.perf_counter()

    def picture(self, update: int, name: str, grid: Image.Image) -> None:
        """Save a grid as PNG under samples/ and into TensorBoard."""
        if not self.world.is_main:
            return
        import numpy as np

        path = self.output / "samples" / f"{name}-{update:06d}.png"

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            grid.save(path)
            self.writer.add_image(name, np.asarray(grid), update, dataformats="HWC")
            logger.info("samples (above: base; below: base + negative): %s", path)

        self._try(write)

    def close(self) -> None:
        """Finish the bar and the event file."""
        if self.bar is not None:
            self.bar.close()
            self._try(self.writer.close)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's sums since the last flush; those of all ranks may be added up."""
        names = ("loss", "count", "update_loss", "update_count", "forwards")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state_dict()`. With another `log.every` the sums start anew."""
        if len(state["update_loss"]) == len(self.update_loss):
            for name, value in state.items():
                getattr(self, name).copy_(value)

    def counters(self) -> dict:
        """What is the same on all ranks, as plain values."""
        return {
            "every": self.config.log.every,
            "norm": self.norm.item(),
            "finite": self.finite.item(),
            "pending": self.pending,
            "applied": self.applied.tolist(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "recent": list(self.recent),
        }

    def load_counters(self, saved: dict) -> None:
        """Go on from `counters()`."""
        if saved["every"] == self.config.log.every:
            self.norm.fill_(saved["norm"])
            self.finite.fill_(saved["finite"])
            self.applied.copy_(torch.tensor(saved["applied"]))
            self.pending = saved["pending"]
        self.skipped, self.skipped_in_a_row = saved["skipped"], saved["skipped_in_a_row"]
        self.recent.extend(saved["recent"])


def _drop_rows_after(path: Path, update: int) -> None:
    """Keep the rows of metrics.jsonl up to `update`: the run that wrote the others was killed before it saved them."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["update"] <= update:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # half a line, cut off by the kill
    write_file(path, "".join(kept))
