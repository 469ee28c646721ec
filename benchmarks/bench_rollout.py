"""How an update scales with batch, ranks and ZeRO stage: seconds per pair and memory per rank.

    python -m benchmarks.bench_rollout                     # digits; ten minutes on two CPU cores
    python -m benchmarks.bench_rollout --quick
    python -m benchmarks.bench_rollout --setting 1,0 --setting 2,1 --batch 64
    python -m benchmarks.bench_rollout -- --config FILE    # another run

Every setting is timed in new processes. What is timed are whole updates of `selfnpo train`, with
optimiser and EMA, after a warm-up that also fills the slots; a GPU is idle when the clock is read.
Memory is the peak of a rank: of its process on a CPU, and on a GPU what its tensors had and what
its allocator had reserved. Ranks on one CPU share its cores, as in `selfnpo train`. A GPU has one
rank, so settings of more ranks than GPUs are left out. The JSON file is written anew after every
setting; one that fails is named, the others are timed, and the exit status is 1.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: Python has put this folder on the path, not its parent
    sys.path[0] = str(ROOT)

from selfnpo_fast.runtime.command import short_spin  # noqa: E402

os.environ.update(short_spin())  # before torch is imported

import torch  # noqa: E402

from benchmarks.environment import (  # noqa: E402
    RESULTS,
    cores,
    describe,
    drawn,
    memory_gib,
    pick_device,
    spread,
    synchronize,
    write_json,
    write_result,
)
from selfnpo_fast.runtime.capture import CudaGraphs  # noqa: E402
from selfnpo_fast.runtime.errors import one_line, shortened  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from selfnpo_fast.config import TrainConfig

BATCHES, QUICK_BATCHES = (16, 64, 128), (4,)
SETTINGS = ((1, 0), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3))
"""(ranks, ZeRO stage)."""
QUICK_SETTINGS = ((1, 0), (2, 2))
WARM_UP, UPDATES, QUICK_UPDATES = 3, 8, 1
"""Updates that are not timed (`warm_up`), that are timed, and that are timed with --quick."""
DIGITS = ("--config", "configs/digits.yaml")
LAST_WORDS = 5.0
"""Seconds for the other ranks to end by themselves once one has failed."""


def gpus_for(device: torch.device) -> tuple[dict[str, str], int | None]:
    """The variables that show ranks their devices, and the number of GPUs they see; None for a CPU.

    Ranks take every GPU that they see, on a machine with GPUs also where a CPU is asked for.
    """
    if device.type != "cuda":
        return {"CUDA_VISIBLE_DEVICES": ""}, None
    if device.index is None:
        return {}, torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": names[device.index].strip()}, 1


def warm_up(config: TrainConfig, device: torch.device) -> int:
    """Updates before those that are timed.

    On a GPU the step of every group of slots is captured as a CUDA graph in them: the groups take
    turns, `pool` updates make a round, and a step is captured at its third call.
    """
    captures = device.type == "cuda" and config.engine.graphs and config.rollout.mode == "continuous"
    return WARM_UP + (config.rollout.pool * (CudaGraphs.WARM_UP + 1) if captures else 0)


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
        seconds, untimed = [], warm_up(trainer.config, world.device)
        for _ in range(untimed + updates):
            synchronize(world.device)
            world.barrier()
            start = time.perf_counter()
            trainer.train_update(recorder)
            recorder.discard()  # metrics that nothing reads
            synchronize(world.device)
            world.barrier()
            seconds.append(time.perf_counter() - start)
        trainer.producer.close()
    reserved = (memory_gib(world.device) or {}).get("reserved")
    return {"seconds": seconds[untimed:], "memory_gib": peak_memory_gib(world.device), "reserved_gib": reserved}


def run_setting(
    ranks: int, stage: int, batch: int, updates: int, arguments: Sequence[str], devices: Mapping[str, str]
) -> dict[str, object]:
    """Times one setting in new processes, one per rank, and returns its values.

    An update takes as long as its slowest rank. `devices` are the variables that show ranks their
    devices. Raises RuntimeError with the end of the standard error of ranks that fail.
    """
    # A free port, where the ranks meet.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [*arguments, "--engine.batch_size", str(batch), "--engine.zero_stage", str(stage)]
    command = [sys.executable, "-m", "benchmarks.bench_rollout", "--child", str(updates), "--", *options]
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # The variables that launchers set.
    launch = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)] if ranks > 1 else [{}]
    outputs = run_ranks(command, [{**os.environ, **devices, **variables} for variables in launch])
    # Each rank prints its result on its last line.
    results = [json.loads(out.splitlines()[-1]) for out in outputs]
    slowest = [max(times) / batch for times in zip(*(result["seconds"] for result in results), strict=True)]
    return {
        "seconds_per_pair": spread(slowest),
        "pairs_per_second": spread([1 / seconds for seconds in slowest]),
        "memory_gib": [result["memory_gib"] for result in results],
        "reserved_gib": None if results[0]["reserved_gib"] is None else [r["reserved_gib"] for r in results],
    }


def run_ranks(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> list[str]:
    """Runs a command once per environment, all at the same time; returns the standard outputs.

    Where one fails, the others would wait for it: they are killed after LAST_WORDS. No process is
    left behind. Raises RuntimeError with the end of the standard error of those that failed.
    """
    processes, files = [], []
    try:
        for environment in environments:
            out, error = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
            files.append((out, error))
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=error))
        deadline = None
        while any(process.poll() is None for process in processes):
            if deadline is None and any(process.poll() for process in processes):
                deadline = time.monotonic() + LAST_WORDS
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.05)
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        words = [[_read(file) for file in pair] for pair in files]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for pair in files:
            for file in pair:
                file.close()
    if failed:
        raise RuntimeError("\n".join(words[rank][1][-2000:] for rank in failed))
    return [out for out, _ in words]


def _read(file) -> str:
    file.seek(0)
    return file.read()


def table(rows: Sequence[dict]) -> str:
    """The printed table, a line per setting: median, in brackets fastest and slowest update."""
    lines = [f"{'ranks':>5} {'ZeRO':>5} {'batch':>6} {'ms/pair [least, most]':>28} {'pairs/s':>9} {'GiB a rank':>12}"]
    for row in rows:
        setting = f"{row['ranks']:>5} {row['zero_stage']:>5} {row['batch']:>6}"
        if "error" in row:
            lines.append(f"{setting} failed: {row['error']}")
            continue
        value = {key: 1e3 * seconds for key, seconds in row["seconds_per_pair"].items()}
        milliseconds = f"{value['median']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"
        memory = f"{row['pairs_per_second']['median']:>9.4g} {max(row['memory_gib']):>12.2f}"
        reserved = f" ({max(row['reserved_gib']):.2f} reserved)" if row["reserved_gib"] else ""
        lines.append(f"{setting} {milliseconds:>28} {memory}{reserved}")
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


def setting(text: str) -> tuple[int, int]:
    """(ranks, ZeRO stage) of an option such as "2,1". Raises ValueError for others."""
    ranks, stage = (int(number) for number in text.split(","))
    if ranks < 1 or stage not in range(4):
        raise ValueError(text)
    return ranks, stage


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line before "--"."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (ranks take all GPUs) or cuda:1")
    parser.add_argument("--setting", type=setting, action="append", help="RANKS,STAGE, such as 2,1; repeatable")
    parser.add_argument("--batch", type=int, action="append", help="pairs per update of all ranks; repeatable")
    parser.add_argument("--updates", type=int, help="updates that are timed")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two settings, one update")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "bench_rollout.json", help="JSON file; the chart is next to it"
    )
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 where a setting failed."""
    # Everything after "--" belongs to the training command.
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args = build_parser().parse_args(words[:cut])
    training = words[cut + 1 :] or list(DIGITS)
    if args.child:  # this process is one rank of a setting
        print(json.dumps(time_rank(training, args.child)))
        return 0
    device, rows, left_out = pick_device(args.device), [], []
    environment, (devices, gpus) = describe(device), gpus_for(device)
    updates = args.updates or (QUICK_UPDATES if args.quick else UPDATES)
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    del arguments["child"]
    result = {"benchmark": "bench_rollout", "complete": False, "environment": environment, "arguments": arguments}
    result |= {"training_arguments": training, "settings": rows, "left_out": left_out}
    for ranks, stage in args.setting or (QUICK_SETTINGS if args.quick else SETTINGS):
        if gpus is not None and ranks > gpus:
            left_out.append({"ranks": ranks, "zero_stage": stage, "reason": f"ranks need a GPU each; there are {gpus}"})
            print(f"{ranks} ranks, ZeRO {stage}: left out, {left_out[-1]['reason']}", file=sys.stderr, flush=True)
            continue
        for batch in args.batch or (QUICK_BATCHES if args.quick else BATCHES):
            print(f"{ranks} ranks, ZeRO {stage}, batch {batch} ...", file=sys.stderr, flush=True)
            row = {"ranks": ranks, "zero_stage": stage, "batch": batch}
            try:
                row |= run_setting(ranks, stage, batch, updates, training, devices)
            except Exception as error:  # the other settings are still to be timed
                print(f"it failed:\n{error}", file=sys.stderr, flush=True)
                row["error"] = one_line(str(error)[-300:])
            rows.append(row)
            write_json(args.output, result)
    print(table(rows), flush=True)
    result["complete"] = True
    name = "digits" if training == list(DIGITS) else shortened(" ".join(training))
    shared = "" if device.type == "cuda" else f", {cores()} cores shared by all ranks"
    timed, title = [row for row in rows if "error" not in row], f"{name} on {environment['device']}{shared}"
    write_result(args.output, result, drawn(lambda: chart(timed, title)) if timed else None)
    return int(len(timed) < len(rows))


if __name__ == "__main__":
    raise SystemExit(main())
