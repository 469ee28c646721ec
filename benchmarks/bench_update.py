"""Seconds of a whole training update, and what overlap, CUDA graphs and channels_last change.

    python -m benchmarks.bench_update                          # on a GPU: SD1.5 with batch 80
    python -m benchmarks.bench_update --arm plain --arm student_only --arm overlap
    python -m benchmarks.bench_update --tiny                   # the digits network, seconds on a CPU
    python -m benchmarks.bench_update -- --engine.compile default

The recipe is configs/sd15.yaml: bf16, ZeRO 1, 8-bit AdamW, gradient checkpointing, continuous
rollouts from noise, omega = -1. Weights are random and the trainer is the product's. Words after --
are options of `selfnpo train` for all arms.

Before anything is timed, the digits network gives the first losses of every arm in float32 on the
same device; an arm whose losses are not those of `plain` is not timed. An arm is a trainer of its
own, built and freed. The slots of the rollout are filled by the first arm and copied by the others,
outside of the timing. Updates until all steps are captured are not timed either. A round is
`--updates` updates from an idle device to an idle device.

The JSON is written after every round. For each arm it has
seconds_per_update        median, lowest and highest of the rounds
peak_bytes                most that PyTorch's tensors took after the slots were filled, captures
                          included
reserved_bytes            most that its allocator held: also what is free, but for one stream or for
                          graphs alone
computed_peak_bytes       what `selfnpo doctor` says. With overlap and graphs it holds the memory of the
                          reference's forward apart, as reserved_bytes does and peak_bytes does not
tflops                    the doctor's FLOPs of an update, recomputation included, by its seconds
share_of_peak             the same by --peak_tflops
left_bytes                what stays allocated when the arm has gone
error                     why the arm failed, in one line; the others are still timed
`hidden_share` says how much of the reference's forward overlap hides:
1 - (t_overlap - t_student_only) / (t_plain - t_student_only).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: Python has put this folder on the path, not its parent
    sys.path[0] = str(ROOT)

from selfnpo_fast.runtime.command import short_spin  # noqa: E402

os.environ.update(short_spin())  # before torch is imported

import torch  # noqa: E402

from benchmarks.arms.update import (  # noqa: E402
    ARMS,
    GATE_TOLERANCE,
    PLAIN,
    Arm,
    Bench,
    Setting,
    gate,
    gate_losses,
    hidden_shares,
)
from benchmarks.environment import RESULTS, describe, write_json  # noqa: E402
from benchmarks.random_run import FOLDERS, freed, world_of  # noqa: E402
from selfnpo_fast.runtime.console import quiet_libraries  # noqa: E402
from selfnpo_fast.runtime.errors import one_line  # noqa: E402
from selfnpo_fast.runtime.world import World  # noqa: E402

TINY = {"net": "digits", "batch": 4, "rounds": 2, "updates": 1, "pool": 2, "optimizer": "adamw"}
"""Sizes of --tiny."""
TINY_WORDS = ["--rollout.grid_steps", "5", "--prompts.limit", "64"]


def defaults(device: torch.device, tiny: bool) -> dict[str, object]:
    """Network, sizes and optimiser of a device: the recipe on a GPU, digits on a CPU."""
    if tiny:
        return TINY
    if device.type == "cpu":
        return TINY | {"batch": 16, "rounds": 5, "updates": 2}
    eight_bit = importlib.util.find_spec("bitsandbytes") is not None
    if not eight_bit:
        print("bench_update: bitsandbytes is not installed, so the optimiser is AdamW", file=sys.stderr)
    optimizer = "adamw8bit" if eight_bit else "adamw"
    return {"net": "sd15", "batch": 80, "rounds": 5, "updates": 2, "pool": 4, "optimizer": optimizer}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [arm.name for arm in ARMS]
    parser.add_argument("--arm", action="append", choices=names, help="may be repeated; all by default")
    parser.add_argument("--net", choices=list(FOLDERS), help="sd15 on CUDA, digits on the CPU by default")
    parser.add_argument("--batch", type=int, help="pairs per update: 80 on CUDA by default")
    parser.add_argument("--pool", type=int, help="slots per pair, 4 on CUDA by default: 1 fills and captures sooner")
    parser.add_argument("--rounds", type=int, help="timings per arm: 5 by default")
    parser.add_argument("--updates", type=int, help="updates per round: 2 by default")
    parser.add_argument("--precision", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--zero_stage", type=int, choices=range(4), default=1)
    parser.add_argument("--optimizer", choices=["adamw8bit", "adamw"], help="adamw8bit on CUDA by default")
    parser.add_argument("--peak_tflops", type=float, help="the card's peak in this precision, such as 989")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--tiny", "--quick", action="store_true", help="a smoke run of the digits network")
    parser.add_argument("--output", type=Path, default=RESULTS / "bench_update.json", help="JSON file")
    return parser


def run_gate(arms: Sequence[Arm], zero_stage: int, world: World) -> dict:
    """First losses of every arm against those of `plain`: a record of each arm, with its error."""
    records: dict[str, dict] = {}
    expected = None
    for arm in [arm for arm in ARMS if arm.name == PLAIN or (arm in arms and not arm.student_only)]:
        try:
            if unable(arm, world.device):
                continue
            losses = gate_losses(arm, zero_stage, world)
            expected = losses if arm.name == PLAIN else expected
            if expected is None:
                raise RuntimeError(f"{PLAIN} has no losses to compare with")
            records[arm.name] = gate(arm, expected, losses)
        except Exception as error:
            records[arm.name] = {"error": one_line(error, 300)}
        gc.collect()
    return {"net": "digits", "tolerance": GATE_TOLERANCE, "arms": records}


def unable(arm: Arm, device: torch.device) -> str | None:
    """Why a device cannot run an arm; None where it can."""
    return "CUDA graphs need a GPU" if arm.graphs and device.type != "cuda" else None


def run_arm(bench: Bench, arm: Arm, record: dict, peak_tflops: float | None, save) -> None:
    """Times one arm into `record`; an error is written there."""
    try:
        bench.time_arm(arm, record, save)
        record |= bench.derived(arm, record, peak_tflops)
    except Exception as error:
        record["error"] = one_line(error, 300)
    record["left_bytes"] = freed(bench.device)


def run(args: argparse.Namespace, words: Sequence[str], world: World) -> dict:
    """The whole benchmark; returns its result, which is also in the file `args.output`."""
    chosen = defaults(world.device, args.tiny) | {
        name: value
        for name in ("net", "batch", "rounds", "updates", "pool", "optimizer")
        if (value := getattr(args, name)) is not None
    }
    options = ["--engine.precision", args.precision, "--engine.zero_stage", str(args.zero_stage)]
    options += ["--engine.batch_size", str(chosen["batch"]), "--rollout.pool", str(chosen["pool"])]
    options += ["--optimizer.name", chosen["optimizer"], *(TINY_WORDS if chosen["net"] == "digits" else []), *words]
    setting = Setting(net=chosen["net"], words=tuple(options), rounds=chosen["rounds"], updates=chosen["updates"])
    arms = [arm for arm in ARMS if not args.arm or arm.name in args.arm]
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {"benchmark": "bench_update", "complete": False, "environment": describe(world.device)}
    result |= {"arguments": arguments | {"train": list(words)}, "setting": chosen | {"options": options}}

    def save() -> None:
        write_json(args.output, result)

    save()
    result["gate"] = run_gate(arms, args.zero_stage, world)
    save()
    bench, records = Bench(setting, world), result.setdefault("arms", {})
    for arm in arms:
        record = records[arm.name] = {"label": arm.label, "options": arm.words}
        reason = unable(arm, world.device)
        failed = result["gate"]["arms"].get(arm.name, {}).get("error")
        if reason:
            record["skipped"] = reason
        elif failed:
            record["error"] = f"the correctness gate: {failed}"
        else:
            run_arm(bench, arm, record, args.peak_tflops, save)
        print(line(arm, record), flush=True)
        result["hidden_share"] = hidden_shares(records)
        save()
    result["complete"] = True
    save()
    return result


def line(arm: Arm, record: dict) -> str:
    """One line of the printed table."""
    start = f"{arm.name:<15}"
    if "error" in record or "skipped" in record:
        return start + (f"failed: {record['error']}" if "error" in record else f"skipped: {record['skipped']}")
    seconds, gib = record["seconds_per_update"], 2**30
    parts = [f"{seconds['median']:.4g} s an update ({seconds['low']:.4g} to {seconds['high']:.4g})"]
    parts += [f"{record['pairs_per_second']:.4g} pairs/s", f"{record['tflops']:.4g} TFLOP/s"]
    if record["share_of_peak"]:
        parts.append(f"{record['share_of_peak']:.1%} of the peak")
    parts.append(f"{record['hours_per_1000_updates']:.3g} h per 1,000 updates")
    if record["peak_bytes"]:
        sizes = record["peak_bytes"], record["reserved_bytes"], record["computed_peak_bytes"]
        parts.append("GiB at the peak {:.2f}, reserved {:.2f}, computed {:.2f}".format(*(s / gib for s in sizes)))
    return start + "; ".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 where an arm failed."""
    all_words = list(sys.argv[1:] if argv is None else argv)
    cut = all_words.index("--") if "--" in all_words else len(all_words)
    args = build_parser().parse_args(all_words[:cut])
    world = world_of(args.device)
    quiet_libraries()
    result = run(args, all_words[cut + 1 :], world)
    for name, share in result["hidden_share"].items():
        print(f"{name}: {share:.1%} of the reference's forward hidden")
    print(args.output)
    records = [*result["arms"].values(), *result["gate"]["arms"].values()]
    return int(any("error" in record for record in records))


if __name__ == "__main__":
    raise SystemExit(main())
