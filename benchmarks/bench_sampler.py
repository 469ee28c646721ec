"""What a guided picture costs: stock diffusers, an attached negative, our sampler, two networks.

    python -m benchmarks.bench_sampler                  # all; about ten minutes on two CPU cores
    python -m benchmarks.bench_sampler --net digits --quick

Every round draws once with each arm, so that all arms see the machine in the same state, and
ratios are taken within a round. Only denoising is timed, from noise and text embeddings to latents:
text encoder and autoencoder are the same in all arms.

Before any timing the latents of every arm are compared with those of the stock pipeline, or with
those of two whole networks. If they differ, nothing is timed and the exit status is 1.

Memory is what the arm's networks hold, plus the most that one call allocates. `beyond` is the share
of a call that is spent outside of the networks' forwards. A cold start is a new process that
imports the libraries, loads the embedded digits pipeline and draws its first picture.
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
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: Python has put this folder on the path, not its parent
    sys.path[0] = str(ROOT)

from selfnpo_fast.runtime.command import short_spin  # noqa: E402

os.environ.update(short_spin())  # before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.arms.sampler import ARMS, STOCK, TWO, Arm, Bench, peak_bytes  # noqa: E402
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
from selfnpo_fast.runtime.console import quiet_libraries  # noqa: E402
from selfnpo_fast.runtime.dtypes import DTYPES  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
"""Largest difference between latents that should be equal, relative to their root mean square."""

SETUP_ROUNDS = 2
"""First rounds, which are not counted: they set things up and choose how branches run."""
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


def check(bench: Bench, arms: Sequence[Arm], tolerance: float) -> tuple[float, list[str]]:
    """The correctness gate: compares the latents of every arm with the right ones.

    Returns the largest error, relative to the latents' root mean square, and a line per failure.
    """
    # The right latents of plain guidance and of guidance against the negative.
    truths, largest, failures = {}, 0.0, []
    for name, truth in ((STOCK, "plain"), (TWO, "negative")):
        with ExitStack() as undo:
            truths[truth] = next(arm for arm in ARMS if arm.name == name).prepare(bench, undo)().float()
    if torch.allclose(truths["plain"], truths["negative"], rtol=0, atol=10 * tolerance):
        failures.append("the negative does not show in the latents: the gate could not tell the branches apart")
    for arm in arms:
        with ExitStack() as undo:
            latents = arm.prepare(bench, undo)().float()
        truth = truths[arm.truth]
        error = ((latents - truth).abs().max() / truth.square().mean().sqrt()).item()
        largest = max(largest, error)
        if not error <= tolerance:  # NaN fails, too
            failures.append(f"{arm.name}: latents differ by {error:.1e}, tolerance {tolerance:.0e}")
    return largest, failures


def run_net(net: BenchNet, *, batch: int, steps: int, rounds: int, precision: str, device: torch.device) -> dict:
    """Runs the gate, then times the arms on one network; returns its entry in the results.

    Where the gate fails, the entry has only "failures".
    """
    bench = Bench(net, batch=batch, steps=steps, device=device, dtype=DTYPES[precision])
    print(f"{net.name}: correctness gate", file=sys.stderr, flush=True)
    error, failures = check(bench, ARMS, TOLERANCE[precision])
    if failures:
        return {"failures": failures}
    memory = {arm.name: peak_of(bench, arm) for arm in ARMS}
    # Seconds per picture of each arm in each round, (rounds, arms).
    seconds, beyond = np.zeros((rounds + SETUP_ROUNDS, len(ARMS))), {}
    prepared: dict[str, Callable[[], torch.Tensor]] = {}
    with ExitStack() as undo_at_end:
        for number in range(rounds + SETUP_ROUNDS):
            print(f"{net.name}: round {number} of {rounds + 1}", file=sys.stderr, flush=True)
            for column, arm in enumerate(ARMS):
                with ExitStack() as undo_after_arm:
                    draw = _prepared(bench, arm, prepared, undo_after_arm, undo_at_end)
                    synchronize(device)
                    start = time.perf_counter()
                    draw()
                    synchronize(device)
                    seconds[number, column] = (time.perf_counter() - start) / batch
        for arm in ARMS:
            if arm.name.startswith("sampler"):
                draw = _prepared(bench, arm, prepared, undo_at_end, undo_at_end)
                beyond[arm.name] = spread([draw.beyond() for _ in range(rounds)])
    # One record per arm; ratios are taken within each round.
    seconds = seconds[SETUP_ROUNDS:]
    stock = [arm.name for arm in ARMS].index(STOCK)
    records = []
    for column, arm in enumerate(ARMS):
        record = {"name": arm.name, "label": arm.label, "networks": arm.networks}
        record |= {"seconds_per_image": spread(seconds[:, column]), "peak_bytes": memory[arm.name]}
        record |= {"ratio_to_stock": spread(seconds[:, column] / seconds[:, stock])}
        record |= {"memory_to_stock": memory[arm.name] / memory[STOCK], "beyond": beyond.get(arm.name)}
        records.append(record)
    return {
        "parameters": sum(p.numel() for p in bench.network.parameters()),
        "batch": batch, "steps": steps, "rounds": rounds, "precision": precision,
        "gate": {"largest_error": error, "tolerance": TOLERANCE[precision]}, "arms": records,
    }  # fmt: skip


def _prepared(
    bench: Bench,
    arm: Arm,
    prepared: dict[str, Callable[[], torch.Tensor]],
    undo_after_arm: ExitStack,
    undo_at_end: ExitStack,
) -> Callable[[], torch.Tensor]:
    """A function that draws one batch with the arm.

    An attached negative changes the network that the arms share, so it is attached for each use and
    removed by `undo_after_arm`. The other arms are prepared once and kept in `prepared`.
    """
    if arm.name.startswith("attach"):
        return arm.prepare(bench, undo_after_arm)
    if arm.name not in prepared:
        prepared[arm.name] = arm.prepare(bench, undo_at_end)
    return prepared[arm.name]


def peak_of(bench: Bench, arm: Arm) -> int:
    """Peak bytes of one arm; networks that only other arms use are not counted."""
    with ExitStack() as undo:
        draw = arm.prepare(bench, undo)
        draw()
        networks = [bench.network] + ([bench.full] if arm.networks == 2 else [])
        lora = sum(d.down.nbytes + d.up.nbytes for d in bench.deltas.values()) if "lora" in arm.name else 0
        # Attached layers hold the LoRA as buffers of the network, where it is counted already.
        return peak_bytes(draw, networks, lora if arm.name.startswith("sampler") else 0, bench.device)


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


def title(name: str, result: dict, environment: dict) -> str:
    """Network, settings and machine in one line."""
    size = f"{result['parameters'] / 1e6:.1f} M parameters, {result['steps']} steps, batch {result['batch']}"
    return f"{name} ({size}, {result['precision']}), {environment['device']}, {environment['threads']} CPU threads"


def table(name: str, result: dict, environment: dict) -> str:
    """The printed table of one network: medians, in brackets the smallest and the largest round."""

    def cell(value: dict | None, digits: str) -> str:
        if value is None:
            return "-"
        return f"{value['median']:{digits}} [{value['low']:{digits}}, {value['high']:{digits}}]"

    lines = [["arm", "networks", "seconds/image", "x stock", "peak MiB", "x stock", "beyond networks"]]
    for arm in result["arms"]:
        values = [arm["label"], str(arm["networks"]), cell(arm["seconds_per_image"], ".3g")]
        values += [cell(arm["ratio_to_stock"], ".3f"), f"{arm['peak_bytes'] / 2**20:.1f}"]
        lines.append([*values, f"{arm['memory_to_stock']:.3f}", cell(arm["beyond"], ".2%")])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    rows = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    gate = f"equal latents to {result['gate']['largest_error']:.1e} (tolerance {result['gate']['tolerance']:.0e})"
    return "\n".join([f"{title(name, result, environment)}; {gate}", *rows, ""])


def chart(result: dict) -> Figure:
    """Time per picture relative to the stock pipeline, one panel per network."""
    panels = {
        title(name, net, result["environment"]): {arm["label"]: arm["ratio_to_stock"] for arm in net["arms"]}
        for name, net in result["nets"].items()
    }
    return bar_chart(panels, "time per picture, stock pipeline = 1")


def defaults(name: str, device: torch.device, quick: bool) -> tuple[int, int, int]:
    """Batch, solver steps and rounds of a network."""
    if quick:
        return 1, 2, 2
    if device.type == "cuda":
        return 4, 20, 20
    return {"digits": (16, 10, 15), "sd15_small": (1, 4, 7)}.get(name, (1, 1, 3))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1, and writes nothing, where the gate failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=[*NETS, "all"], help="all (two small ones) by default, digits with --quick")
    parser.add_argument("--batch", type=int, help="pictures per call")
    parser.add_argument("--steps", type=int, help="solver steps (DDIM)")
    parser.add_argument("--rounds", type=int, help="timings per arm; two more are not counted")
    parser.add_argument("--cold", type=int, help="cold starts of each kind; 7 by default, 0 for none")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="fp32 on the CPU, bf16 on CUDA by default")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two rounds of one picture, no cold starts")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "bench_sampler.json", help="JSON file; the chart is next to it"
    )
    args = parser.parse_args(argv)
    quiet_libraries()
    device = pick_device(args.device)
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    environment, nets = describe(device), {}
    for name in chosen(args.net, args.quick):
        batch, steps, rounds = defaults(name, device, args.quick)
        settings = {"batch": args.batch or batch, "steps": args.steps or steps, "rounds": args.rounds or rounds}
        nets[name] = run_net(NETS[name](), precision=precision, device=device, **settings)
        if "failures" in nets[name]:
            reasons = "\n  ".join(nets[name]["failures"])
            print(f"{name}: the correctness gate failed and nothing was timed:\n  {reasons}", file=sys.stderr)
            return 1
        print(table(name, nets[name], environment), flush=True)
    rounds = args.cold if args.cold is not None else (0 if args.quick else 7)
    with tempfile.TemporaryDirectory() as work:
        cold = cold_starts(rounds, Path(work)) if rounds else {}
    for name, record in cold.items():
        print(f"cold start, {name}: {record['seconds']['median']:.2f} s, {record['ratio']['median']:.3f} x stock")
    result = {"benchmark": "bench_sampler", "environment": environment, "nets": nets, "cold_start": cold}
    write_result(args.output, result, chart(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
