"""What one training pair costs in seconds and forwards, for the authors' schedule and for ours.

    python -m benchmarks.bench_step                     # both small networks; ten minutes on two cores
    python -m benchmarks.bench_step --net transformers  # a narrow CogVideoX and Stable Diffusion 3.5
    python -m benchmarks.bench_step --net digits --quick
    python -m benchmarks.bench_step --net sd15 --arm continuous --arm floor --rounds 3

An arm is timed while it clears the gradients, makes one minibatch of pairs, and runs student
forward, loss and backward. The floors do the same on pairs that exist already; one of them runs a
reference forward first. Optimiser and EMA are timed separately, because no arm changes them. Every
round times each arm once, so that all arms see the machine in the same state, and ratios are taken
within a round.

Before any timing, a gate (step_gate.py) compares every arm's pairs with the right ones, and its
number of forwards with the closed form. It runs in float32 without TF32, whatever the precision of
the timing, and its networks are freed. An arm that fails there, or raises later, is named and left
out; the others are timed, and the exit status is 1. The JSON file is written anew after every
round, and is marked `complete` at the end.

`ReleasedRollout` and `UnbatchedPredictor` repeat the authors' schedule of network calls, and
nothing else of their code. The other overheads of that code are left out (fp32 weights that are
cast again on every forward under autocast, `.item()` per sample, prints), so the arms "as released"
are faster than the released code. Continuous rollouts are timed in their steady state, without the
start-up that fills their slots once per run. They have one group of slots: more groups cost memory,
not time per pair. On a GPU one continuous arm replays its step as a CUDA graph, captured before any
timing. A replay runs no Python, so nobody counts its forwards: the closed form is reported for that
arm (`forwards_counted` is false), and the gate compares the pairs of a replay.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: Python has put this folder on the path, not its parent
    sys.path[0] = str(ROOT)

from selfnpo_fast.runtime.command import short_spin  # noqa: E402

os.environ.update(short_spin())  # before torch is imported

import torch  # noqa: E402

from benchmarks.arms.step import ARMS, Arm, Workbench, expected_forwards  # noqa: E402
from benchmarks.environment import (  # noqa: E402
    RESULTS,
    describe,
    drawn,
    memory_gib,
    pick_device,
    release,
    spread,
    synchronize,
    write_json,
    write_result,
)
from benchmarks.nets import NETS, SMALL, TRANSFORMERS, BenchNet, chosen  # noqa: E402
from benchmarks.step_gate import gate_of  # noqa: E402
from benchmarks.step_report import Timing, chart, summarise, table  # noqa: E402
from selfnpo_fast.rollout import ContinuousRollout, LockstepRollout, Pairs  # noqa: E402
from selfnpo_fast.runtime.console import quiet_libraries  # noqa: E402
from selfnpo_fast.runtime.dtypes import DTYPES  # noqa: E402
from selfnpo_fast.runtime.errors import one_line  # noqa: E402

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""The clocks of `--clock`.

The time of the process on its cores is for a CPU that has other work.
"""


def attempt(timing: Timing, device: torch.device, action: Callable[[], object]) -> object:
    """The result of `action`; None where it raises, which becomes the arm's error."""
    try:
        return action()
    except Exception as error:  # one arm's failure leaves the others
        timing.error = one_line(f"{type(error).__name__}: {error}")
    print(f"{timing.arm.name}: {timing.error}", file=sys.stderr, flush=True)
    release(device)  # after the exception, which refers to the tensors of its frames
    return None


def measure(
    bench: Workbench, rounds: int, timings: Sequence[Timing], after_round: Callable[[], None] = lambda: None
) -> None:
    """Times every arm without an error once per round; one more round, the first, is not counted.

    An arm that raises, or whose number of forwards is not the expected one, gets an error.
    """
    ready, rollouts = None, {}
    for timing in timings:
        if timing.error is not None:
            continue
        config = timing.arm.config
        if config is None and ready is None:
            ready = attempt(timing, bench.device, lambda: bench.start()[0])
        elif config is not None:
            rollouts[timing.arm.name] = attempt(timing, bench.device, functools.partial(bench.prepared, timing.arm))
    for number in range(rounds + 1):
        for timing in timings:
            if timing.error is not None:
                continue
            rollout = rollouts.get(timing.arm.name)
            action = functools.partial(_time, bench, timing.arm, rollout, ready)
            measured = attempt(timing, bench.device, action)
            if measured is None:
                rollouts.pop(timing.arm.name, None)
            elif number:
                timing.add(*measured)
        print(f"{bench.net.name}: round {number} of {rounds}", file=sys.stderr, flush=True)
        after_round()


def _time(
    bench: Workbench, arm: Arm, rollout: LockstepRollout | ContinuousRollout | None, ready: Pairs | None
) -> tuple[float, int, bool]:
    """Seconds and reference forwards of one minibatch, and whether its loss is finite.

    Raises RuntimeError for a wrong number of forwards.
    """
    expected = arm.forwards * bench.batch if rollout is None else expected_forwards(arm, rollout)
    before, student = bench.forwards, bench.student
    # The timed part.
    synchronize(bench.device)
    start = bench.clock()
    student.zero_grad(set_to_none=True)
    for _ in range(arm.forwards):
        bench.forward(ready)
    loss = bench.step(ready if rollout is None else rollout.next_pairs())
    synchronize(bench.device)
    seconds = bench.clock() - start
    counted = expected if arm.graphs else bench.forwards - before
    if counted != expected:
        raise RuntimeError(f"{counted} forwards, {expected} expected")
    return seconds, counted, math.isfinite(loss.item())


def run_net(
    net: BenchNet,
    entry: dict[str, object],
    save: Callable[[], None],
    *,
    batch: int,
    rounds: int,
    device: torch.device,
    precision: str,
    compile: str,
    clock: str,
    arms: Sequence[Arm],
) -> None:
    """Runs the gate, then times the arms on one network.

    Results go into `entry`, the network's entry in the results; `save` is called whenever there are
    new ones.
    """
    entry |= {"batch": batch, "rounds": rounds, "precision": precision, "compile": compile, "clock": clock}
    entry["left_out"] = {arm.name: "CUDA graphs need a GPU" for arm in arms if arm.graphs and device.type != "cuda"}
    for name, reason in entry["left_out"].items():
        print(f"{name}: left out, {reason}", file=sys.stderr, flush=True)
    timings = [Timing(arm) for arm in arms if arm.name not in entry["left_out"]]
    # The gate. Its networks are freed before those of the timing are made.
    print(f"{net.name}: correctness gate", file=sys.stderr, flush=True)
    start = time.perf_counter()
    gate = gate_of(net, device, [timing.arm for timing in timings])
    release(device)
    entry["gate"] = asdict(gate) | {"seconds": time.perf_counter() - start}
    for timing in timings:
        if timing.arm.name in gate.failures:
            timing.error = "correctness gate: " + "; ".join(gate.failures[timing.arm.name])
            print(f"{net.name}: {timing.arm.name}: {timing.error}", file=sys.stderr)
    # The arms.
    bench = Workbench(net, batch=batch, device=device, dtype=DTYPES[precision], compile=compile, clock=CLOCKS[clock])
    entry |= {"parameters": sum(p.numel() for p in bench.reference.parameters())}
    entry |= {"latent_shape": list(net.latent_shape), "seconds_per_update": {}}

    def after_round() -> None:
        entry.update(arms=summarise(timings, batch), memory_gib=memory_gib(device))
        save()

    after_round()
    measure(bench, rounds, timings, after_round)
    # What no arm changes. Its memory is not that of the arms, whose peaks are known by now.
    bench.student.zero_grad(set_to_none=True)
    release(device)
    seconds = bench.update_seconds(rounds)
    entry["seconds_per_update"] = {name: spread(values) for name, values in seconds.items()}
    save()


def defaults(name: str, device: torch.device, quick: bool) -> tuple[int, int]:
    """Batch and rounds of a network.

    On two CPU cores the small networks take about ten minutes. On CUDA the batch is the authors'
    per GPU; SDXL and the large transformers have a smaller one, since no activations are made again
    in the backward pass.
    """
    if quick:
        return 2, 2
    small = (*SMALL, *TRANSFORMERS)
    if device.type == "cuda":
        large = {"sdxl": (2, 5), "sd35_medium": (2, 5), "cogvideox_5b": (1, 5), "wan21_1_3b": (1, 5)}
        return large.get(name, (20, 20 if name in small else 5))
    return (32, 20) if name == "digits" else (2, 5) if name in small else (1, 3)


def build_parser(arms: Sequence[Arm] = ARMS) -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--net", choices=[*NETS, "all", "transformers"], help="all (two small UNets) by default, digits with --quick"
    )
    parser.add_argument("--arm", action="append", choices=[arm.name for arm in arms], help="repeatable; all by default")
    parser.add_argument("--batch", type=int, help="pairs per minibatch")
    parser.add_argument("--rounds", type=int, help="timings per arm; one more is not counted")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="fp32 on the CPU, bf16 on CUDA by default")
    parser.add_argument("--compile", choices=["off", "default", "max"], default="off", help="of student and reference")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: the process's time on its cores, with one thread"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: two rounds of two pairs")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "bench_step.json", help="JSON file; the chart is next to it"
    )
    return parser


def main(argv: Sequence[str] | None = None, arms: Sequence[Arm] = ARMS) -> int:
    """Runs the benchmark; returns 1 where an arm or a network failed."""
    args = build_parser(arms).parse_args(argv)
    quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.clock == "cpu" and (pick_device(args.device).type != "cpu" or torch.get_num_threads() > 1):
        raise SystemExit("--clock cpu counts the work of one thread of a CPU; give --device cpu --threads 1")
    device, names = pick_device(args.device), args.arm or [arm.name for arm in arms]
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {"benchmark": "bench_step", "complete": False, "environment": describe(device), "arguments": arguments}
    nets = result["nets"] = {}
    for name in chosen(args.net, args.quick):
        batch, rounds = defaults(name, device, args.quick)
        settings = {"batch": args.batch or batch, "rounds": args.rounds or rounds, "precision": precision}
        settings |= {"compile": args.compile, "clock": args.clock, "arms": [arm for arm in arms if arm.name in names]}
        entry = nets[name] = {}
        try:
            run_net(NETS[name](), entry, lambda: write_json(args.output, result), device=device, **settings)
        except Exception as error:  # the other networks are still to be timed
            entry["error"] = one_line(f"{type(error).__name__}: {error}")
            print(f"{name}: {entry['error']}", file=sys.stderr, flush=True)
        release(device)
        if "arms" in entry:
            print(table(name, entry, result["environment"]), flush=True)
    result["complete"] = True
    write_result(args.output, result, drawn(lambda: chart(result)))
    records = [*nets.values(), *(arm for entry in nets.values() for arm in entry.get("arms", ()))]
    return int(any("error" in record for record in records))


if __name__ == "__main__":
    raise SystemExit(main())
