"""What a guided picture costs: stock diffusers, an attached negative, our sampler, two networks.

    python -m benchmarks.bench_sampler                  # all; about ten minutes on two CPU cores
    python -m benchmarks.bench_sampler --net digits --quick
    python -m benchmarks.bench_sampler --net sdxl --batch 1 --batch 4 --arm stock --arm sampler_graphs

Every round draws once with each arm, so that all arms see the machine in the same state, and
ratios are taken within a round. Only denoising is timed, from noise and text embeddings to latents:
text encoder and autoencoder are the same in all arms.

Before any timing the latents of every arm are compared in float32 with those of the stock pipeline,
or with those of two whole networks (sampler_gate.py). An arm that differs or fails is not timed:
its record says why, the others go on, and the exit status is 1. Timings are in bf16 on CUDA.

Each arm is called until nothing happens for the first time any more: kernels are compiled, the
sampler has chosen how branches run, CUDA graphs are captured. `warm_up_calls` counts these calls.
An attached negative is attached anew for each timed call, outside of the timing.

Memory is what the arm's networks hold, plus the most that a call allocates; on CUDA also what the
allocator reserves for that. `beyond` is the share of a call that is spent outside of the networks'
forwards; a captured step has no outside. A cold start is a new process that imports the libraries,
loads the embedded digits pipeline and draws its first picture on the CPU.

The JSON is written after each arm's warm-up and after each round; `complete` is false until the
end.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: Python has put this folder on the path, not its parent
    sys.path[0] = str(ROOT)

from selfnpo_fast.runtime.command import short_spin  # noqa: E402

os.environ.update(short_spin())  # before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.arms.sampler import ARMS, Arm, Bench, Draw, Drawing, Peak  # noqa: E402
from benchmarks.environment import (  # noqa: E402
    RESULTS,
    describe,
    pick_device,
    spread,
    synchronize,
    write_json,
    write_result,
)
from benchmarks.nets import NETS, UNETS, BenchNet, chosen  # noqa: E402
from benchmarks.sampler_gate import TRUTHS, Gate, free, gate, settle  # noqa: E402
from benchmarks.sampler_report import chart, new_record, summarise, table  # noqa: E402
from selfnpo_fast.runtime.console import quiet_libraries  # noqa: E402
from selfnpo_fast.runtime.dtypes import DTYPES  # noqa: E402
from selfnpo_fast.runtime.errors import one_line  # noqa: E402

Save = Callable[[dict], None]
"""Takes a network's entry in the results, as far as it is known."""

BEYOND_CALLS = 3
"""Calls of each sampler in which the share outside of the networks is measured."""
_CALL_ARGUMENTS = {"num_inference_steps": 2, "guidance_scale": 3.0}
COLD_STARTS = {
    "stock diffusers": """
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({folder!r})
pipe("a red handwritten seven", **{draw!r})
""",
    "attach_negative": """
from diffusers import StableDiffusionPipeline
from selfnpo_fast import attach_negative
pipe = StableDiffusionPipeline.from_pretrained({folder!r})
attach_negative(pipe, {negative!r})
pipe("a red handwritten seven", **{draw!r})
""",
    "GuidedSampler": """
from diffusers import StableDiffusionPipeline
from selfnpo_fast import GuidedSampler
sampler = GuidedSampler.from_pipeline(StableDiffusionPipeline.from_pretrained({folder!r}), {negative!r})
sampler("a red handwritten seven", steps=2, guidance_scale=3.0)
""",
}


class Measurement:
    """The timing of arms on one network. Fills `entry`, which is the network's in the results."""

    def __init__(self, net: BenchNet, arms: Sequence[Arm], found: Gate, *, save: Save, **settings) -> None:
        """`found` says which arms may be timed; `settings` are batch, steps, rounds and precision."""
        self.net, self.arms, self.device, self.settings, self.save = net, arms, found.device, settings, save
        self.records = {arm.name: new_record(arm) for arm in arms}
        self.entry = settings | {"latent_shape": net.latent_shape, "gate": found.record()}
        self.entry["arms"] = list(self.records.values())
        for name, reason in found.failures.items():
            self.records[name]["error"] = f"the correctness gate failed: {reason}"
        self.drawn: dict[str, torch.Tensor] = {}  # latents by arm
        self.prepared: dict[str, Draw] = {}

    def run(self) -> dict:
        """The warm-up, the rounds and the share beyond the networks. Returns `entry`."""
        self.save(self.entry)
        settings = {"batch": self.settings["batch"], "steps": self.settings["steps"]}
        self.bench = Bench(self.net, device=self.device, dtype=DTYPES[self.settings["precision"]], **settings)
        self.entry["parameters"] = sum(p.numel() for p in self.bench.network.parameters())
        with ExitStack() as undo:
            self._each(lambda arm: self._warm_up(arm, undo), "warm-up")
            self._compare()
            for number in range(1, self.settings["rounds"] + 1):
                self._each(self._time, f"round {number} of {self.settings['rounds']}", save=False)
                summarise(self.records)
                self.save(self.entry)
            self._each(self._measure_beyond, "share beyond the networks")
        return self.entry

    def _each(self, do: Callable[[Arm], None], what: str, save: bool = True) -> None:
        """Calls `do` with every arm that has not failed; an error is noted in the arm's record."""
        print(f"{self.net.name}: {what}", file=sys.stderr, flush=True)
        for arm in self.arms:
            if "error" in self.records[arm.name]:
                continue
            try:
                do(arm)
            except Exception as error:
                self.records[arm.name]["error"] = f"{what}: {one_line(error)}"
                print(f"{self.net.name}, {arm.name}: {one_line(error)}", file=sys.stderr, flush=True)
            if save:
                self.save(self.entry)

    def _prepare(self, arm: Arm, after_use: ExitStack, at_end: ExitStack | None = None) -> Draw:
        """A function that draws one batch: new after each use for an arm that attaches, else one."""
        if arm.attaches:
            return arm.prepare(self.bench, after_use)
        if arm.name not in self.prepared:
            self.prepared[arm.name] = arm.prepare(self.bench, at_end)
        return self.prepared[arm.name]

    def _warm_up(self, arm: Arm, at_end: ExitStack) -> None:
        """Everything that happens once, the memory that it takes, and whether it draws numbers."""
        peak = Peak(self.bench, arm)
        with ExitStack() as after_use:
            draw = self._prepare(arm, after_use, at_end)
            drawn = settle(self.bench, arm, draw)
            if not drawn[-1].isfinite().all():
                raise ValueError("its latents are not finite")
            self.drawn[arm.name] = drawn[-1]
            self.records[arm.name] |= {"warm_up_calls": len(drawn)} | peak.read(draw)

    def _compare(self) -> None:
        """How far the timed precision takes latents from the right ones, as a root mean square.

        No gate: two right ways to sum differ as much in bf16.
        """
        for arm in self.arms:
            right, found = self.drawn.get(TRUTHS[arm.truth]), self.drawn.get(arm.name)
            if right is not None and found is not None:
                apart = ((found - right).square().mean() / right.square().mean()).sqrt().item()
                self.records[arm.name]["apart_from_truth"] = apart
        self.drawn.clear()

    def _time(self, arm: Arm) -> None:
        """The seconds per picture of one call."""
        with ExitStack() as after_use:
            draw = self._prepare(arm, after_use)
            synchronize(self.device)
            start = time.perf_counter()
            draw()
            synchronize(self.device)
            seconds = (time.perf_counter() - start) / self.settings["batch"]
        if arm.graphs and not draw.captures:
            raise RuntimeError("its steps are no longer captured")
        self.records[arm.name].setdefault("rounds_seconds_per_image", []).append(seconds)

    def _measure_beyond(self, arm: Arm) -> None:
        """The share of a sampler's call outside of the networks, where steps are not captured."""
        draw = self.prepared.get(arm.name)
        if isinstance(draw, Drawing) and not arm.graphs:
            self.records[arm.name]["beyond"] = spread([draw.beyond() for _ in range(BEYOND_CALLS)])


def cold_starts(rounds: int, work: Path) -> dict[str, dict]:
    """Seconds of a new process for each kind of cold start, and the ratio to stock diffusers.

    Every round starts each kind once. Files are written to the folder `work`.
    """
    from selfnpo_fast.models import load_adapter, resolve_path

    folder, negative = resolve_path("digits"), work / "negative"
    # A negative that differs from the embedded model.
    network = load_adapter("digits").load_denoiser(torch.float32)
    with torch.no_grad():
        network.conv_out.weight.mul_(0.9)
    network.save_pretrained(negative / "unet")
    values = {"folder": folder, "negative": str(negative), "draw": _CALL_ARGUMENTS}
    seconds: dict[str, list[float]] = {name: [] for name in COLD_STARTS}
    for number in range(rounds + 1):  # the first round fills the disk's cache and is not counted
        for name, script in COLD_STARTS.items():
            start = time.perf_counter()
            command = [sys.executable, "-c", script.format(**values)]
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if number:
                seconds[name].append(time.perf_counter() - start)
    stock = np.array(seconds["stock diffusers"])
    return {name: {"seconds": spread(v), "ratio": spread(np.array(v) / stock)} for name, v in seconds.items()}


def defaults(name: str, device: torch.device, quick: bool) -> tuple[int, int, int]:
    """Batch, solver steps and rounds of a network."""
    if quick:
        return 1, 2, 2
    if device.type == "cuda":
        return 4, 20, {"sd15": 10, "sdxl": 5}.get(name, 20)
    return {"digits": (16, 10, 15), "sd15_small": (1, 4, 7)}.get(name, (1, 1, 3))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(arm.name for arm in ARMS)
    parser.add_argument("--net", choices=[*UNETS, "all"], help="all (two small ones) by default, digits with --quick")
    parser.add_argument("--arm", action="append", metavar="NAME", help=f"repeatable; all by default: {names}")
    parser.add_argument("--batch", type=int, action="append", help="pictures per call; repeatable")
    parser.add_argument("--steps", type=int, help="solver steps (DDIM)")
    parser.add_argument("--rounds", type=int, help="timings per arm, after the calls that warm up")
    parser.add_argument("--cold", type=int, help="cold starts of each kind; 7 by default, none on CUDA; 0 for none")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="fp32 on the CPU, bf16 on CUDA by default")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two rounds of one picture, no cold starts")
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file; the chart is next to it. benchmarks/results/bench_sampler.json by default, none with --quick",
    )
    return parser


def chosen_arms(names: Sequence[str] | None, device: torch.device, arms: Sequence[Arm]) -> list[Arm]:
    """The arms of these names, or all, that the device can run; says which it cannot.

    Raises ValueError for a name that there is not, and where no arm is left.
    """
    known = {arm.name: arm for arm in arms}
    for name in names or ():
        if name not in known:
            raise ValueError(f"--arm: there is no {name}; expected one of {', '.join(known)}")
    picked = [arm for arm in arms if not names or arm.name in names]
    left_out = [arm.name for arm in picked if arm.graphs and device.type != "cuda"]
    if left_out:
        print(f"left out, since a {device.type} has no CUDA graphs: {', '.join(left_out)}", file=sys.stderr)
    picked = [arm for arm in picked if arm.name not in left_out]
    if not picked:
        raise ValueError("--arm: no arm is left to run")
    return picked


def run_nets(args: argparse.Namespace, arms: Sequence[Arm], device: torch.device, result: dict, save: Callable) -> bool:
    """Fills result["nets"] network by network and prints their tables; whether all has succeeded."""
    precision, good = args.precision or ("bf16" if device.type == "cuda" else "fp32"), True
    for name in chosen(args.net, args.quick):
        usual, steps, rounds = defaults(name, device, args.quick)
        settings = {"steps": args.steps or steps, "rounds": args.rounds or rounds, "precision": precision}
        found = None
        for batch in args.batch or [usual]:
            key = f"{name}, batch {batch}" if len(args.batch or ()) > 1 else name

            def keep(entry: dict, key: str = key) -> None:
                result["nets"][key] = entry
                save()

            try:
                net = NETS[name]()
                found = found or gate(net, arms, device)
                entry = Measurement(net, arms, found, save=keep, batch=batch, **settings).run()
                print(table(name, entry, result["environment"]), flush=True)
                good &= not any("error" in arm for arm in entry["arms"])
            except Exception as error:
                keep(result["nets"].get(key, {"batch": batch} | settings) | {"error": one_line(error)})
                print(f"{key}: {one_line(error)}", file=sys.stderr, flush=True)
                good = False
            free(device)
    return good


def run_cold_starts(rounds: int, result: dict) -> bool:
    """Fills result["cold_start"] and prints it; whether it has succeeded."""
    try:
        with tempfile.TemporaryDirectory() as work:
            result["cold_start"] = cold_starts(rounds, Path(work)) if rounds else {}
    except Exception as error:
        result["cold_start"] = {"error": one_line(error)}
        print(f"cold start: {one_line(error)}", file=sys.stderr, flush=True)
        return False
    for name, record in result["cold_start"].items():
        print(f"cold start, {name}: {record['seconds']['median']:.2f} s, {record['ratio']['median']:.3f} x stock")
    return True


def main(argv: Sequence[str] | None = None, arms: Sequence[Arm] = ARMS) -> int:
    """Runs the benchmark; returns 1 where an arm has failed, which the results then say."""
    parser = build_parser()
    args = parser.parse_args(argv)
    quiet_libraries()
    device = pick_device(args.device)
    try:
        arms = chosen_arms(args.arm, device, arms)
    except ValueError as error:
        parser.error(str(error))
    output = args.output or (None if args.quick else RESULTS / "bench_sampler.json")
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {"benchmark": "bench_sampler", "complete": False, "arguments": arguments}
    result |= {"environment": describe(device), "nets": {}, "cold_start": {}}

    def save() -> None:
        if output is not None:
            write_json(output, result)

    good = run_nets(args, arms, device, result, save)
    cold = 0 if args.quick or device.type == "cuda" else 7
    good &= run_cold_starts(cold if args.cold is None else args.cold, result)
    result["complete"] = True
    figure = chart(result) if output is not None else None
    if figure is not None:
        write_result(output, result, figure)
    save()
    return int(not good)


if __name__ == "__main__":
    raise SystemExit(main())
