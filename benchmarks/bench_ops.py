"""How fast each fused op is next to eager PyTorch, torch.compile and copies of as many bytes.

    python -m benchmarks.bench_ops                  # everything; needs an idle machine
    python -m benchmarks.bench_ops --op tdft_step --shape sd15 --dtype fp32
    python -m benchmarks.bench_ops --quick          # tiny latents

The arms (`arms/ops.py`, `arms/tdft.py`, `arms/ema.py`, `arms/floor.py`):

- ours: the fused op
- eager: PyTorch as diffusers and the authors write it; `tdft_step` also has `eager_by_rows`
- compiled: the same arithmetic under torch.compile, compiled before the timing
- floor: plain copies of as many bytes as the op has to move

Every round times each arm once, with so many calls that they take SAMPLE_SECONDS; ratios are taken
within a round.

Before any timing the results of every op are compared with eager PyTorch and with the reference
backend, on small batches of every shape. Before each case is timed they are compared again at full
size, together with those of the compiled arm. If they differ, nothing is written and the exit
status is 1.

Some notes on the figures. On a CPU torch.randn fills a tensor serially, with any number of threads.
New memory costs page faults, the same in all arms; glibc's MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ decide how many, and the JSON records both. The floor is no strict bound: a
processor reads memory before it writes to it, so an op that reads more than it writes, or updates
in place, may be faster than its floor. On CUDA a sample is timed between two events.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: Python has put this folder on the path, not its parent
    sys.path[0] = str(ROOT)

from selfnpo_fast.runtime.command import short_spin  # noqa: E402

os.environ.update(short_spin())  # before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.arms import ops as op_arms  # noqa: E402
from benchmarks.arms.ema import EmaUpdate  # noqa: E402
from benchmarks.arms.floor import TRAFFIC, Traffic, floor_arm  # noqa: E402
from benchmarks.arms.ops import DTYPES, Comparison, Op  # noqa: E402
from benchmarks.arms.tdft import TdftStep  # noqa: E402
from benchmarks.environment import RESULTS, describe, pick_device, spread, write_result  # noqa: E402
from benchmarks.ops_report import chart, table  # noqa: E402
from selfnpo_fast.runtime.console import quiet_libraries  # noqa: E402
from selfnpo_kernels import backends  # noqa: E402

OPS: dict[str, type[Op]] = {
    "normal": op_arms.Normal,
    "affine_noise": op_arms.AffineNoise,
    "guided_step": op_arms.GuidedStep,
    "guided_step_single": op_arms.GuidedStepSingle,
    "guidance_rescale": op_arms.GuidanceRescale,
    "tdft_step": TdftStep,
    "x0_loss": op_arms.X0Loss,
    "ema_update": EmaUpdate,
}
ARMS = ("ours", "eager", "compiled", "floor")
LATENTS = {
    "sd15": (80, 4, 64, 64),
    "sdxl": (10, 4, 128, 128),
    "cogvideox": (1, 13, 16, 60, 90),
    "uncached": (320, 4, 128, 128),
}
"""Shapes of latents; the last one is larger than the caches of CPUs."""
QUICK_LATENTS = {
    "sd15": (8, 4, 16, 16),
    "sdxl": (2, 4, 32, 32),
    "cogvideox": (1, 3, 16, 6, 10),
    "uncached": (12, 4, 32, 32),
}
NETWORK, QUICK_NETWORK = "sd15_small", "digits"
"""Networks whose parameters `ema_update` moves, 80 M in 400 tensors and 1 M: its "shapes"."""
GATE_BATCH = 4
"""Samples per batch before any timing."""
SAMPLE_SECONDS, QUICK_SAMPLE_SECONDS = 0.1, 0.002
"""Least duration of a sample, the timing of one arm in one round."""
SPARE = 1.3
"""Factor on the number of calls that took SAMPLE_SECONDS during calibration."""
ROUNDS, QUICK_ROUNDS = 7, 2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}
"""Largest |found - truth| / (|truth| + rms of the truth), by dtype of the result.

At full size 2.7e-6 was seen, and 3.1e-3 after one or two roundings to bfloat16.
"""
COARSE = {"fp32": 1e-5, "bf16": 0.5}
"""The same by mixture, for eager and compiled arms, which round intermediate results to bfloat16.

Cancellation makes those roundings large: 2.7e-6 and 0.22 were seen. Where the noise or a whole term
is missing, the error is 1 or more.
"""


@dataclass
class Gate:
    """What the correctness gate has found; the ops may be timed if there are no failures."""

    largest_error: dict[str, float] = field(default_factory=dict)
    """By dtype of the result, without `coarse` comparisons."""
    failures: list[str] = field(default_factory=list)
    """One line per failure."""

    def compare(self, case: str, dtype: str, comparisons: Iterable[Comparison]) -> None:
        """Compares integers exactly, other tensors to their tolerance; shapes have to be equal."""
        for what, found, truth, coarse in comparisons:
            if found.shape != truth.shape:
                self.failures.append(f"{case}: {what} has shape {tuple(found.shape)}, expected {tuple(truth.shape)}")
                continue
            if not found.is_floating_point():
                if not torch.equal(found, truth):
                    self.failures.append(f"{case}: other {what}")
                continue
            difference, size = (found.float() - truth.float()).abs(), truth.float().abs()
            error = (difference / (size + size.square().mean().sqrt()).clamp(min=1e-30)).max().item()
            kind = torch.float32 if found.dtype == torch.float64 else found.dtype
            if not coarse:
                name = str(kind).removeprefix("torch.")
                self.largest_error[name] = max(self.largest_error.get(name, 0.0), error)
            tolerance = COARSE[dtype] if coarse else TOLERANCE[kind]
            if not error <= tolerance:  # NaN fails, too
                self.failures.append(f"{case}: {what} differs by {error:.1e}, tolerance {tolerance:.1e}")


class Case(NamedTuple):
    """One op on latents of one shape in one mixture of dtypes."""

    op: str
    shape: str
    """Name of the shape, or of the network of `ema_update`."""
    dtype: str
    """Name of the mixture: "fp32" or "bf16"."""
    dims: tuple[int, ...] | str
    """The shape itself, or the name of the network of `ema_update`."""

    @property
    def name(self) -> str:
        """Op, shape and mixture, for messages."""
        return f"{self.op} {self.shape} {self.dtype}"

    def build(self, device: torch.device) -> Op:
        """The op with its inputs on the device."""
        return OPS[self.op](self.dims, self.dtype, device)

    def small(self) -> Case:
        """The same case with few samples, or few parameters."""
        small = QUICK_NETWORK if isinstance(self.dims, str) else (min(self.dims[0], GATE_BATCH), *self.dims[1:])
        return self._replace(dims=small)


def cases(ops: Sequence[str], shapes: Sequence[str], dtypes: Sequence[str], quick: bool) -> list[Case]:
    """All combinations of ops, shapes and mixtures; `ema_update` has one network for a shape."""
    latents, network = (QUICK_LATENTS, QUICK_NETWORK) if quick else (LATENTS, NETWORK)
    found = []
    for op in ops:
        named = [(network, network)] if op == "ema_update" else [(shape, latents[shape]) for shape in shapes]
        found += [Case(op, shape, dtype, dims) for shape, dims in named for dtype in dtypes]
    return found


def check_small(chosen: Sequence[Case], device: torch.device) -> Gate:
    """The gate before any timing: all chosen cases with few samples."""
    gate = Gate()
    for case in chosen:
        small = case.small()
        gate.compare(small.name, small.dtype, small.build(device).check())
    return gate


def seconds_of(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds that `calls` calls take, by events on a GPU and by the host's clock on a CPU."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def calibrate(time_calls: Callable[[int], float], least: float, cycle: int = 1) -> int:
    """A number of calls, in whole cycles, that takes at least `least` seconds.

    `time_calls` makes the given number of calls and returns their seconds.
    """
    calls = cycle
    while (seconds := time_calls(calls)) < least:
        # A tenth more than the last timing asks for, so that noise seldom needs another round; at
        # most ten times as many.
        needed = calls * min(10.0, 1.1 * least / max(seconds, 1e-9))
        calls = max(calls + cycle, -(-int(needed) // cycle) * cycle)
    # The first calls are slower than later ones, which have to take `least` seconds as well.
    return -(-int(calls * SPARE) // cycle) * cycle


def measure(
    arms: Mapping[str, Callable[[], object]], rounds: int, least: float, cycle: int, device: torch.device
) -> tuple[dict[str, int], np.ndarray]:
    """Times every arm once per round.

    Returns the calls per sample by arm, and the seconds per call as an array (rounds, arms).

    The calibration, in which every arm runs for `least` seconds, is the warm-up. Each round starts
    with another arm, so that no arm always runs after the same one.
    """
    calls = {
        name: calibrate(lambda n, call=call: seconds_of(call, n, device), least, cycle) for name, call in arms.items()
    }
    names, seconds = list(arms), np.empty((rounds, len(arms)))
    for number in range(rounds):
        for turn in range(len(names)):
            column = (number + turn) % len(names)
            name = names[column]
            seconds[number, column] = seconds_of(arms[name], calls[name], device) / calls[name]
    return calls, seconds


def run_case(case: Case, rounds: int, least: float, device: torch.device, gate: Gate, arms: Sequence[str]) -> dict:
    """Runs the gate at full size, then times the arms; returns the case's record.

    The gate collects the failures; the record is empty if there are any.
    """
    torch._dynamo.reset()  # without it the eighth shape of a function is refused
    op = case.build(device)
    gate.compare(case.name, case.dtype, op.check())
    if "compiled" in arms:
        gate.compare(case.name, case.dtype, op.check_compiled(op.compiled()))
    if gate.failures:
        return {}
    traffic = TRAFFIC[case.op][case.dtype]
    runs = {name: run for name, run in op.arms().items() if name.partition("_")[0] in arms}
    if "compiled" in arms:
        runs["compiled"] = op.compiled()
        runs["compiled"]()
    if "floor" in arms:
        runs["floor"] = floor_arm(traffic, op.elements, device)
    calls, seconds = measure(runs, rounds, least, op.cycle, device)
    return summarise(case, op.elements, traffic, calls, seconds)


def summarise(case: Case, elements: int, traffic: Traffic, calls: Mapping[str, int], seconds: np.ndarray) -> dict:
    """The record of one case, from seconds per call (rounds, arms).

    The arms are in the order of `calls`. Ratios are taken within each round.
    """
    by_arm = dict(zip(calls, seconds.T, strict=True))
    ours, gigabytes = by_arm["ours"], elements * traffic.total / 1e9
    moving_all = ("ours", "floor")  # the arms that move exactly the counted bytes
    record = {"op": case.op, "shape": case.shape, "dims": case.dims, "dtype": case.dtype, "elements": elements}
    record |= {"bytes_per_element": traffic.total, "calls": dict(calls), "seconds": {}, "rounds_seconds": {}}
    for name, values in by_arm.items():
        record["seconds"][name], record["rounds_seconds"][name] = spread(values), values.tolist()
    record["gigabytes_per_second"] = {name: spread(gigabytes / by_arm[name]) for name in moving_all if name in by_arm}
    record["ratio_to"] = {name: spread(values / ours) for name, values in by_arm.items() if name not in moving_all}
    record["fraction_of_floor"] = spread(by_arm["floor"] / ours) if "floor" in by_arm else None
    return record


def bars(records: Sequence[dict]) -> list[dict]:
    """Compares the medians of float32 cases with the speed-ups that the project asks for on a CPU.

    A bar is the least ratio to another arm, or the least fraction of the floor.
    """
    found = []
    for record in records:
        if record["dtype"] != "fp32":
            continue
        asked = {
            "tdft_step": [("eager", 10.0), ("eager_by_rows", 10.0), ("compiled", 2.0)],
            "normal": [("eager", 2.0)],
            "guided_step": [("floor", 0.8)] if record["shape"] == "uncached" else [],
        }.get(record["op"], [])
        for against, least in asked:
            value = record["fraction_of_floor"] if against == "floor" else record["ratio_to"].get(against)
            if value:
                bar = {"op": record["op"], "shape": record["shape"], "against": against, "least": least}
                found.append(bar | {"value": value, "met": value["median"] >= least})
    return found


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=list(OPS), action="append", help="may be repeated; all by default")
    parser.add_argument("--shape", choices=list(LATENTS), action="append", help="all by default, sd15 with --quick")
    parser.add_argument("--dtype", choices=list(DTYPES), action="append", help="both by default, fp32 with --quick")
    parser.add_argument("--rounds", type=int, help=f"samples per arm; {ROUNDS} by default, {QUICK_ROUNDS} with --quick")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--quick", action="store_true", help="a smoke run on tiny latents, whose figures mean nothing")
    parser.add_argument("--output", type=Path, help="JSON file; the chart is next to it")
    return parser


def target_of(args: argparse.Namespace) -> Path:
    """The file of results: in benchmarks/results for a complete run, else in build/benchmarks."""
    complete = not (args.quick or args.op or args.shape or args.dtype)
    return args.output or (RESULTS if complete else ROOT / "build" / "benchmarks") / "bench_ops.json"


@torch.no_grad()
def main(argv: Sequence[str] | None = None, arms: Sequence[str] = ARMS) -> int:
    """Runs the benchmark; returns 1, and writes nothing, where the gate failed."""
    args = build_parser().parse_args(argv)
    quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, quick = pick_device(args.device), args.quick
    backend, environment = backends.backend_of(device.type), describe(device)
    # What to run: by default everything, with --quick one shape in one mixture.
    shapes = args.shape or (["sd15"] if quick else list(LATENTS))
    chosen = cases(args.op or list(OPS), shapes, args.dtype or (["fp32"] if quick else list(DTYPES)), quick)
    rounds, least = (QUICK_ROUNDS, QUICK_SAMPLE_SECONDS) if quick else (ROUNDS, SAMPLE_SECONDS)
    rounds = args.rounds or rounds
    print(f"ours: backend {backend} ({backends.available(backend)[1]})", file=sys.stderr, flush=True)
    # The gate on small batches; then each case, with a second gate before its timing.
    gate, records = check_small(chosen, device), []
    for case in chosen:
        if gate.failures:
            break
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        records.append(run_case(case, rounds, least, device, gate, arms))
    if gate.failures:
        reasons = "\n  ".join(gate.failures)
        print(f"the correctness gate failed and nothing is reported:\n  {reasons}", file=sys.stderr)
        return 1
    # Table, JSON and chart.
    judged = bars(records) if device.type == "cpu" and not quick else []
    print(table(records, judged), flush=True)
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {"benchmark": "bench_ops", "environment": environment, "arguments": arguments, "backend": backend}
    result["serves"] = backends.available(backend)[1]
    malloc = {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")}
    result |= {"malloc": malloc, "rounds": rounds, "sample_seconds": least}
    result |= {"largest_error": gate.largest_error, "bars": judged, "cases": records}
    write_result(target_of(args), result, chart(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
