"""What one training pair costs in seconds and forwards, for the authors' schedule and for ours.

    python -m benchmarks.bench_step                     # both networks; ten minutes on two cores
    python -m benchmarks.bench_step --net digits --quick

An arm is timed while it clears the gradients, makes one minibatch of pairs, and runs student
forward, loss and backward. The floors do the same on pairs that exist already; one of them runs a
reference forward first. Optimiser and EMA are timed separately, because no arm changes them. Every
round times each arm once, so that all arms see the machine in the same state, and ratios are taken
within a round.

Before any timing, `check_arms` compares every arm's pairs with the right ones, and its number of
forwards with the closed form. If they differ, nothing is timed and the exit status is 1.

`ReleasedRollout` and `UnbatchedPredictor` repeat the authors' schedule of network calls, and
nothing else of their code. The other overheads of that code are left out (fp32 weights that are
cast again on every forward under autocast, `.item()` per sample, prints), so the arms "as released"
are faster than the released code. Continuous rollouts are timed in their steady state, without the
start-up that fills their slots once per run. They have one group of slots: more groups cost memory,
not time per pair.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: Python has put this folder on the path, not its parent
    sys.path[0] = str(ROOT)

from selfnpo_fast.runtime.command import short_spin  # noqa: E402

os.environ.update(short_spin())  # before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.arms.step import ARMS, CONTINUOUS, FLOOR, FORWARD, Arm, Workbench, expected_forwards  # noqa: E402
from benchmarks.environment import (  # noqa: E402
    RESULTS,
    bar_chart,
    describe,
    pick_device,
    spread,
    synchronize,
    write_result,
)
from benchmarks.nets import NETS, BenchNet, chosen  # noqa: E402
from selfnpo_fast.config import RolloutConfig  # noqa: E402
from selfnpo_fast.rollout import (  # noqa: E402
    ContinuousRollout,
    LockstepDraws,
    LockstepRollout,
    PairMaker,
    Pairs,
    lockstep_rollout,
)
from selfnpo_fast.runtime.console import quiet_libraries  # noqa: E402
from selfnpo_fast.runtime.dtypes import DTYPES  # noqa: E402
from selfnpo_kernels import Draw, normal  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GATE_BATCH = 2
"""Pairs per minibatch in the correctness gate."""
TOLERANCE = 2e-5
"""Largest difference of float32 pairs that should be equal, relative to their root mean square.

On the CPU the difference is 0. Batches of other sizes, whose sums round differently, come to 2e-6
after 25 steps.
"""


@dataclass
class Gate:
    """What the correctness gate has found; the arms may be timed if there are no failures."""

    largest_error: float = 0.0
    """Largest difference relative to the root mean square."""
    tolerance: float = TOLERANCE
    forwards: dict[str, float] = field(default_factory=dict)
    """Reference forwards per pair by arm, in the minibatch that the gate ran."""
    failures: list[str] = field(default_factory=list)
    """One line per failure."""

    def count(self, name: str, network: int, counter: int, expected: int, batch: int) -> None:
        """Compares the rows the network forwarded, and a predictor's count, to `expected`."""
        self.forwards[name] = network / batch
        if not network == counter == expected:
            self.failures.append(f"{name}: {network} forwards, {counter} counted, {expected} expected")

    def compare(self, name: str, what: str, ours: torch.Tensor, truth: torch.Tensor) -> None:
        """Compares tensors of equal shape, integers exactly and others to the tolerance."""
        if not ours.is_floating_point():
            if not torch.equal(ours, truth):
                self.failures.append(f"{name}: other {what}")
            return
        error = ((ours - truth).abs().max() / truth.square().mean().sqrt()).item()
        self.largest_error = max(self.largest_error, error)
        if not error <= self.tolerance:  # NaN fails, too
            self.failures.append(f"{name}: {what} differs by {error:.1e}, tolerance {self.tolerance:.0e}")


def mixed_batch(rollout: LockstepRollout, k: int) -> int:
    """The first sample id whose minibatch has samples that arrive early and samples that do not.

    A sample arrives early if it passes grid index 0 before K steps.
    """
    start = rollout.draws(torch.arange(512)).start_index
    batches = start.unfold(0, rollout.batch, 1)
    return int(((batches.amin(1) < k - 1) & (batches.amax(1) >= k - 1)).nonzero()[0])


def check_arms(bench: Workbench, arms: Sequence[Arm] = ARMS) -> Gate:
    """The correctness gate: compares every arm's forwards and pairs with the right ones.

    The right number of forwards is `expected_forwards`. The arms at K = 5 and K = 25 have to give
    the pairs of the project's lockstep mode. Continuous pairs at w = -1 have to lie on the lockstep
    trajectory of their sample. The workbench has to be in float32.
    """
    gate, truths, slots = Gate(), {}, None
    for arm in arms:
        if arm.config is None:
            gate.forwards[arm.name] = float(arm.forwards)
            continue
        # A start that tells right from wrong: filled slots, or a minibatch with early arrivals.
        rollout, continuous = bench.rollout(arm), arm.config.mode == "continuous"
        if continuous and slots is None:
            rollout.next_pairs()
            slots = rollout.state_dict()
        elif continuous:
            rollout.load_state_dict(slots)  # a second start-up would take much of the gate's time
        elif arm.config.start == "data":
            rollout.next_id = mixed_batch(rollout, arm.config.max_steps)
        first_id = None if continuous else rollout.next_id
        # One minibatch, with both counts of its forwards.
        predictor = rollout.maker.predictor
        expected, network, counter = expected_forwards(arm, rollout), bench.forwards, predictor.forwards
        pairs = rollout.next_pairs()
        gate.count(arm.name, bench.forwards - network, predictor.forwards - counter, expected, bench.batch)
        # Its pairs against those of lockstep rollouts of the same samples.
        if not continuous:
            key = repr(arm.config)
            if key not in truths:
                truths[key] = lockstep_pairs(bench, arm.config, first_id)
            truth = truths[key]
            for name in ("sample_ids", "t", "s", "rows", "x_s", "target"):
                gate.compare(arm.name, name, getattr(pairs, name), getattr(truth, name))
        elif arm.config.omega == -1:
            x_s, target = on_trajectory(rollout.maker, pairs)
            gate.compare(arm.name, "x_s", pairs.x_s, x_s)
            gate.compare(arm.name, "target", pairs.target, target)
    return gate


def lockstep_pairs(bench: Workbench, config: RolloutConfig, first_id: int) -> Pairs:
    """One minibatch of the project's lockstep mode, from sample id `first_id` on."""
    rollout = bench.rollout(Arm(name="truth", label="", config=config, rollout=LockstepRollout))
    rollout.next_id = first_id
    return rollout.next_pairs()


def on_trajectory(maker: PairMaker, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """x_s and target, each (B, ...), of lockstep rollouts that end at the pairs' timesteps.

    The rollouts start from noise and have the samples and the s of `pairs`.
    """
    grid, ids = maker.grid, pairs.sample_ids
    index = torch.searchsorted(grid.timesteps, pairs.t) - 1
    draws = LockstepDraws(
        start_index=torch.full_like(ids, grid.steps - 1).cpu(),
        steps=(grid.steps - 1 - index).cpu(),
        noise=normal(maker.key(Draw.START_NOISE, ids), maker.latent_shape),
        s=pairs.s,
        renoise=normal(maker.key(Draw.RENOISE, ids, index), maker.latent_shape),
    )
    out = lockstep_rollout(maker.predictor, grid, draws, None, maker.rows(ids))
    # Continuous mode's target at t = 0 is the final x.
    ended = (pairs.t == 0).view(-1, *[1] * (out.x_t.ndim - 1))
    return out.x_s, torch.where(ended, out.x_t, out.target)


def measure(bench: Workbench, rounds: int, arms: Sequence[Arm] = ARMS) -> tuple[np.ndarray, np.ndarray]:
    """Times every arm once per round; one more round, the first, is not counted.

    Returns seconds and reference forwards per minibatch, each of shape (rounds, arms). Raises
    RuntimeError where the number of forwards is not the expected one.
    """
    rollouts = [None if arm.config is None else bench.rollout(arm) for arm in arms]
    # The first pairs of every continuous rollout, which fills its slots; the floors use them.
    ready = [rollout.next_pairs() for rollout in rollouts if isinstance(rollout, ContinuousRollout)]
    seconds, forwards = np.zeros((rounds + 1, len(arms))), np.zeros((rounds + 1, len(arms)), dtype=int)
    for number in range(rounds + 1):
        for column, (arm, rollout) in enumerate(zip(arms, rollouts, strict=True)):
            expected = arm.forwards * bench.batch if rollout is None else expected_forwards(arm, rollout)
            before = bench.forwards
            # The timed part.
            synchronize(bench.device)
            start = time.perf_counter()
            bench.student.zero_grad(set_to_none=True)
            for _ in range(arm.forwards):
                bench.forward(ready[0])
            bench.step(ready[0] if rollout is None else rollout.next_pairs())
            synchronize(bench.device)
            seconds[number, column] = time.perf_counter() - start
            forwards[number, column] = bench.forwards - before
            if forwards[number, column] != expected:
                raise RuntimeError(f"{arm.name}: {forwards[number, column]} forwards, {expected} expected")
        print(f"{bench.net.name}: round {number} of {rounds}", file=sys.stderr, flush=True)
    return seconds[1:], forwards[1:]


def run_net(
    net: BenchNet,
    *,
    batch: int,
    rounds: int,
    device: torch.device,
    precision: str,
    compile: str = "off",
    arms: Sequence[Arm] = ARMS,
) -> dict[str, object]:
    """Runs the gate, then times the arms on one network; returns its entry in the results.

    Where the gate fails, the entry has only "failures".
    """
    print(f"{net.name}: correctness gate", file=sys.stderr, flush=True)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        gate = check_arms(Workbench(net, batch=GATE_BATCH, device=device, dtype=torch.float32), arms)
    if gate.failures:
        return {"failures": gate.failures}
    bench = Workbench(net, batch=batch, device=device, dtype=DTYPES[precision], compile=compile)
    seconds, forwards = measure(bench, rounds, arms)
    return {
        "parameters": sum(p.numel() for p in bench.student.parameters()),
        "latent_shape": list(net.latent_shape),
        "batch": batch,
        "rounds": rounds,
        "precision": precision,
        "gate": asdict(gate),
        "compile": compile,
        "arms": summarise(seconds / batch, forwards / batch, arms),
        "seconds_per_update": {name: spread(values) for name, values in bench.update_seconds(rounds).items()},
    }


def summarise(seconds: np.ndarray, forwards: np.ndarray, arms: Sequence[Arm]) -> list[dict[str, object]]:
    """One record per arm, from seconds and reference forwards per pair, each (rounds, arms).

    Ratios are taken within each round; the record has their median and spread.
    """
    column = {arm.name: i for i, arm in enumerate(arms)}
    records = []
    for i, arm in enumerate(arms):
        config = arm.config
        # A continuous rollout has no K, because each of its steps gives a pair.
        k = None if config is None or config.mode == "continuous" else config.max_steps
        record = {"name": arm.name, "label": arm.label, "start": config and config.start, "k": k}
        record |= {"w": config and config.omega, "forwards_per_pair": float(forwards[:, i].mean())}
        record |= {"seconds_per_pair": spread(seconds[:, i]), "rounds_seconds_per_pair": seconds[:, i].tolist()}
        for name in (CONTINUOUS, FORWARD, FLOOR):
            record[f"ratio_to_{name}"] = spread(seconds[:, i] / seconds[:, column[name]])
        records.append(record)
    return records


def title(name: str, result: dict, environment: dict) -> str:
    """Network, settings and machine in one line."""
    size = f"{result['parameters'] / 1e6:.1f} M parameters, batch {result['batch']}, {result['precision']}"
    machine = f"{environment['device']}, {environment['threads']} CPU threads"
    return f"{name} ({size}), {result['rounds']} rounds on {machine}"


def table(name: str, result: dict, environment: dict) -> str:
    """The printed table of one network: medians, in brackets the smallest and the largest round."""

    def cell(value: dict, digits: str) -> str:
        return f"{value['median']:{digits}} [{value['low']:{digits}}, {value['high']:{digits}}]"

    lines = [["arm", "start", "K", "w", "forwards/pair", "seconds/pair [least, most]"]]
    lines[0] += ["x continuous w=-1", "x one forward", "x student"]
    for arm in result["arms"]:
        setting = ["-" if arm[key] is None else f"{arm[key]:g}" for key in ("k", "w")]
        values = [f"{arm['forwards_per_pair']:.4g}", cell(arm["seconds_per_pair"], ".3g")]
        values += [cell(arm[f"ratio_to_{other}"], ".2f") for other in (CONTINUOUS, FORWARD, FLOOR)]
        lines.append([arm["label"], arm["start"] or "-", *setting, *values])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    rows = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rows += [f"{name}: {cell(value, '.3g')} s an update" for name, value in result["seconds_per_update"].items()]
    gate = f"equal pairs to {result['gate']['largest_error']:.1e} (tolerance {result['gate']['tolerance']:.0e})"
    return "\n".join([f"{title(name, result, environment)}; {gate}", *rows, ""])


def chart(result: dict) -> Figure:
    """Seconds per pair relative to the floor, one panel per network."""
    panels = {}
    for name, net in result["nets"].items():
        bars = {}
        for arm in net["arms"]:
            symbols = (("k", "K"), ("w", "w"))
            setting = [f"{symbol} = {arm[key]:g}" for key, symbol in symbols if arm[key] is not None]
            bars[", ".join([arm["label"], *setting])] = arm[f"ratio_to_{FLOOR}"]
        panels[title(name, net, result["environment"]).replace(" on ", "\non ")] = bars
    return bar_chart(panels, "seconds per training pair, floor = 1")


def defaults(name: str, device: torch.device, quick: bool) -> tuple[int, int]:
    """Batch and rounds of a network.

    On two CPU cores both networks take about ten minutes. On CUDA the batch is the authors' per
    GPU.
    """
    if quick:
        return 2, 2
    if device.type == "cuda":
        return 20, 20
    return {"digits": (32, 20), "sd15_small": (2, 5)}.get(name, (1, 3))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=[*NETS, "all"], help="all (two small ones) by default, digits with --quick")
    parser.add_argument("--batch", type=int, help="pairs per minibatch")
    parser.add_argument("--rounds", type=int, help="timings per arm; one more is not counted")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="fp32 on the CPU, bf16 on CUDA by default")
    parser.add_argument("--compile", choices=["off", "default", "max"], default="off", help="of student and reference")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two rounds of two pairs")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "bench_step.json", help="JSON file; the chart is next to it"
    )
    return parser


def main(argv: Sequence[str] | None = None, arms: Sequence[Arm] = ARMS) -> int:
    """Runs the benchmark; returns 1, and writes nothing, where the gate failed."""
    args = build_parser().parse_args(argv)
    quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    environment, nets = describe(device), {}
    for name in chosen(args.net, args.quick):
        batch, rounds = defaults(name, device, args.quick)
        settings = {"batch": args.batch or batch, "rounds": args.rounds or rounds, "precision": precision}
        settings["compile"] = args.compile
        nets[name] = run_net(NETS[name](), device=device, arms=arms, **settings)
        if "failures" in nets[name]:
            reasons = "\n  ".join(nets[name]["failures"])
            print(f"{name}: the correctness gate failed and nothing was timed:\n  {reasons}", file=sys.stderr)
            return 1
        print(table(name, nets[name], environment), flush=True)
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {"benchmark": "bench_step", "environment": environment, "arguments": arguments, "nets": nets}
    write_result(args.output, result, chart(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
