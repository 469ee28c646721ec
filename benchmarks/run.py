"""Runs every benchmark, one after the other, and collects their results in results/<device>.json.

    python -m benchmarks.run            # needs an idle machine
    python -m benchmarks.run --quick    # smoke sizes, written to build/benchmarks/

Every benchmark runs in a new process, so that none inherits another's memory, threads or CUDA
context. A benchmark that fails is recorded with its error and with what it has measured; the others
still run, and the exit status is 1. The file is written anew after every benchmark. The JSON files
and charts of the single benchmarks lie in results/<device>/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: Python has put this folder on the path, not its parent
    sys.path[0] = str(ROOT)

from selfnpo_fast.runtime.command import short_spin  # noqa: E402

os.environ.update(short_spin())  # before torch is imported

from benchmarks.environment import RESULTS, describe, pick_device, slug, write_json  # noqa: E402

BENCHMARKS: dict[str, Sequence[str]] = {
    "bench_ops": (sys.executable, "-m", "benchmarks.bench_ops"),
    "bench_step": (sys.executable, "-m", "benchmarks.bench_step"),
    "bench_update": (sys.executable, "-m", "benchmarks.bench_update"),
    "bench_rollout": (sys.executable, "-m", "benchmarks.bench_rollout"),
    "bench_busy": (sys.executable, "-m", "benchmarks.bench_busy"),
    "bench_sampler": (sys.executable, "-m", "benchmarks.bench_sampler"),
}
"""Commands by name.

Each takes --device, --output (a JSON file) and --quick, and exits with 0 if its results are valid.
"""

ERROR_LINES = 20
"""Last lines of a failed benchmark's standard error that are recorded."""


def run_one(command: Sequence[str], output: Path) -> dict[str, object]:
    """Runs one benchmark in the checkout's root and returns its record.

    The record has `command`, `seconds`, `result`, which is the benchmark's JSON, and where it has
    failed `error`, which is the exit status with the last lines of standard error. A benchmark that
    failed may have written a result of what went well before.
    """
    output.unlink(missing_ok=True)  # an earlier run's result must not pass for this one
    start = time.perf_counter()
    last_lines: deque[str] = deque(maxlen=ERROR_LINES)
    with subprocess.Popen([*command, "--output", str(output)], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            last_lines.append(line.rstrip("\n"))
            print(line, end="", file=sys.stderr, flush=True)
    record: dict[str, object] = {"command": list(command), "seconds": round(time.perf_counter() - start, 1)}
    if process.returncode != 0:
        record["error"] = f"exit status {process.returncode}\n" + "\n".join(last_lines)
    try:
        record["result"] = json.loads(output.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        record.setdefault("error", f"no readable result: {error}")
    return record


def run_all(
    benchmarks: Mapping[str, Sequence[str]], *, device: str = "auto", quick: bool = False, results: Path = RESULTS
) -> tuple[Path, list[str]]:
    """Runs all benchmarks; returns the file of results and the names of those that failed."""
    environment = describe(pick_device(device))
    name = slug(str(environment["device"]))
    (results / name).mkdir(parents=True, exist_ok=True)
    options = ["--device", device, *(["--quick"] if quick else [])]
    records, target = {}, results / f"{name}.json"
    content = {"complete": False, "environment": environment, "quick": quick, "benchmarks": records}
    for benchmark, command in benchmarks.items():
        print(f"{benchmark} ...", file=sys.stderr, flush=True)
        records[benchmark] = run_one([*command, *options], results / name / f"{benchmark}.json")
        content["complete"] = len(records) == len(benchmarks)
        write_json(target, content)
    return target, [benchmark for benchmark, record in records.items() if "error" in record]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--quick", action="store_true", help="smoke sizes, in build/benchmarks")
    parser.add_argument("--output", type=Path, help="the folder of results")
    args = parser.parse_args(argv)
    results = args.output or (ROOT / "build" / "benchmarks" if args.quick else RESULTS)
    target, failed = run_all(BENCHMARKS, device=args.device, quick=args.quick, results=results.resolve())
    print(target)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
