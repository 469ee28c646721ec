"""The gate before `bench_sampler.py`'s timings: in float32 all arms draw the same latents.

Pictures in bf16 say nothing: another order of summing moves them as much as a small mistake would.
So the gate builds its own network in float32, and frees it before anything is timed.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from benchmarks.arms.sampler import ARMS, STOCK, TWO, Arm, Bench, Draw, Drawing, calls_to_settle
from benchmarks.environment import exact_float32
from benchmarks.nets import SMALL, BenchNet
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import one_line

STEPS = 3
"""Solver steps: branches that are mixed up show in the first, states that are lost in the next."""
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-3}
"""Largest difference between latents that should be equal, relative to their root mean square.

Seen on a CPU for digits, sd15_small and sd15: 2e-5 at most. On a GPU cuDNN chooses algorithms by
shape, and two networks in turn have other shapes than one batch of both branches. Noise of 1e-6 of
the root mean square after every layer, as float32 rounds, moves the latents of digits by 2e-4;
noise of 1e-5, more than Winograd's convolutions make, by 1e-3. Without the update of one of the 32
to 128 layers that have one they move by 5e-3 to 0.5, and without the negative by more than 1.
"""
TRUTHS = {"plain": STOCK, "negative": TWO}
"""The arms whose latents are the right ones."""


@dataclass
class Gate:
    """What the gate has found."""

    device: torch.device
    errors: dict[str, float] = field(default_factory=dict)
    """By the arm's name: the largest difference from the right latents, relative to their root mean
    square."""
    failures: dict[str, str] = field(default_factory=dict)
    """By the arm's name: why the arm is not to be timed, in one line."""

    @property
    def tolerance(self) -> float:
        """The largest error that passes."""
        return TOLERANCE[self.device.type]

    def record(self) -> dict[str, object]:
        """The gate's entry in the results."""
        return {"precision": "fp32", "tolerance": self.tolerance, "steps": STEPS, "errors": self.errors}


def gate(net: BenchNet, arms: Sequence[Arm], device: torch.device) -> Gate:
    """Runs the arms on the network in float32, with one or two pictures; nothing of it stays."""
    with exact_float32():
        batch = 2 if net.name in SMALL else 1  # two could be mixed up; one is cheaper at full size
        found = check(Bench(net, batch=batch, steps=STEPS, device=device, dtype=torch.float32), arms)
    free(device)
    return found


def free(device: torch.device) -> None:
    """Gives back the memory of networks that nobody uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check(bench: Bench, arms: Sequence[Arm]) -> Gate:
    """Compares the latents of every arm with the right ones; an arm that raises has failed."""
    found, truths = Gate(bench.device), {}
    wanted = {arm.truth for arm in arms}
    for truth in TRUTHS if "negative" in wanted else wanted:
        arm = next(arm for arm in ARMS if arm.name == TRUTHS[truth])
        try:
            truths[truth] = _draw(bench, arm)[-1]
        except Exception as error:
            _fail(found, [a for a in arms if a.truth == truth], f"{arm.name}, the right latents: {one_line(error)}")
    if len(truths) == 2 and not _apart(*truths.values()) > 10 * found.tolerance:
        reason = "the negative does not show in the latents: the gate could not tell the branches apart"
        _fail(found, [arm for arm in arms if arm.truth == "negative"], reason)
    for arm in arms:
        if arm.name in found.failures or arm.truth not in truths:
            continue
        print(f"{bench.net.name}: correctness gate, {arm.name}", file=sys.stderr, flush=True)
        try:
            right = truths[arm.truth]
            drawn = [right] if arm.name == TRUTHS[arm.truth] else _draw(bench, arm)
        except Exception as error:
            _fail(found, [arm], one_line(error))
            continue
        found.errors[arm.name] = error = max(_apart(latents, right) for latents in drawn)
        if not error <= found.tolerance:  # NaN fails, too
            _fail(found, [arm], f"latents differ by {error:.1e}, tolerance {found.tolerance:.0e}")
    return found


def settle(bench: Bench, arm: Arm, draw: Draw) -> list[torch.Tensor]:
    """The latents (B, C, H, W) float32 of the calls after which the arm only repeats itself.

    Raises RuntimeError with the sampler's reason where an arm with graphs captures nothing.
    """
    with _warnings() as lines:
        drawn = [draw().float() for _ in range(calls_to_settle(draw, bench.config.steps))]
    if arm.graphs and not draw.captures:
        raise RuntimeError(lines[-1] if lines else f"no step is captured on {bench.device}")
    return drawn


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """The warnings that the product logs meanwhile."""
    lines: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            lines.append(record.getMessage())
        return True

    logger.addFilter(note)
    try:
        yield lines
    finally:
        logger.removeFilter(note)


def _draw(bench: Bench, arm: Arm) -> list[torch.Tensor]:
    """The latents of one call; with graphs, of calls until steps are replayed."""
    with ExitStack() as undo:
        draw = arm.prepare(bench, undo)
        return settle(bench, arm, draw) if isinstance(draw, Drawing) and arm.graphs else [draw().float()]


def _apart(latents: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference, relative to the right latents' root mean square."""
    return ((latents - right).abs().max() / right.square().mean().sqrt()).item()


def _fail(found: Gate, arms: Sequence[Arm], reason: str) -> None:
    for arm in arms:
        found.failures[arm.name] = reason
        print(f"{arm.name}: the correctness gate failed: {reason}", file=sys.stderr, flush=True)
