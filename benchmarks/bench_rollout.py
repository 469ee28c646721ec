"""How an update scales with batch, ranks and ZeRO stage: seconds per pair and memory per rank.

    python -m benchmarks.bench_rollout                     # digits; ten minutes on two CPU cores
    python -m benchmarks.bench_rollout --quick
    python -m benchmarks.bench_rollout -- --config FILE    # another run

Every setting is timed in new processes. What is timed are whole updates of `selfnpo train`, with
optimiser and EMA, after a warm-up that also fills the slots. Memory is the peak of a rank: of its
process on a CPU, of its device on a GPU. Ranks on one CPU share its cores, as in `selfnpo train`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: Python has put this folder on the path, not its parent
    sys.path[0] = str(ROOT)

from selfnpo_fast.runtime.command import short_spin  # noqa: E402

os.environ.update(short_spin())  # before torch is imported

from benchmarks.environment import RESULTS, cores, describe, pick_device, spread, write_result  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCHES, QUICK_BATCHES = (16, 64, 128), (4,)
SETTINGS = ((1, 0), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3))
"""(ranks, ZeRO stage)."""
QUICK_SETTINGS = ((1, 0), (2, 2))
WARM_UP, UPDATES, QUICK_UPDATES = 3, 8, 1
"""Updates that are not timed, that are timed, and that are timed with --quick."""


def time_rank(arguments: Sequence[str], updates: int) -> dict[str, object]:
    """The work of one rank's process: seconds of every update, and its peak memory in GiB.

    `arguments` are those of `selfnpo train`.
    """
    from benchmarks.profile_step import make_trainer
    from selfnpo_fast.runtime.console import quiet_libraries
    from selfnpo_fast.training.recorder import peak_memory_gib

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        trainer, recorder, world = make_trainer(arguments, Path(folder) / "run")
        trainer.producer.rollout.fill()
        seconds = []
        for _ in range(WARM_UP + updates):
            world.barrier()
            start = time.perf_counter()
            trainer.train_update(recorder)
            recorder.discard()  # metrics that nothing reads
            world.barrier()
            seconds.append(time.perf_counter() - start)
        trainer.producer.close()
    return {"seconds": seconds[WARM_UP:], "memory_gib": peak_memory_gib(world.device)}


def run_setting(ranks: int, stage: int, batch: int, updates: int, arguments: Sequence[str]) -> dict[str, object]:
    """Times one setting in new processes, one per rank, and returns its record.

    An update takes as long as its slowest rank. Raises RuntimeError with the end of the ranks'
    standard error where a rank fails.
    """
    # A free port, where the ranks meet.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [*arguments, "--engine.batch_size", str(batch), "--engine.zero_stage", str(stage)]
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # One process per rank, with the variables that launchers set.
    processes = []
    for rank in range(ranks):
        variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        command = [sys.executable, "-m", "benchmarks.bench_rollout", "--child", str(updates), "--", *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, **pipes))
    outputs = [process.communicate() for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(error[-2000:] for _, error in outputs))
    # Each rank prints its result on its last line.
    results = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    slowest = [max(times) / batch for times in zip(*(result["seconds"] for result in results), strict=True)]
    return {
        "ranks": ranks,
        "zero_stage": stage,
        "batch": batch,
        "seconds_per_pair": spread(slowest),
        "memory_gib": [result["memory_gib"] for result in results],
    }


def table(rows: Sequence[dict]) -> str:
    """The printed table, a line per setting: median, in brackets fastest and slowest update."""
    lines = [f"{'ranks':>5} {'ZeRO':>5} {'batch':>6} {'ms/pair [least, most]':>28} {'GiB a rank':>12}"]
    for row in rows:
        value = {key: 1e3 * seconds for key, seconds in row["seconds_per_pair"].items()}
        milliseconds = f"{value['median']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"
        setting = f"{row['ranks']:>5} {row['zero_stage']:>5} {row['batch']:>6}"
        lines.append(f"{setting} {milliseconds:>28} {max(row['memory_gib']):>12.2f}")
    return "\n".join(lines)


def chart(rows: Sequence[dict], title: str) -> Figure:
    """Milliseconds per pair and memory against the batch, one line per ranks and ZeRO stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=140, layout="constrained")
    times, memory = figure.subplots(1, 2)
    for ranks, stage in dict.fromkeys((row["ranks"], row["zero_stage"]) for row in rows):
        chosen = [row for row in rows if (row["ranks"], row["zero_stage"]) == (ranks, stage)]
        batch = [row["batch"] for row in chosen]
        label = f"{ranks} rank{'s' * (ranks > 1)}, ZeRO {stage}"
        times.plot(batch, [1e3 * row["seconds_per_pair"]["median"] for row in chosen], marker="o", ms=3, label=label)
        memory.plot(batch, [max(row["memory_gib"]) for row in chosen], marker="o", ms=3)
    for axes, name in ((times, "ms per pair"), (memory, "GiB per rank, at most")):
        axes.set_xlabel("pairs per update")
        axes.set_ylabel(name)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    times.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1, and writes nothing, where a setting failed."""
    # Everything after "--" belongs to the training command.
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; the ranks take the devices of the machine")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two settings, one update")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "bench_rollout.json", help="JSON file; the chart is next to it"
    )
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(words[:cut])
    training_arguments = words[cut + 1 :] or ["--config", "configs/digits.yaml"]
    if args.child:  # this process is one rank of a setting
        print(json.dumps(time_rank(training_arguments, args.child)))
        return 0
    device, rows = pick_device(args.device), []
    environment = describe(device)
    for ranks, stage in QUICK_SETTINGS if args.quick else SETTINGS:
        for batch in QUICK_BATCHES if args.quick else BATCHES:
            print(f"{ranks} ranks, ZeRO {stage}, batch {batch} ...", file=sys.stderr, flush=True)
            updates = QUICK_UPDATES if args.quick else UPDATES
            try:
                rows.append(run_setting(ranks, stage, batch, updates, training_arguments))
            except RuntimeError as error:
                print(f"it failed and nothing is written:\n{error}", file=sys.stderr)
                return 1
    print(table(rows), flush=True)
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {"benchmark": "bench_rollout", "environment": environment, "arguments": arguments, "settings": rows}
    title = f"digits on {environment['device']}, {cores()} cores shared by all ranks"
    write_result(args.output, result, chart(rows, title))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
