"""The record of a run: sums, spikes and skips of all ranks, written by rank 0.

Shape letter: B pairs of one micro-batch.
"""

from __future__ import annotations

import resource
from pathlib import Path

import torch
from PIL import Image

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.rollout import Pairs
from selfnpo_fast.runtime.layout import check_keys, check_number, check_whole_number
from selfnpo_fast.runtime.world import World
from selfnpo_fast.training.metrics import NOISE_BINS, Metrics
from selfnpo_fast.training.outputs import RunOutputs
from selfnpo_fast.training.spikes import RECENT, Skips, Spikes


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the device on CUDA, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


class Recorder:
    """Keeps each update's numbers on the device, and writes them at each flush.

    Nothing is written before `open`.
    """

    def __init__(self, config: TrainConfig, world: World, timesteps: int) -> None:
        """An empty record; `timesteps` are those of the model's training."""
        self.config, self.world = config, world
        self.metrics = Metrics(config, world, timesteps)
        self.spikes, self.skips = Spikes(config, world), Skips()
        self.counters = RecorderCounters(self)
        self.outputs: RunOutputs | None = None

    def open(self, output: Path, update: int) -> None:
        """Continue the record in the folder `output` after update `update`.

        What an earlier run recorded beyond that update is dropped.
        """
        self.metrics.restart_clock()
        if self.world.is_main:
            self.outputs = RunOutputs(output, update, self.config.updates)

    def add(self, pairs: Pairs, per_pair: torch.Tensor) -> None:
        """Add the losses `per_pair` (B,) of one micro-batch of the present update."""
        self.metrics.add(pairs, per_pair)
        self.spikes.add(self.metrics.pending, pairs, per_pair)

    def close_update(self, norm: torch.Tensor, applied: torch.Tensor, forwards: int) -> None:
        """End the present update.

        norm        scalar, its gradient norm
        applied     scalar, whether it moved the weights
        forwards    samples that this rank's reference forwarded for it
        """
        self.metrics.close_update(norm, applied, forwards)
        if self.outputs is not None:
            self.outputs.bar.update(1)

    def flush(self, update: int, lr: float) -> dict[str, float]:
        """Write one row of metrics of the updates since the last flush, up to `update`.

        Warns of spikes of the loss, and counts skipped updates. All ranks call this together.
        """
        metrics, totals = self.metrics, self.metrics.totals()
        pairs = metrics.pending * self.config.engine.batch_size
        first = update - metrics.pending + 1
        self.skips.count(first, metrics.applied[: metrics.pending].tolist())
        row = {
            "update": update,
            "loss": totals.mean_loss,
            "grad_norm": totals.grad_norm,
            "lr": lr,
            "skipped": self.skips.in_all,
            "pairs_per_second": pairs / totals.seconds,
            "reference_forwards_per_pair": totals.forwards / pairs,
            "peak_memory_gib": peak_memory_gib(self.world.device),
        }
        for i in range(NOISE_BINS):
            row[f"loss_s_quarter_{i + 1}"] = totals.quarter_loss(i)
        self.spikes.warn(first, totals.update_loss[: metrics.pending].tolist())
        self.discard()
        if self.outputs is not None:
            self.outputs.write(update, row)
        return row

    def discard(self) -> None:
        """Forget all numbers since the last flush."""
        self.metrics.reset()
        self.spikes.reset()

    def restart_clock(self) -> None:
        """Leave the time since the last flush (of drawing or saving) out of the rates."""
        self.metrics.restart_clock()

    def picture(self, update: int, name: str, grid: Image.Image) -> None:
        """Save a grid as `samples/NAME-NNNNNN.png` and in TensorBoard."""
        if self.outputs is not None:
            self.outputs.picture(update, name, grid)

    def close(self) -> None:
        """Finish the progress bar and TensorBoard's event file."""
        if self.outputs is not None:
            self.outputs.close()


class RecorderCounters:
    """The part of the record that is the same on all ranks, as plain values for a checkpoint."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def state_dict(self) -> dict:
        """Values that JSON can hold; some are read from the device."""
        metrics, skips = self.recorder.metrics, self.recorder.skips
        return {
            "every": metrics.every,
            "norm": metrics.norm.item(),
            "finite": metrics.finite.item(),
            "pending": metrics.pending,
            "applied": metrics.applied.tolist(),
            "skipped": skips.in_all,
            "skipped_in_a_row": skips.in_a_row,
            "recent": list(self.recorder.spikes.recent),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`. With another `log.every` the sums start from zero.

        Raises ValueError for values that `state_dict()` cannot have returned.
        """
        self._check(state)
        metrics, skips, recent = self.recorder.metrics, self.recorder.skips, self.recorder.spikes.recent
        if state["every"] == metrics.every:
            metrics.norm.fill_(state["norm"])
            metrics.finite.fill_(state["finite"])
            metrics.applied.copy_(torch.tensor(state["applied"]))
            metrics.pending = state["pending"]
        skips.in_all, skips.in_a_row = state["skipped"], state["skipped_in_a_row"]
        recent.clear()
        recent.extend(state["recent"])

    @staticmethod
    def _check(state: dict) -> None:
        """ValueError for values that `state_dict()` cannot have returned."""
        check_keys(state, ("every", "norm", "finite", "pending", "applied", "skipped", "skipped_in_a_row", "recent"))
        check_whole_number("every", state["every"], 1)
        for name in ("norm", "finite"):
            check_number(name, state[name])
        check_whole_number("pending", state["pending"], 0, state["every"] - 1)
        for name in ("skipped", "skipped_in_a_row"):
            check_whole_number(name, state[name])
        applied, recent = state["applied"], state["recent"]
        if not isinstance(applied, list) or len(applied) != state["every"]:
            raise ValueError("applied is no list of as many values as `every` says")
        if not all(isinstance(value, bool) for value in applied):
            raise ValueError("applied holds values other than true and false")
        if not isinstance(recent, list) or len(recent) > RECENT:
            raise ValueError(f"recent is no list of at most {RECENT} losses")
        for loss in recent:
            check_number("recent", loss)
