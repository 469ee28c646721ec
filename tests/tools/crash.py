"""Harms training runs at random moments, resumes them, and compares them with an uninterrupted run.

    python tests/tools/crash.py --kills 50

Some kills come at any time, some after a random update, and some while a checkpoint is written. Of
two ranks, both are killed or one of them: the other then has to end by itself, and say which rank
was lost. Or their launcher is killed, or gets a Ctrl-C that all of them get; or the same command runs
a second time in the same folder; or no file can grow. KINDS is the table of all that is done to a
run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path += [str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parents[2])]

import tiny
from ranks import PATIENCE, finish, free_port, launch, run_child, run_on_full_disk, start, tail

from benchmarks.environment import describe

__all__ = ["PATIENCE", "finish", "free_port", "run_child", "start", "tail"]  # for tests of other runs

CONFIG = Path(__file__).parents[2] / "configs" / "sd15.yaml"
UPDATES, CHECKPOINT_EVERY = 12, 2
TIMING = ("pairs_per_second", "peak_memory_gib")

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


MOMENTS = ("anywhere", "after an update", "while writing", "while writing")


@dataclass(frozen=True)
class Run:
    """The run that is attacked."""

    case: Case
    argv: list[str]
    """The command line that starts or resumes it."""
    output: Path
    logs: Path
    chance: random.Random

    @property
    def ranks(self) -> int:
        return int(self.case["ranks"])

    def is_writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self.output.exists() and any((self.output / "checkpoints").glob(".writing-*"))


def wait_for_moment(run: Run, moment: str, processes) -> bool:
    """Wait for the moment of an attack; not any longer once a process has ended by itself.

    Returns whether the ranks have met: then the run's folder holds files of this start.
    """
    chance, output = run.chance, run.output
    started, row = time.time(), chance.randrange(1, UPDATES // 3)
    deadline = time.monotonic() + (chance.uniform(0, 4) if moment == "anywhere" else PATIENCE)

    def new(path: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_mtime > started
        return False

    def met() -> bool:
        return new(output / "config.yaml")

    def has_come() -> bool:
        if moment == "after an update":
            metrics = output / "metrics.jsonl"
            return met() and new(metrics) and metrics.read_text().count("\n") >= row
        return moment == "while writing" and any(new(path) for path in (output / "checkpoints").glob(".writing-*"))

    while time.monotonic() < deadline and not has_come() and all(process.is_alive() for process in processes):
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.04))
    return met()


# The kinds of attack. Each starts or resumes the run, harms it once, sees it end, and returns the
# name under which it is counted.


def kill_ranks(run: Run) -> str:
    """SIGKILL to all ranks or one of them; the others end by themselves."""
    processes = start(run.ranks, run.argv, run.logs)
    moment = run.chance.choice(MOMENTS)
    met = wait_for_moment(run, moment, processes)
    writing = run.is_writing()
    # Ranks that have not met yet wait for each other as long as torch lets them; in a real run the
    # launcher ends them.
    only_one = len(processes) > 1 and met and run.chance.random() < 0.5
    victims = [run.chance.choice(processes)] if only_one and all(p.is_alive() for p in processes) else processes
    for victim in victims:
        if victim.is_alive():
            os.kill(victim.pid, signal.SIGKILL)
    codes = finish(processes, run.logs)
    assert all(code in (-signal.SIGKILL, 0, 1) for code in codes), f"{codes}\n{tail(run.logs)}"
    return moment if not (met and writing) else "inside checkpoint writing"


def kill_launcher(run: Run) -> str:
    """SIGKILL to the launcher alone: its ranks save and end by themselves."""
    with launch(run.ranks, run.argv, run.logs) as launched:
        wait_for_moment(run, run.chance.choice(MOMENTS), [launched.process])
        launched.process.kill()  # nothing, where the run has ended
        codes = launched.finish()
    assert set(codes.values()) == {0} and len(codes) == run.ranks, f"{codes}\n{tail(run.logs)}"
    assert launched.ended_well(), tail(run.logs)
    return "launcher killed"


def interrupt(run: Run) -> str:
    """Ctrl-C in the terminal of a launcher, which then sends SIGTERM to its ranks."""
    with launch(run.ranks, run.argv, run.logs) as launched:
        met = wait_for_moment(run, run.chance.choice(MOMENTS), [launched.process])
        if launched.process.is_alive():
            os.killpg(launched.process.pid, signal.SIGINT)
        codes = launched.finish()
    # Before the ranks have met, there is nothing to save, and they may end at once. A rank that has
    # saved may meet the launcher's SIGTERM while it leaves.
    if met:
        assert launched.ended_well(), f"{codes}\n{tail(run.logs)}"
    return "Ctrl-C" if met else "Ctrl-C before the ranks have met"


def rival(run: Run) -> str:
    """The same command a second time, at once: one of them is refused, and the other is killed."""
    rival_logs = run.logs / "rival"
    rival_logs.mkdir(exist_ok=True)
    sides = [(start(run.ranks, run.argv, logs), logs) for logs in (run.logs, rival_logs)]
    deadline = time.monotonic() + PATIENCE
    while all(p.is_alive() for processes, _ in sides for p in processes) and time.monotonic() < deadline:
        time.sleep(0.001)
    # The one that ends first is the refused one, unless the other had come to its end before.
    sides.sort(key=lambda side: all(p.is_alive() for p in side[0]))
    (refused, refused_logs), (writer, logs) = sides
    codes = finish(refused, refused_logs)
    wait_for_moment(run, run.chance.choice(MOMENTS), writer)
    for process in writer:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    others = finish(writer, logs)
    assert all(code in (-signal.SIGKILL, 0, 1) for code in others), f"{others}\n{tail(logs)}"
    if set(codes) == {0}:
        return "a rival that came too late"
    assert set(codes) == {2}, f"{codes}\n{tail(refused_logs)}"
    assert "is being written by process" in (refused_logs / "rank0.log").read_text(), tail(refused_logs)
    return "two runs in one folder"


def fill_disk(run: Run) -> str:
    """No file may grow beyond some size: what cannot be written costs a line, the negative the run."""
    most = int(2 ** run.chance.uniform(12, 20))
    logs = run.logs / "full disk"
    logs.mkdir(exist_ok=True)
    processes = start(run.ranks, run.argv, logs, functools.partial(run_on_full_disk, most))
    codes = finish(processes, logs)
    assert set(codes) in ({0}, {1}), f"{codes}\n{tail(logs)}"
    assert "Traceback" not in tail(logs), tail(logs)
    return "full disk" if set(codes) == {1} else "a disk that sufficed"


KINDS: dict[str, tuple[Callable[[Run], str], int]] = {
    "ranks": (kill_ranks, 6),
    "launcher": (kill_launcher, 1),
    "interrupt": (interrupt, 1),
    "rival": (rival, 1),
    "full disk": (fill_disk, 1),
}
"""Every kind of attack, and how often `main` chooses it. A new kind is a function and a line here."""


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


def crash(case: Case, kinds: Sequence[str], work: Path, model: Path, chance: random.Random) -> Counter:
    """Attack one run once for each of `kinds`, let it finish, and compare it with a whole one.

    Returns the number of attacks by their names.
    """
    name = "-".join(str(value) for value in case.values())
    whole, parts = work / f"{name}-whole", work / f"{name}-parts"
    for folder in (whole, parts):
        (folder / "logs").mkdir(parents=True)
    ranks, counts = int(case["ranks"]), Counter()
    # The uninterrupted run.
    argv = words(case, model, whole / "run")
    assert finish(start(ranks, argv, whole / "logs"), whole / "logs") == [0] * ranks, tail(whole / "logs")
    # The run that is attacked.
    argv = [*words(case, model, parts / "run"), "--resume"]
    run = Run(case, argv, parts / "run", parts / "logs", chance)
    for kind in kinds:
        attack, _ = KINDS[kind]
        counts[attack(run)] += 1
    codes = finish(start(ranks, argv, parts / "logs"), parts / "logs")
    assert codes == [0] * ranks, tail(parts / "logs")
    assert_equal(whole / "run", parts / "run")
    return counts


def main() -> None:
    """Spread the kills over the cases, in random order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--per-case", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file for the counts")
    args = parser.parse_args()
    chance, counts, begun = random.Random(args.seed), Counter(), time.monotonic()
    environment = describe(torch.device("cpu"))
    cases = all_cases()
    chance.shuffle(cases)
    with tempfile.TemporaryDirectory() as folder:
        model = tiny.write_sd(Path(folder) / "model")
        left = args.kills
        for case in itertools.cycle(cases):
            weights = [weight for _, weight in KINDS.values()]
            kinds = chance.choices(list(KINDS), weights, k=min(left, args.per_case))
            counts += crash(case, kinds, Path(folder) / f"kills{left}", model, chance)
            left -= len(kinds)
            print(f"{case}: {', '.join(kinds)}; bit-identical", flush=True)
            if not left:
                break
    print(f"{args.kills} kills: {dict(counts)}")
    if args.output is not None:
        result = {"kills": args.kills, "per_case": args.per_case, "seed": args.seed, "bit_identical": True}
        result |= {"kinds": dict(sorted(counts.items())), "minutes": round((time.monotonic() - begun) / 60, 1)}
        result |= {"environment": environment}
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
