"""Kills training runs at random moments, resumes them, and compares them with an uninterrupted run.

    python tests/tools/crash.py --kills 50

Some kills come at any time, some after a random update, and some while a checkpoint is written. Of
two ranks, both are killed or one of them: the other then has to end by itself within a minute, and
say which rank was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import tiny

CONFIG = Path(__file__).parents[2] / "configs" / "sd15.yaml"
UPDATES, CHECKPOINT_EVERY = 12, 2
TIMING = ("pairs_per_second", "peak_memory_gib")
PRELOAD = ["crash", "tiny", "selfnpo_fast.training.replay", "deepspeed", "peft.utils"]
PRELOAD += ["torch.utils.tensorboard", "tqdm"]
LOST_WITHIN = 1800.0  # seconds, far more than it takes: a machine of load 10 is no hang

CHOICES = {
    "ranks": (1, 2),
    "zero": (0, 2),
    "reference": ("frozen", "ema"),
    "mode": ("lockstep", "continuous"),
    "lora": (0, 2),
    "overlap": (False, True),
}
Case = dict[str, object]


def all_cases() -> list[Case]:
    """Every combination of CHOICES."""
    return [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]


def words(case: Case, model: Path, output: Path) -> list[str]:
    """The command line of a case, so small that most of a run's time is what can go wrong."""
    options = {
        "model.path": model,
        "output": output,
        "updates": UPDATES,
        "rollout.mode": case["mode"],
        "rollout.grid_steps": 5,
        "rollout.pool": 2,
        "rollout.overlap": str(case.get("overlap", False)).lower(),
        "reference.kind": case["reference"],
        "reference.decay": 0.9,
        "lora.rank": case["lora"],
        "engine.zero_stage": case["zero"],
        "engine.precision": "fp32",
        "engine.batch_size": 4,
        "optimizer.name": "adamw",
        "optimizer.lr": 1e-2,
        "optimizer.warmup": 5,
        "prompts.limit": 8,
        "log.every": 3,
        "log.checkpoint_every": CHECKPOINT_EVERY,
        "log.sample_every": -1,
    }
    return ["--config", str(CONFIG), *(word for key, value in options.items() for word in (f"--{key}", str(value)))]


def run_child(argv: list[str], env: dict[str, str], log: Path) -> None:
    """The main function of a child process: a training command with its output in a file."""
    os.environ.update(env)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()  # `finish` makes a process that hangs say where
    gc.freeze()  # DeepSpeed collects garbage often, and would look through all that the server has imported
    from selfnpo_fast import train

    sys.exit(train.main(argv))


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(ranks: int, argv: list[str], logs: Path, child=run_child) -> list[multiprocessing.Process]:
    """One process per rank.

    They are forked from a server that has imported everything, so that a start costs a second.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    env = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    if ranks > 1:
        env |= {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(ranks):
        rank_env = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        process = context.Process(target=child, args=(argv, env | rank_env, logs / f"rank{rank}.log"))
        process.start()
        processes.append(process)
    return processes


def finish(processes: list[multiprocessing.Process], logs: Path, timeout: float = LOST_WITHIN) -> list[int]:
    """Exit codes of processes that end by themselves. Raises AssertionError where one hangs."""
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            os.kill(process.pid, signal.SIGABRT)
            process.join(10)
            process.kill()
            raise AssertionError(f"rank {processes.index(process)} hangs:\n{tail(logs)}")
    return [process.exitcode for process in processes]


def tail(logs: Path) -> str:
    """The ends of all ranks' output."""
    return "\n".join(f"--- {path.name}\n{path.read_text()[-6000:]}" for path in sorted(logs.glob("rank*.log")))


def _wait_for_moment(kind: str, output: Path, processes, chance: random.Random) -> bool:
    """Wait for the moment at which to kill; not any longer once a process has ended by itself.

    Returns whether the ranks have met: then the run's folder holds files of this start.
    """
    started, row = time.time(), chance.randrange(1, UPDATES // 3)
    deadline = time.monotonic() + (chance.uniform(0, 4) if kind == "anywhere" else 120)

    def new(path: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_mtime > started
        return False

    def met() -> bool:
        return new(output / "config.yaml")

    def moment_has_come() -> bool:
        if kind == "after an update":
            metrics = output / "metrics.jsonl"
            return met() and new(metrics) and metrics.read_text().count("\n") >= row
        return kind == "while writing" and any(new(path) for path in (output / "checkpoints").glob(".writing-*"))

    while time.monotonic() < deadline and not moment_has_come() and all(process.is_alive() for process in processes):
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.04))
    return met()


def kill_once(case: Case, argv: list[str], output: Path, logs: Path, chance: random.Random, counts: Counter) -> None:
    """Start or resume a run and kill it."""
    # Start it, and wait.
    processes = start(int(case["ranks"]), [*argv, "--resume"], logs)
    kind = chance.choice(("anywhere", "after an update", "while writing", "while writing"))
    met = _wait_for_moment(kind, output, processes, chance)
    writing = any((output / "checkpoints").glob(".writing-*")) if output.exists() else False
    # Kill one rank or all of them. Ranks that have not met yet wait for each other as long as torch
    # lets them; in a real run the launcher ends them.
    only_one = len(processes) > 1 and met and chance.random() < 0.5
    victims = [chance.choice(processes)] if only_one and all(p.is_alive() for p in processes) else processes
    for victim in victims:
        if victim.is_alive():
            os.kill(victim.pid, signal.SIGKILL)
    # The other ranks end by themselves.
    codes = finish(processes, logs, LOST_WITHIN)
    counts[kind if not (met and writing) else "inside checkpoint writing"] += 1
    assert all(code in (-signal.SIGKILL, 0, 1) for code in codes), f"{codes}\n{tail(logs)}"


def files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor of the negative model and of the newest checkpoint, by file."""
    newest = max((folder / "checkpoints").glob("update-*"))
    paths = [*newest.glob("*.safetensors"), *(folder / "negative").rglob("*.safetensors")]
    return {str(path.relative_to(folder)): load_file(path) for path in paths}


def metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl, without times and memory."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def assert_equal(expected: Path, found: Path) -> None:
    """Bit-identical weights, optimiser, reference, slots and metrics."""
    expected_files, found_files = files(expected), files(found)
    assert expected_files.keys() == found_files.keys()
    for name, tensors in expected_files.items():
        assert tensors.keys() == found_files[name].keys(), name
        for key, value in tensors.items():
            assert torch.equal(value, found_files[name][key]), f"{name}: {key} differs"
    assert metrics(expected) == metrics(found)


def crash(case: Case, kills: int, work: Path, model: Path, chance: random.Random) -> Counter:
    """Kill one run `kills` times, let it finish, and compare it with an uninterrupted one.

    Returns the number of kills by their kind.
    """
    name = "-".join(str(value) for value in case.values())
    whole, parts = work / f"{name}-whole", work / f"{name}-parts"
    for folder in (whole, parts):
        (folder / "logs").mkdir(parents=True)
    ranks, counts = int(case["ranks"]), Counter()
    # The uninterrupted run.
    argv = words(case, model, whole / "run")
    assert finish(start(ranks, argv, whole / "logs"), whole / "logs") == [0] * ranks, tail(whole / "logs")
    # The run that is killed.
    argv = words(case, model, parts / "run")
    for _ in range(kills):
        kill_once(case, argv, parts / "run", parts / "logs", chance, counts)
    codes = finish(start(ranks, [*argv, "--resume"], parts / "logs"), parts / "logs")
    assert codes == [0] * ranks, tail(parts / "logs")
    assert_equal(whole / "run", parts / "run")
    return counts


def main() -> None:
    """Spread the kills over the cases, in random order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--per-case", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance, counts = random.Random(args.seed), Counter()
    cases = all_cases()
    chance.shuffle(cases)
    with tempfile.TemporaryDirectory() as folder:
        model = tiny.write_sd(Path(folder) / "model")
        left = args.kills
        for case in itertools.cycle(cases):
            kills = min(left, args.per_case)
            counts += crash(case, kills, Path(folder) / f"kills{left}", model, chance)
            left -= kills
            print(f"{case}: {kills} kills, bit-identical", flush=True)
            if not left:
                break
    print(f"{args.kills} kills: {dict(counts)}")


if __name__ == "__main__":
    main()
