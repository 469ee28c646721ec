"""How fast each fused op is next to eager PyTorch, torch.compile and copies of as many bytes.

    python -m benchmarks.bench_ops                  # everything; needs an idle machine
    python -m benchmarks.bench_ops --op tdft_step --shape sd15 --dtype fp32
    python -m benchmarks.bench_ops --arm ours --arm floor
    python -m benchmarks.bench_ops --check          # the correctness gate alone
    python -m benchmarks.bench_ops --quick          # tiny latents

The arms (`arms/ops.py`, `arms/tdft.py`, `arms/ema.py`, `arms/floor.py`):

- ours: the fused op
- eager: PyTorch as diffusers and the authors write it; `tdft_step` also has `eager_by_rows`
- compiled: the same arithmetic under torch.compile, compiled before the timing
- floor: plain copies of as many bytes as the op has to move

Every round times each arm once, with so many calls that they take a tenth of a second on a CPU and
a fiftieth on a GPU; ratios are taken within a round. On a GPU a sample is replays of a CUDA graph
of calls, and what the host takes to issue a call is timed apart (`timing.py`). An arm that cannot
be captured is timed by plain launches, and its record says so.

Before a case is timed, the results of the op are compared with eager PyTorch and with the reference
backend, on a small batch and at full size, and those of the compiled arm with eager. A case that
differs or raises an error is not timed: its record has `failures`. An arm that fails by itself is
in the record's `errors`. All others are timed, and the exit status is 1 at the end. The JSON is
written after every case, with `complete` false until the end.

Some notes on the figures. On a CPU torch.randn fills a tensor serially, with any number of threads.
New memory costs page faults, the same in all arms; glibc's MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ decide how many, and the JSON records both. The floor is no strict bound: a
processor reads memory before it writes to it, so an op that reads more than it writes, or updates
in place, may be faster than its floor. On a GPU a case moves its bytes through the L2 cache where
they fit into it (`in_cache`): only the others say how fast memory is.
"""

from __future__ import annotations

import argparse
import os
import sys
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
from benchmarks.arms.floor import TRAFFIC, floor_arm  # noqa: E402
from benchmarks.arms.ops import DTYPES, Comparison, Op  # noqa: E402
from benchmarks.arms.tdft import TdftStep  # noqa: E402
from benchmarks.environment import (  # noqa: E402
    RESULTS,
    describe,
    drawn,
    pick_device,
    release,
    spread,
    write_json,
    write_result,
)
from benchmarks.nets import NETS  # noqa: E402
from benchmarks.ops_report import bars, chart, table  # noqa: E402
from benchmarks.timing import Call, Timed, cached_bytes, measure, ready  # noqa: E402
from selfnpo_fast.runtime.console import quiet_libraries  # noqa: E402
from selfnpo_fast.runtime.errors import one_line  # noqa: E402
from selfnpo_kernels import backends  # noqa: E402

OPS: dict[str, type[Op]] = {
    "normal": op_arms.Normal,
    "affine_noise": op_arms.AffineNoise,
    "guided_step": op_arms.GuidedStep,
    "guided_step_single": op_arms.GuidedStepSingle,
    "guided_step_unipc": op_arms.GuidedStepUniPC,
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
NETWORKS = {"cpu": ("digits", "sd15_small"), "cuda": ("digits", "sd15_small", "sd15")}
"""Networks whose parameters `ema_update` moves, its "shapes".

They have 1 M parameters in 286 tensors, 80 M in 208 and 860 M in 686.
"""
QUICK_NETWORK = "digits"
GATE_BATCH = 4
"""Samples per batch before any timing."""
SAMPLE_SECONDS, QUICK_SAMPLE_SECONDS = {"cpu": 0.1, "cuda": 0.02}, 0.002
"""Least duration of a sample, the timing of one arm in one round."""
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
        if isinstance(self.dims, str):
            return self._replace(shape=QUICK_NETWORK, dims=QUICK_NETWORK)
        return self._replace(dims=(min(self.dims[0], GATE_BATCH), *self.dims[1:]))


def cases(
    ops: Sequence[str], shapes: Sequence[str], dtypes: Sequence[str], networks: Sequence[str], quick: bool
) -> list[Case]:
    """All combinations of ops, shapes and mixtures; `ema_update` has networks for shapes."""
    latents = QUICK_LATENTS if quick else LATENTS
    found = []
    for op in ops:
        names = networks if op == "ema_update" else shapes
        found += [Case(op, name, dtype, latents.get(name, name)) for name in names for dtype in dtypes]
    return found


def said(error: Exception) -> str:
    """An exception in a record: its kind and its message, on one line."""
    return one_line(f"{type(error).__name__}: {error}")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a run does with each case."""

    arms: tuple[str, ...]
    """Empty for the gate alone."""
    rounds: int
    least: float
    """Least seconds of a sample."""


class Differs(Exception):
    """The results of an arm are wrong."""


def maker(name: str, case: Case, op: Op, gate: Gate) -> Callable[[], Call]:
    """What makes the function of an arm. Raises Differs where the compiled one is wrong."""
    if name == "floor":
        copies = floor_arm(TRAFFIC[case.op][case.dtype], op.elements, op.device)
        return lambda: copies
    if name == "compiled":
        found = Gate(gate.largest_error)
        found.compare(case.name, case.dtype, op.check_compiled(op.compiled()))
        if found.failures:
            raise Differs("; ".join(found.failures))
        return op.compiled
    return lambda: op.arms()[name]


def time_case(case: Case, op: Op, sizes: Sizes, device: torch.device, gate: Gate) -> dict:
    """Times the arms of an op that has passed the gate; returns what the record says of them."""
    names = [name for name in op.arms() if name.partition("_")[0] in sizes.arms]
    names += [name for name in ("compiled", "floor") if name in sizes.arms]
    arms, errors = {}, {}
    try:
        for name in names:
            try:
                make, capture = maker(name, case, op, gate), name not in op.reads_back
                arms[name] = ready(make, device, sizes.least, op.cycle, capture=capture)
            except Exception as error:  # of an arm alone: the others are timed
                errors[name] = said(error)
        seconds, host = measure(list(arms.values()), sizes.rounds)
    finally:
        for arm in arms.values():
            arm.close()
    return summarise(case, op.elements, arms, seconds, host, device) | {"errors": errors}


def run_case(case: Case, sizes: Sizes, device: torch.device) -> dict:
    """Runs the gate with few samples and at full size, then times the arms; returns the record.

    Nothing is timed where results differ or an exception comes: `failures` says which.
    """
    torch._dynamo.reset()  # without it the eighth shape of a function is refused
    record = {"op": case.op, "shape": case.shape, "dims": case.dims, "dtype": case.dtype}
    gate = Gate()
    try:
        small = case.small()
        gate.compare(small.name, small.dtype, small.build(device).check())
        op = case.build(device)
        gate.compare(case.name, case.dtype, op.check())
        record["elements"] = op.elements
        if sizes.arms and not gate.failures:
            record |= time_case(case, op, sizes, device, gate)
    except Exception as error:  # of a kernel that does not compile, of memory that is full
        gate.failures.append(f"{case.name}: {said(error)}")
    return record | {"failures": gate.failures, "largest_error": gate.largest_error}


def summarise(
    case: Case, elements: int, arms: Mapping[str, Timed], seconds: np.ndarray, host: np.ndarray, device: torch.device
) -> dict:
    """What the record of a case says of its arms.

    `seconds` and `host` are seconds per call, (rounds, arms), in the order of `arms`. Ratios are
    taken within each round.
    """
    traffic = TRAFFIC[case.op][case.dtype]
    by_arm, cache = dict(zip(arms, seconds.T, strict=True)), cached_bytes(device)
    ours, gigabytes = by_arm.get("ours"), elements * traffic.total / 1e9
    moving_all = ("ours", "floor")  # the arms that move exactly the counted bytes
    others = {name: values for name, values in by_arm.items() if name not in moving_all}
    issued = {name: values for name, values in zip(arms, host.T, strict=True) if arms[name].host_seconds}
    return {
        "bytes_per_element": traffic.total,
        "in_cache": None if cache is None else elements * traffic.total <= cache,
        "calls": {name: arm.calls for name, arm in arms.items()},
        "timed_by": {name: arm.way for name, arm in arms.items()},
        "not_captured": {name: arm.why_launches for name, arm in arms.items() if arm.why_launches},
        "launches": {name: arm.launches for name, arm in arms.items() if arm.launches is not None},
        "seconds": {name: spread(values) for name, values in by_arm.items()},
        "rounds_seconds": {name: values.tolist() for name, values in by_arm.items()},
        "host_seconds": {name: spread(values) for name, values in issued.items()},
        "gigabytes_per_second": {name: spread(gigabytes / by_arm[name]) for name in moving_all if name in by_arm},
        "ratio_to": {} if ours is None else {name: spread(values / ours) for name, values in others.items()},
        "fraction_of_floor": spread(by_arm["floor"] / ours) if ours is not None and "floor" in by_arm else None,
    }


def found(records: Sequence[dict]) -> dict:
    """What the result says of all cases: their failures, with those of single arms, and errors."""
    failures, errors = [], {}
    for record in records:
        case = f"{record['op']} {record['shape']} {record['dtype']}"
        failures += record["failures"]
        failures += [f"{case}: {arm}: {line}" for arm, line in record.get("errors", {}).items()]
        for name, error in record["largest_error"].items():
            errors[name] = max(errors.get(name, 0.0), error)
    return {"largest_error": errors, "failures": list(dict.fromkeys(failures)), "cases": list(records)}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=list(OPS), action="append", help="may be repeated; all by default")
    parser.add_argument("--arm", choices=ARMS, action="append", help="may be repeated; all by default")
    parser.add_argument("--shape", choices=list(LATENTS), action="append", help="all by default, sd15 with --quick")
    parser.add_argument("--net", choices=list(NETS), action="append", help="of ema_update; by default by the device")
    parser.add_argument("--dtype", choices=list(DTYPES), action="append", help="both by default, fp32 with --quick")
    parser.add_argument("--check", action="store_true", help="runs the correctness gate and times nothing")
    parser.add_argument("--rounds", type=int, help=f"samples per arm; {ROUNDS} by default, {QUICK_ROUNDS} with --quick")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--quick", action="store_true", help="a smoke run on tiny latents, whose figures mean nothing")
    parser.add_argument("--output", type=Path, help="JSON file; the chart is next to it")
    return parser


def target_of(args: argparse.Namespace) -> Path:
    """The file of results: in benchmarks/results for a complete run, else in build/benchmarks."""
    part = args.quick or args.check or args.op or args.arm or args.shape or args.net or args.dtype
    return args.output or (ROOT / "build" / "benchmarks" if part else RESULTS) / "bench_ops.json"


def chosen_cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """What to run: by default everything, with --quick one shape in one mixture."""
    shapes = args.shape or (["sd15"] if args.quick else list(LATENTS))
    dtypes = args.dtype or (["fp32"] if args.quick else list(DTYPES))
    networks = args.net or ([QUICK_NETWORK] if args.quick else NETWORKS[device.type])
    return cases(args.op or list(OPS), shapes, dtypes, networks, args.quick)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 where the gate or an arm failed."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.check and args.arm:
        parser.error("--check times nothing: leave out --arm")
    quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, quick, output = pick_device(args.device), args.quick, target_of(args)
    if device.index is not None:
        torch.cuda.set_device(device)
    backend, chosen, records = backends.backend_of(device.type), chosen_cases(args, device), []
    sizes = Sizes(
        arms=() if args.check else tuple(args.arm or ARMS),
        rounds=args.rounds or (QUICK_ROUNDS if quick else ROUNDS),
        least=QUICK_SAMPLE_SECONDS if quick else SAMPLE_SECONDS[device.type],
    )
    print(f"ours: backend {backend} ({backends.available(backend)[1]})", file=sys.stderr, flush=True)
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {"benchmark": "bench_ops", "complete": False, "environment": describe(device), "arguments": arguments}
    result |= {"backend": backend, "serves": backends.available(backend)[1], "cache_bytes": cached_bytes(device)}
    malloc = {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")}
    result |= {"malloc": malloc, "rounds": sizes.rounds, "sample_seconds": sizes.least}
    write_json(output, result | found(records))
    for case in chosen:
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        records.append(run_case(case, sizes, device))
        result |= found(records) | {"bars": bars(records) if device.type == "cpu" and not quick else []}
        write_json(output, result)
        release(device)
    # Table, JSON and chart.
    timed = [record for record in records if "seconds" in record]
    if timed:
        print(table(timed, result["bars"]), flush=True)
    figure = drawn(lambda: chart(result | {"cases": timed})) if timed else None
    write_result(output, result | {"complete": True}, figure)
    if result["failures"]:
        print("\n  ".join(["failed:", *result["failures"]]), file=sys.stderr)
    return int(bool(result["failures"]))


if __name__ == "__main__":
    raise SystemExit(main())
