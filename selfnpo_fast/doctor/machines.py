"""How long an update takes, from the rates of a GPU's data sheet or those of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from selfnpo_fast.doctor.costs import PlannedRun, update_flops
from selfnpo_fast.runtime.console import logger
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

# Multiply-adds of all units at the boost clock, and bits of the memory bus times their rate: the data
# sheets' figures, which none of these cards has been measured against.
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
    Machine(
        name="RTX 4090 24 GB",
        flops={"fp32": 82.6e12, "bf16": 165.2e12, "fp16": 165.2e12},
        bandwidth=1008e9,
        utilisation=GPU_UTILISATION,
        source="NVIDIA Ada architecture paper, GeForce RTX 4090, dense, sums in fp32; fp32 without TF32",
    ),
)

THIS_MACHINE_UTILISATION = 0.8
"""Share of one convolution's rate that whole networks are assumed to reach on this machine.

On the development machine, with one CPU thread, updates of sd15_small take the time that follows
from it. Updates of digits, whose layers are tiny, take twice that time. It was never measured on a
GPU.
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


@dataclass(frozen=True)
class Probe:
    """What this machine's rates are measured with."""

    batch: int
    """Rows of the convolution."""
    side: int
    """Their height and width."""
    copied: int
    """Bytes of the copy."""


PROBES = {"cpu": Probe(2, 32, 2**26), "cuda": Probe(64, 64, 2**30)}
"""By type of device. On a GPU, work of a CPU's size would take less time than its launch, and would
not leave the cache: there the convolution is that of SD1.5's first layers with batch 64."""
CHANNELS = 320


def measure_this_machine(
    precision: str, *, device: torch.device | None = None, kind: str | None = None
) -> Machine | None:
    """Measures this machine's rates in about a second; None for fp16 without a GPU, and where there
    is no room for the smallest measurement.

    FLOP/s are those of a 3x3 convolution of 320 channels, a layer of SD1.5; the bandwidth is that
    of a copy. On a GPU both are halved in size until they fit.

    device    by default the GPU, or the CPU where there is none
    kind      "cuda" or "cpu": what to measure with; by default the type of `device`
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = kind or device.type
    if precision == "fp16" and kind == "cpu":
        return None
    probe = PROBES[kind]

    def shortest_seconds(action: Callable[[], object]) -> float:
        """Seconds of the fastest of eight calls, from an idle device to an idle device."""
        shortest = float("inf")
        for _ in range(8):
            _synchronize(kind)
            start = time.perf_counter()
            action()
            _synchronize(kind)
            shortest = min(shortest, time.perf_counter() - start)
        return shortest

    def convolution(batch: int) -> float:
        """FLOP/s of the convolution."""
        layer = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, dtype=DTYPES[precision], device=device)
        x = torch.randn(batch, CHANNELS, probe.side, probe.side, dtype=DTYPES[precision], device=device)
        return 2 * batch * probe.side**2 * 9 * CHANNELS**2 / shortest_seconds(lambda: layer(x))

    def copy(size: int) -> float:
        """Bytes per second of a copy, which reads and writes `size` bytes each."""
        source = torch.empty(size, dtype=torch.uint8, device=device)
        return 2 * size / shortest_seconds(source.clone)

    try:
        with torch.no_grad():
            batch, rate = _what_fits(convolution, probe.batch)
            copied, bandwidth = _what_fits(copy, probe.copied)
    except torch.OutOfMemoryError:
        logger.warning("this machine: not measured, since its memory is full")
        return None
    return Machine(
        name="this machine",
        flops={precision: rate},
        bandwidth=bandwidth,
        utilisation=THIS_MACHINE_UTILISATION,
        source=f"measured just now: a 3x3 convolution of {CHANNELS} channels with batch {batch}, {probe.side} wide; "
        f"a copy of {copied / 2**20:g} MiB",
        gpu=kind == "cuda",
    )


def _synchronize(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()


def _what_fits(rate: Callable[[int], float], size: int) -> tuple[int, float]:
    """The first of `size`, its half and so on that fits into memory, and the rate with it.

    Raises torch.OutOfMemoryError where not even 1 does.
    """
    while True:
        try:
            return size, rate(size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
