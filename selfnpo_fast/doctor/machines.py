"""How long an update takes, from the rates of a GPU's data sheet or those of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from selfnpo_fast.doctor.costs import PlannedRun, update_flops
from selfnpo_fast.runtime.dtypes import DTYPES
from selfnpo_fast.training.engine import zero_stage


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device to train on."""

    name: str
    """As reports print it."""
    flops: dict[str, float]
    """FLOP/s by precision: "fp32", "bf16", "fp16"."""
    bandwidth: float
    """Bytes per second of its memory."""
    utilisation: float
    """Share of `flops` that networks are assumed to reach."""
    source: str
    """Where the rates come from."""
    gpu: bool = True
    """Whether its hours count as GPU hours."""


GPU_UTILISATION = 0.35
"""Assumed for UNets of Stable Diffusion's size in PyTorch; it was never measured on a GPU."""

GPUS = (
    Machine(
        name="A100 SXM 80 GB",
        flops={"fp32": 19.5e12, "bf16": 312e12, "fp16": 312e12},
        bandwidth=2039e9,
        utilisation=GPU_UTILISATION,
        source="NVIDIA A100 data sheet, dense; fp32 without TF32",
    ),
    Machine(
        name="H100 SXM 80 GB",
        flops={"fp32": 67e12, "bf16": 989e12, "fp16": 989e12},
        bandwidth=3350e9,
        utilisation=GPU_UTILISATION,
        source="NVIDIA H100 data sheet, dense; fp32 without TF32",
    ),
)

THIS_MACHINE_UTILISATION = 0.8
"""Share of one convolution's rate that whole networks are assumed to reach on this machine.

On the development machine, with one thread, updates of sd15_small take the time that follows from
it. Updates of digits, whose layers are tiny, take twice that time.
"""


def update_seconds(run: PlannedRun, machine: Machine) -> float | None:
    """Seconds of one update, or None where the machine has no rate for the run's precision.

    The networks run at the assumed share of the machine's FLOP/s; then optimiser and EMA run at the
    full bandwidth of its memory. Communication between ranks, work of the host and loading of data
    are left out, and nothing overlaps.
    """
    rate = machine.flops.get(run.config.engine.precision)
    if rate is None:
        return None
    network_seconds = update_flops(run).total / run.world_size / (rate * machine.utilisation)
    return network_seconds + _update_traffic(run) / machine.bandwidth


def _update_traffic(run: PlannedRun) -> float:
    """Bytes that optimiser and EMA read and write on one rank in one update."""
    config, trained = run.config, run.parameter_counts.trained
    shard = trained / (run.world_size if zero_stage(config) else 1)
    width = DTYPES[config.engine.precision].itemsize
    cast = width if width < 4 else 0  # the half-precision copy of a float32 master is written as well
    moments = 8 if config.optimizer.name == "adamw" else 2
    # Master weight and moments are read and written, the float32 gradient is read.
    step = shard * (2 * 4 + 4 + 2 * moments + cast)
    average = trained * (2 * 4 + width + cast) if config.reference.kind == "ema" else 0
    return step + average


def measure_this_machine(precision: str) -> Machine | None:
    """Measures this machine's rates in about a second; None for fp16 without a GPU.

    FLOP/s are those of a 3x3 convolution of 320 channels, a layer of SD1.5; the bandwidth is that
    of a copy.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision == "fp16" and device.type == "cpu":
        return None
    dtype = DTYPES[precision]
    channels, side, batch = 320, 32, 2
    layer = nn.Conv2d(channels, channels, 3, padding=1, dtype=dtype, device=device)
    x = torch.randn(batch, channels, side, side, dtype=dtype, device=device)
    source = torch.empty(2**26, dtype=torch.uint8, device=device)

    def shortest_seconds(action: Callable[[], object]) -> float:
        """Seconds of the fastest of four calls."""
        shortest = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()
            shortest = min(shortest, time.perf_counter() - start)
        return shortest

    with torch.no_grad():
        rate = 2 * batch * side**2 * 9 * channels**2 / shortest_seconds(lambda: layer(x))
        bandwidth = 2 * source.nbytes / shortest_seconds(source.clone)
    return Machine(
        name="this machine",
        flops={precision: rate},
        bandwidth=bandwidth,
        utilisation=THIS_MACHINE_UTILISATION,
        source="measured just now: a 3x3 convolution of 320 channels, a copy",
        gpu=device.type == "cuda",
    )
