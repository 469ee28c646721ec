"""What a short spin of OpenMP's threads gains where other work shares the cores, and what it costs.

    python -m benchmarks.bench_busy            # on an idle machine; it makes the other work itself

GNU's OpenMP lets a thread that waits at a barrier spin, 300,000 rounds by default, before it
sleeps. Two processes train the digits, one with that default and one with what commands set
(GOMP_SPINCOUNT=3000). They take turns, in every round once on the idle machine, and once beside as
many busy loops as there are cores. Ratios are taken within a round. Both processes have to begin
with the same loss; if they do not, nothing is timed and the exit status is 1. The JSON file is
written anew after every round. The question is one of CPUs: for a GPU the file only says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: Python has put this folder on the path, not its parent
    sys.path[0] = str(ROOT)

from selfnpo_fast.runtime.command import short_spin  # noqa: E402

os.environ.update(short_spin())  # before torch is imported

from benchmarks.environment import (  # noqa: E402
    RESULTS,
    bar_chart,
    cores,
    describe,
    drawn,
    pick_device,
    spread,
    write_json,
    write_result,
)

OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Variables of whoever runs the benchmark that neither arm keeps."""
ARMS = {"default": {}, "short": {"GOMP_SPINCOUNT": "3000"}}
"""What each arm adds to the environment."""
LOADS = ("idle", "busy")
ROUNDS, SECONDS, BATCH = 7, 10.0, 16
"""Rounds, the least seconds of one timing, and pairs an update."""
TOLERANCE = 1e-4
"""Relative, between the arms' first losses."""
NOT_ON_GPUS = "the spin of OpenMP's threads concerns training on a CPU; with a GPU there is nothing to time"


class Trainer:
    """A process of one arm that trains on request."""

    def __init__(self, name: str, batch: int) -> None:
        """Starts the process, and waits for its first loss. Raises RuntimeError where it fails."""
        environment = {key: value for key, value in os.environ.items() if key not in OWN} | ARMS[name]
        environment["CUDA_VISIBLE_DEVICES"] = ""  # a GPU would train instead
        words = ["--config", "configs/digits.yaml", "--engine.batch_size", str(batch)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from benchmarks.arms.busy import serve; serve({words!r})"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.loss = self._answer()

    def pairs_per_second(self, seconds: float) -> float:
        """Trains for at least so many seconds and one update."""
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> float:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the training process left with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Runs `count` processes that never wait."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measure(
    rounds: int, seconds: float, batch: int, after_round: Callable[[Mapping], None] = lambda values: None
) -> dict[str, dict[str, list[float]]]:
    """Pairs per second, a value a round, by load and arm; the first round is not counted.

    `after_round` is given the values after each round that counts. Raises RuntimeError where the
    arms begin with different losses.
    """
    with contextlib.ExitStack() as processes:
        trainers = {}
        for name in ARMS:
            trainers[name] = Trainer(name, batch)
            processes.callback(trainers[name].close)
        first, second = (trainer.loss for trainer in trainers.values())
        if not math.isclose(first, second, rel_tol=TOLERANCE):
            raise RuntimeError(f"the arms begin with losses {first} and {second}")
        values = {load: {name: [] for name in ARMS} for load in LOADS}
        for number in range(rounds + 1):
            print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
            for load in LOADS:
                with busy_loops(cores() if load == "busy" else 0):
                    for name, trainer in trainers.items():
                        rate = trainer.pairs_per_second(seconds)
                        if number:
                            values[load][name].append(rate)
            if number:
                after_round(values)
    return values


def summarise(values: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict]:
    """By load: pairs per second of each arm, and the ratio of the short spin to the default."""
    return {
        load: {
            "pairs_per_second": {name: spread(rates) for name, rates in arms.items()},
            "rounds_pairs_per_second": {name: list(rates) for name, rates in arms.items()},
            "short_to_default": spread([b / a for a, b in zip(arms["default"], arms["short"], strict=True)]),
        }
        for load, arms in values.items()
    }


def table(loads: Mapping[str, Mapping]) -> str:
    """The printed table: medians, in brackets the smallest and the largest round."""

    def cell(value: Mapping[str, float]) -> str:
        return f"{value['median']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"

    lines = [f"{'':6} {'default, pairs/s':>26} {'short spin, pairs/s':>26} {'short : default':>26}"]
    for load, record in loads.items():
        cells = [*record["pairs_per_second"].values(), record["short_to_default"]]
        lines.append(" ".join([f"{load:6}", *(f"{cell(value):>26}" for value in cells)]))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 where the arms differ or one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timings per arm and load; one more is not counted")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; nothing is timed with a GPU")
    parser.add_argument("--quick", action="store_true", help="a smoke run: one round of one update each")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "bench_busy.json", help="JSON file; the chart is next to it"
    )
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {"benchmark": "bench_busy", "complete": False, "environment": describe(device), "arguments": arguments}
    if device.type == "cuda":
        print(NOT_ON_GPUS, flush=True)
        write_result(args.output, result | {"complete": True, "left_out": NOT_ON_GPUS}, None)
        return 0

    def save(values: Mapping) -> None:
        write_json(args.output, result | {"loads": summarise(values)})

    try:
        sizes = (1, 0.0, 2) if args.quick else (args.rounds, SECONDS, BATCH)
        loads = summarise(measure(*sizes, save))
    except RuntimeError as error:
        print(f"it failed: {error}", file=sys.stderr)
        return 1
    print(table(loads), flush=True)
    result |= {"complete": True, "loads": loads}
    names = {"default": "default", "short": "GOMP_SPINCOUNT=3000"}
    panels = {
        f"digits, {load}, {result['environment']['device']}": {
            names[name]: value for name, value in record["pairs_per_second"].items()
        }
        for load, record in loads.items()
    }
    write_result(args.output, result, drawn(lambda: bar_chart(panels, "pairs per second")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
