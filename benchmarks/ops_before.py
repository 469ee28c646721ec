"""How fast the fused ops are beside those of another checkout, such as the one before a change.

    python -m benchmarks.ops_before CHECKOUT --op guided_step --op tdft_step

Both checkouts have to be built. Each has a process of its own, which imports its own `benchmarks`
and kernels and runs the op of its own `bench_ops`. The two take turns, so that both see the machine
in the same state, and ratios are taken within a round. Times are those of the process on its one
thread, since other work on the machine is no reason for a kernel to seem slow. A CPU only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from selfnpo_fast.runtime.command import short_spin

os.environ.update(short_spin())  # before torch is imported

from benchmarks.bench_ops import DTYPES, LATENTS, OPS, QUICK_LATENTS
from benchmarks.environment import RESULTS, ROOT, describe, pick_device, spread, write_json
from selfnpo_fast.runtime.errors import UserError

WORKER = """
import json, sys, time
import torch
from benchmarks.bench_ops import OPS
torch.set_num_threads(1)
arms = {}
for line in sys.stdin:
    op, dims, dtype, calls = json.loads(line)
    key = (op, str(dims), dtype)
    with torch.no_grad():
        if key not in arms:
            arms = {key: OPS[op](tuple(dims), dtype, torch.device("cpu")).arms()["ours"]}
            arms[key]()
        start = time.process_time()
        for _ in range(calls):
            arms[key]()
        print((time.process_time() - start) / calls, flush=True)
"""
SAMPLE_SECONDS, QUICK_SAMPLE_SECONDS = 0.2, 0.002
"""Least duration of a sample, the timing of one checkout in one round."""


class Side:
    """The process of one checkout."""

    def __init__(self, checkout: Path) -> None:
        path = os.pathsep.join(str(checkout / part) for part in (".", "kernels"))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], cwd=checkout, env=environment, stdin=pipe, stdout=pipe, text=True
        )

    def seconds(self, op: str, dims: Sequence[int], dtype: str, calls: int) -> float:
        """Seconds of one of so many calls."""
        self.process.stdin.write(json.dumps([op, dims, dtype, calls]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"{op}: a checkout's process ended; is it built, and does it know the op?")
        return float(line)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def compare(sides: Sequence[Side], op: str, dims: Sequence[int], dtype: str, *, rounds: int, least: float) -> dict:
    """The record of a case: seconds of a call, before and now, and their ratio in each round."""
    calls = max(1, round(least / max(side.seconds(op, dims, dtype, 1) for side in sides)))
    taken: list[list[float]] = [[], []]
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            taken[which].append(sides[which].seconds(op, dims, dtype, calls))
    before, now = taken
    ratios = [b / a for a, b in zip(before, now, strict=True)]
    return {"calls": calls, "before": spread(before), "now": spread(now), "ratio": spread(ratios), "ratios": ratios}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison, prints a line for each case, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="the other checkout, with its C++ extension")
    parser.add_argument("--op", choices=list(OPS), action="append", required=True, help="may be repeated")
    parser.add_argument("--shape", choices=list(LATENTS), action="append", help="sd15 and cogvideox by default")
    parser.add_argument("--dtype", choices=list(DTYPES), action="append", help="both by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="tiny latents, 2 rounds")
    parser.add_argument("--output", type=Path, default=RESULTS / "ops_before.json")
    args = parser.parse_args(argv)
    rounds, least, latents = args.rounds, SAMPLE_SECONDS, LATENTS
    if args.quick:
        rounds, least, latents = 2, QUICK_SAMPLE_SECONDS, QUICK_LATENTS
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=args.checkout, capture_output=True, text=True, check=True)
    result = {"benchmark": "ops_before", "environment": describe(pick_device("cpu")), "before": head.stdout.strip()}
    sides, cases = [Side(args.checkout.resolve()), Side(ROOT)], result.setdefault("cases", [])
    try:
        for op in args.op:
            for shape in args.shape or ("sd15", "cogvideox"):
                for dtype in args.dtype or DTYPES:
                    case = compare(sides, op, latents[shape], dtype, rounds=rounds, least=least)
                    cases.append({"op": op, "shape": shape, "dtype": dtype} | case)
                    write_json(args.output, result)
                    ratio = "{median:.2f} [{low:.2f}, {high:.2f}]".format(**case["ratio"])
                    print(f"{op} {shape} {dtype}: {ratio} of the time before", flush=True)
    finally:
        for side in sides:
            side.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
