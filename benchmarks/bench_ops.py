"""How fast each fused op is: against eager PyTorch, against torch.compile, and against copies of the same bytes.

    python -m benchmarks.bench_ops                                  # everything; an idle machine, please
    python -m benchmarks.bench_ops --op tdft_step --shape sd15 --dtype fp32
    python -m benchmarks.bench_ops --quick                          # tiny latents

Arms (`arms/ops.py`, `arms/tdft.py`): ours; eager, PyTorch as diffusers and the authors write it; compiled, the same
arithmetic under torch.compile, warmed up beforehand; floor, plain copies of as many bytes as the op must move
(`arms/floor.py`). Every round times each arm once, looped past `SAMPLE_SECONDS`; a ratio is taken within its round.
`tdft_step` has a further arm, `eager_by_rows`, and its bar is judged against both.

Before any timing every op has to agree with eager PyTorch and with the reference backend, on small batches of every
shape; then, before its own timing, every case once more at full size, compiled arm included. Otherwise nothing is
written and the exit status is 1.

Reading the figures: torch.randn fills serially on a CPU whatever the number of threads. Fresh memory costs page faults,
the same for all arms; glibc's MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ decide how many, and the JSON records
them. Copies are a yardstick, no strict bound: a processor reads memory before it writes to it, so an op that reads more
than it writes, or updates in place, may pass its floor. On CUDA a sample lies between two events.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: Python put this folder on the path, not the one above
    sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.arms import ops as op_arms  # noqa: E402
from benchmarks.arms.floor import TRAFFIC, Traffic, floor_arm  # noqa: E402
from benchmarks.arms.ops import DTYPES, Comparison, Op  # noqa: E402
from benchmarks.arms.tdft import TdftStep  # noqa: E402
from benchmarks.environment import RESULTS, describe, pick_device, spread  # noqa: E402
from selfnpo_fast.runtime.console import quiet_libraries  # noqa: E402
from selfnpo_kernels import backends  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPS: dict[str, type[Op]] = {
    "normal": op_arms.Normal,
    "affine_noise": op_arms.AffineNoise,
    "guided_step": op_arms.GuidedStep,
    "guided_step_single": op_arms.GuidedStepSingle,
    "guidance_rescale": op_arms.GuidanceRescale,
    "tdft_step": TdftStep,
    "x0_loss": op_arms.X0Loss,
    "ema_update": op_arms.EmaUpdate,
}
ARMS = ("ours", "eager", "compiled", "floor")
LATENTS = {
    "sd15": (80, 4, 64, 64),
    "sdxl": (10, 4, 128, 128),
    "cogvideox": (1, 13, 16, 60, 90),
    "uncached": (320, 4, 128, 128),
}
QUICK_LATENTS = {
    "sd15": (8, 4, 16, 16),
    "sdxl": (2, 4, 32, 32),
    "cogvideox": (1, 3, 16, 6, 10),
    "uncached": (12, 4, 32, 32),
}
NETWORK, QUICK_NETWORK = "sd15_small", "digits"
"""Whose parameters `ema_update` moves, as if it were its shape: 80 M in 400 tensors, and 1 M."""
GATE_BATCH = 4
SAMPLE_SECONDS, QUICK_SAMPLE_SECONDS = 0.1, 0.002
SPARE = 1.3
"""What calibration adds to the calls that took so long."""
ROUNDS, QUICK_ROUNDS = 7, 2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}
"""By dtype of the result, largest |found - truth| / (|truth| + rms of the truth). Seen at full size: 2.7e-6 and, after
one or two roundings to bfloat16, 3.1e-3."""
COARSE = {"fp32": 1e-5, "bf16": 0.5}
"""By mixture, for eager and compiled arms, which round to bfloat16 on the way and then cancel. Seen: 2.7e-6 and 0.22;
with noise or a whole term missing it is 1 or more."""


@dataclass
class Gate:
    """What the correctness gate found; no failures means that the ops may be timed."""

    largest_error: dict[str, float] = field(default_factory=dict)
    """By dtype of the result; `coarse` comparisons apart."""
    failures: list[str] = field(default_factory=list)

    def compare(self, case: str, dtype: str, comparisons: Iterable[Comparison]) -> None:
        """Integers exactly, other tensors to their tolerance, all of equal shapes."""
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
    """One op on one latent shape in one mixture; `dims` is the shape, or the network of `ema_update`."""

    op: str
    shape: str
    dtype: str
    dims: tuple[int, ...] | str

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {self.dtype}"

    def build(self, device: torch.device) -> Op:
        return OPS[self.op](self.dims, self.dtype, device)

    def small(self) -> Case:
        """The same with few samples, or few parameters."""
        small = QUICK_NETWORK if isinstance(self.dims, str) else (min(self.dims[0], GATE_BATCH), *self.dims[1:])
        return self._replace(dims=small)


def cases(ops: Sequence[str], shapes: Sequence[str], dtypes: Sequence[str], quick: bool) -> list[Case]:
    """All combinations; `ema_update` has its network for a shape."""
    latents, network = (QUICK_LATENTS, QUICK_NETWORK) if quick else (LATENTS, NETWORK)
    found = []
    for op in ops:
        places = [(network, network)] if op == "ema_update" else [(shape, latents[shape]) for shape in shapes]
        found += [Case(op, shape, dtype, dims) for shape, dims in places for dtype in dtypes]
    return found


def check_small(chosen: Sequence[Case], device: torch.device) -> Gate:
    """The gate before any timing: every op in every mixture, on few samples of every shape."""
    gate = Gate()
    for case in chosen:
        small = case.small()
        gate.compare(small.name, small.dtype, small.build(device).check())
    return gate


def seconds_of(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds that `calls` calls take, on the device's own clock."""
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
    """The number of calls that takes `least` seconds or more, in whole cycles; `time_calls` times so many calls."""
    calls = cycle
    while (seconds := time_calls(calls)) < least:
        # A little more than the last timing asks for, so that noise seldom needs another round; at most tenfold.
        needed = calls * min(10.0, 1.1 * least / max(seconds, 1e-9))
        calls = max(calls + cycle, -(-int(needed) // cycle) * cycle)
    # The first calls are slower than those to come, whose samples shall not fall short of `least`.
    return -(-int(calls * SPARE) // cycle) * cycle


def measure(
    arms: Mapping[str, Callable[[], object]], rounds: int, least: float, cycle: int, device: torch.device
) -> tuple[dict[str, int], np.ndarray]:
    """Time every arm once per round: calls per sample of each, and seconds per call (rounds, arms).

    The calibration, in which every arm runs for `least` seconds, is the warm-up. Each round begins with another arm, so
    that none always follows the same one.
    """
    calls = {
        name: calibrate(lambda n, call=call: seconds_of(call, n, device), least, cycle) for name, call in arms.items()
    }
    names, seconds = list(arms), np.empty((rounds, len(arms)))
    for number in range(rounds):
        for turn in range(len(names)):
            at = (number + turn) % len(names)
            seconds[number, at] = seconds_of(arms[names[at]], calls[names[at]], device) / calls[names[at]]
    return calls, seconds


def run_case(case: Case, rounds: int, least: float, device: torch.device, gate: Gate, arms: Sequence[str]) -> dict:
    """Gate at full size, then time. The gate collects the failures; the record is empty if there are any."""
    torch._dynamo.reset()  # else the eighth shape of a function is refused
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
    """The record of one case from seconds per call (rounds, arms), arms as in `calls`; ratios are taken in rounds."""
    by_arm = dict(zip(calls, seconds.T, strict=True))
    ours, moved = by_arm["ours"], elements * traffic.total / 1e9
    fixed = ("ours", "floor")
    record = {"op": case.op, "shape": case.shape, "dims": case.dims, "dtype": case.dtype, "elements": elements}
    record |= {"bytes_per_element": traffic.total, "calls": dict(calls), "seconds": {}, "rounds_seconds": {}}
    for name, values in by_arm.items():
        record["seconds"][name], record["rounds_seconds"][name] = spread(values), values.tolist()
    record["gigabytes_per_second"] = {name: spread(moved / by_arm[name]) for name in fixed if name in by_arm}
    record["ratio_to"] = {name: spread(values / ours) for name, values in by_arm.items() if name not in fixed}
    record["fraction_of_floor"] = spread(by_arm["floor"] / ours) if "floor" in by_arm else None
    return record


def bars(records: Sequence[dict]) -> list[dict]:
    """The project's bars on a CPU in float32 against what was measured; medians decide."""
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
                place = {"op": record["op"], "shape": record["shape"], "against": against, "least": least}
                found.append(place | {"value": value, "met": value["median"] >= least})
    return found


def cell(value: dict | None, digits: str = ".2f") -> str:
    """A spread as `median [low, high]`."""
    return "-" if not value else f"{value['median']:{digits}} [{value['low']:{digits}}, {value['high']:{digits}}]"


HEADER = ("op", "shape", "dtype", "ms ours [least, most]", "GB/s", "eager/ours", "compiled/ours", "of the floor")


def line(record: dict) -> list[str]:
    """One row of the printed table."""
    milliseconds = {key: 1e3 * value for key, value in record["seconds"]["ours"].items()}
    ratios = [cell(record["ratio_to"].get(name)) for name in ("eager", "compiled")]
    bandwidth = f"{record['gigabytes_per_second']['ours']['median']:.1f}"
    place = [record[key] for key in ("op", "shape", "dtype")]
    return [*place, cell(milliseconds, ".3g"), bandwidth, *ratios, cell(record["fraction_of_floor"])]


def table(records: Sequence[dict], judged: Sequence[dict]) -> str:
    """The printed table, in brackets the smallest and the largest round; below it the bars."""
    lines = [HEADER, *map(line, records)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    rows = ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in lines]
    for record in records:
        if by_rows := record["ratio_to"].get("eager_by_rows"):
            rows.append(f"{record['op']} {record['shape']} {record['dtype']}: eager_by_rows/ours {cell(by_rows)}")
            parts = (f"{name} {cell(value)}" for name, value in record["ratio_to"].items() if name[:5] == "ours_")
            rows.append(f"{record['op']} {record['shape']} {record['dtype']}: of our time {', '.join(parts)}")
    for bar in judged:
        what = f"{bar['op']} {bar['shape']}: {bar['least']:g} x {bar['against']}"
        rows.append(f"{'met   ' if bar['met'] else 'MISSED'}  {what}: {cell(bar['value'])}")
    return "\n".join(rows)


def chart(result: dict) -> Figure:
    """A row of panels per op: eager and compiled over ours, and the fraction of the floor; bars per shape."""
    # A Figure of its own, not pyplot: no global state, and no display is ever looked for.
    from matplotlib.figure import Figure

    records = result["cases"]
    ops = list(dict.fromkeys(record["op"] for record in records))
    heights = [len({record["shape"] for record in records if record["op"] == op}) + 1.4 for op in ops]
    figure = Figure(figsize=(11, 0.36 * sum(heights) + 1), dpi=140, layout="constrained")
    grid = figure.subplots(len(ops), 3, squeeze=False, height_ratios=heights)
    columns = ("eager / ours", "torch.compile / ours", "fraction of the copy floor")
    for op, row in zip(ops, grid, strict=True):
        for axes, title in zip(row, columns, strict=True):
            panel(axes, [record for record in records if record["op"] == op], title)
            if op == ops[0]:
                axes.set_title(title, fontsize=10)
        row[0].set_title(op, fontsize=9, fontweight="bold", loc="left")
        for axes in row[1:]:
            axes.set_yticklabels([])
    figure.legend(*grid[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    place = f"{result['environment']['device']}, {result['environment']['threads']} CPU threads"
    figure.suptitle(f"backend {result['backend']} ({result['serves']}) on {place}", fontsize=10)
    return figure


def panel(axes, records: Sequence[dict], title: str) -> None:
    """Horizontal bars of one op and one ratio: shapes downwards, mixtures side by side, a line at 1."""
    shapes = list(dict.fromkeys(record["shape"] for record in records))
    for offset, (dtype, colour) in enumerate(zip(DTYPES, ("#1f5a92", "#8fb8de"), strict=True)):
        for record in records:
            known = record["ratio_to"]
            value = {"eager / ours": known.get("eager"), "torch.compile / ours": known.get("compiled")}
            value = value.get(title, record["fraction_of_floor"])
            if record["dtype"] != dtype or value is None:
                continue
            at = shapes.index(record["shape"]) + 0.38 * offset
            ends = [[value["median"] - value["low"]], [value["high"] - value["median"]]]
            axes.barh(at, value["median"], height=0.36, color=colour, xerr=ends, error_kw={"lw": 0.8})
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
            axes.annotate(f"{value['median']:.2g}", (value["high"], at), **place)
        axes.barh(0, 0, color=colour, label=dtype)
    axes.set_yticks([n + 0.19 for n in range(len(shapes))], shapes, fontsize=8)
    axes.set_ylim(len(shapes) - 0.3, -0.5)
    axes.axvline(1, color="#888888", lw=0.8, ls=":")
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=list(OPS), action="append", help="may be repeated; all by default")
    parser.add_argument("--shape", choices=list(LATENTS), action="append", help="all by default, sd15 with --quick")
    parser.add_argument("--dtype", choices=list(DTYPES), action="append", help="both by default, fp32 with --quick")
    parser.add_argument("--rounds", type=int, help="samples per arm")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--quick", action="store_true", help="a smoke run on tiny latents, whose figures mean nothing")
    parser.add_argument("--output", type=Path, help="JSON; the chart beside it")
    return parser


def target_of(args: argparse.Namespace) -> Path:
    """Where results go: those of a whole run beside the others, those of a part of it into build/."""
    whole = not (args.quick or args.op or args.shape or args.dtype)
    return args.output or (RESULTS if whole else ROOT / "build" / "benchmarks") / "bench_ops.json"


@torch.no_grad()
def main(argv: Sequence[str] | None = None, arms: Sequence[str] = ARMS) -> int:
    """Run the benchmark; 1 where the gate failed, and then nothing is written."""
    args = build_parser().parse_args(argv)
    quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, quick = pick_device(args.device), args.quick
    backend, environment = backends.backend_of(device.type), describe(device)
    shapes = args.shape or (["sd15"] if quick else list(LATENTS))
    chosen = cases(args.op or list(OPS), shapes, args.dtype or (["fp32"] if quick else list(DTYPES)), quick)
    rounds, least = (QUICK_ROUNDS, QUICK_SAMPLE_SECONDS) if quick else (ROUNDS, SAMPLE_SECONDS)
    rounds = args.rounds or rounds
    print(f"ours: backend {backend} ({backends.available(backend)[1]})", file=sys.stderr, flush=True)
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
    judged = bars(records) if device.type == "cpu" and not quick else []
    print(table(records, judged), flush=True)
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {"benchmark": "bench_ops", "environment": environment, "arguments": arguments, "backend": backend}
    result["serves"] = backends.available(backend)[1]
    malloc = {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")}
    result |= {"malloc": malloc, "rounds": rounds, "sample_seconds": least}
    result |= {"largest_error": gate.largest_error, "bars": judged, "cases": records}
    output = target_of(args)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    chart(result).savefig(output.with_suffix(".png"))
    print(f"{output}\n{output.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
