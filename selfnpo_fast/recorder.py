"""The record of a run, on rank 0: progress bar, metrics.jsonl, TensorBoard scalars and pictures."""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path

import torch
from PIL import Image

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.console import logger
from selfnpo_fast.world import World

NOISE_BINS = 4


def _memory_gib(device: torch.device) -> float:
    """Peak memory: of the device on CUDA, of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


class Recorder:
    """Sums on the device between two flushes; host reads happen in `flush` alone, which all ranks call together."""

    def __init__(self, config: TrainConfig, world: World, output: Path, start_update: int) -> None:
        self.config, self.world, self.output = config, world, output
        self.loss = torch.zeros(NOISE_BINS, device=world.device)
        self.count = torch.zeros(NOISE_BINS, device=world.device)
        self.norm = torch.zeros((), device=world.device)
        self.finite = torch.zeros((), device=world.device)
        self.forwards = 0
        self.clock = time.perf_counter()
        self.bar = self.writer = None
        if world.is_main:
            from torch.utils.tensorboard import SummaryWriter
            from tqdm import tqdm

            self.writer = SummaryWriter(output / "tensorboard")
            self.bar = tqdm(total=config.updates, initial=start_update, unit="update", dynamic_ncols=True)

    def add(self, s_level: torch.Tensor, per_pair: torch.Tensor) -> None:
        """Note the losses (B,) of one micro-batch and their noise-level bins (B,)."""
        self.loss.index_add_(0, s_level, per_pair.float())
        self.count.index_add_(0, s_level, torch.ones_like(per_pair, dtype=torch.float32))

    def close_update(self, norm: torch.Tensor) -> None:
        """Note one optimiser update and its gradient norm."""
        # fp16 skips an update whose gradients overflow; its norm is infinite and says nothing.
        finite = norm.to(self.norm.device).isfinite()
        self.norm += torch.where(finite, norm.to(self.norm.device), 0)
        self.finite += finite
        if self.bar is not None:
            self.bar.update(1)

    def flush(self, update: int, lr: float, forwards: int) -> dict[str, float]:
        """Write one line of metrics; `forwards` is this rank's running count of reference forwards."""
        totals = torch.cat([self.loss, self.count, torch.tensor([float(forwards - self.forwards)]).to(self.loss)])
        if self.world.size > 1:
            torch.distributed.all_reduce(totals)
        now = time.perf_counter()
        loss, count, used = totals[:NOISE_BINS], totals[NOISE_BINS:-1], totals[-1].item()
        pairs = count.sum().item()
        row = {
            "update": update,
            "loss": (loss.sum() / count.sum()).item(),
            "grad_norm": (self.norm / self.finite.clamp(min=1)).item(),
            "lr": lr,
            "pairs_per_second": pairs / (now - self.clock),
            "reference_forwards_per_pair": used / pairs,
            "peak_memory_gib": _memory_gib(self.world.device),
        }
        for i, (part, n) in enumerate(zip(loss.tolist(), count.tolist(), strict=True)):
            row[f"loss_s_quarter_{i + 1}"] = part / n if n else math.nan
        self.clock, self.forwards = now, forwards
        for tensor in (self.loss, self.count, self.norm, self.finite):
            tensor.zero_()
        if self.world.is_main:
            self._write(update, row)
        return row

    def _write(self, update: int, row: dict[str, float]) -> None:
        with (self.output / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: value if math.isfinite(value) else None for key, value in row.items()}) + "\n")
        for key, value in row.items():
            if key != "update":
                self.writer.add_scalar(f"train/{key}", value, update)
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['pairs_per_second']:.1f} pairs/s")

    def restart_clock(self) -> None:
        """Leave what came since the last flush (drawing, saving) out of the rates."""
        self.clock = time.perf_counter()

    def picture(self, update: int, name: str, grid: Image.Image) -> None:
        """Save a grid as PNG under samples/ and into TensorBoard."""
        if not self.world.is_main:
            return
        import numpy as np

        folder = self.output / "samples"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}-{update:06d}.png"
        grid.save(path)
        self.writer.add_image(name, np.asarray(grid), update, dataformats="HWC")
        logger.info("samples (above: base; below: base + negative): %s", path)

    def close(self) -> None:
        """Finish the bar and the event file."""
        if self.bar is not None:
            self.bar.close()
            self.writer.close()
