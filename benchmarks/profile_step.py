"""Where the time of a training update goes: a Chrome trace and a table.

    python -m benchmarks.profile_step                                   # configs/digits.yaml
    python -m benchmarks.profile_step --updates 10 -- --config FILE --model.path FOLDER
    python -m benchmarks.profile_step --net sd15 -- --engine.batch_size 20    # no weights needed

Arguments after -- are those of `selfnpo train`. With --net, the recommended recipe
(configs/sd15.yaml) runs on a network of configs alone; its weights are random then, as they are for
any folder without weights.

Each part of an update (`runtime.profiling.region`) is timed without the parts inside it; `kernels`
are the fused operations in all parts. With `rollout.overlap` the rollout runs at the same time as
the other parts, so the parts add up to more than the update; `waiting` is the time in which the
update waits for the rollout. Times are those of the host. On a GPU the table also has those of the
device: every kernel and copy counts for the part in which it was launched, and `device busy` is the
time in which the device did anything. The trace opens in chrome://tracing or Perfetto; it is
compressed where it is large.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: Python has put this folder on the path, not its parent
    sys.path[0] = str(ROOT)

from selfnpo_fast.runtime.command import short_spin  # noqa: E402

os.environ.update(short_spin())  # before torch is imported

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benchmarks.environment import describe, synchronize, write_json  # noqa: E402
from benchmarks.profile_events import (  # noqa: E402
    PREFIX,
    WHOLE,
    DeviceTimes,
    read_backs,
    recorded,
    seconds_of,
)
from benchmarks.random_run import CALLS_TO_CAPTURE, FOLDERS, RECIPE, RandomRun, has_weights, world_of  # noqa: E402
from selfnpo_fast.doctor.report import make_tracer  # noqa: E402
from selfnpo_fast.runtime.console import quiet_libraries  # noqa: E402
from selfnpo_fast.runtime.world import World, init_world  # noqa: E402
from selfnpo_fast.train import parse  # noqa: E402
from selfnpo_fast.training.inputs import load_inputs  # noqa: E402
from selfnpo_fast.training.recorder import Recorder  # noqa: E402
from selfnpo_fast.training.trainer import Trainer  # noqa: E402

EVERY_THREAD = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
"""With overlap on a CPU the rollout runs in a second thread, which the profiler leaves out by
default."""
LARGE = 16 * 2**20
"""Bytes of a trace from which on it is compressed."""


def make_trainer(arguments: Sequence[str], output: Path, world: World | None = None) -> tuple[Trainer, Recorder, World]:
    """The run that `selfnpo train` sets up for these arguments; nothing is written to `output`.

    Where the model's folder has no weights, they are random.
    """
    config = parse([*arguments, "--output", str(output)]).config
    world = world or init_world()
    if not has_weights(config):
        print(f"{config.model.path} has no weights: they are random", file=sys.stderr)
        run = RandomRun(config, make_tracer(config), world, output)
        return run.trainer, run.recorder, world
    trainer = Trainer(config, load_inputs(config, world), world, output)
    return trainer, Recorder(config, world, trainer.adapter.schedule.num_train_timesteps), world


def profiled(trainer: Trainer, recorder: Recorder, world: World, updates: int, warm_up: int) -> profile:
    """Runs `warm_up` updates, then profiles `updates` more."""

    def update() -> None:
        trainer.train_update(recorder)
        recorder.discard()  # metrics that nothing reads

    cuda = world.device.type == "cuda"
    trainer.producer.rollout.fill()
    for _ in range(warm_up):
        update()
    synchronize(world.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, experimental_config=None if cuda else EVERY_THREAD) as result:
        for _ in range(updates):
            with torch.profiler.record_function(PREFIX + WHOLE):
                update()
        synchronize(world.device)
    return result


def write_trace(result: profile, output: Path) -> tuple[Path, list[dict]]:
    """Writes the Chrome trace next to `output`; returns its path and its events."""
    path = output.with_suffix(".trace.json")
    result.export_chrome_trace(str(path))
    # Names of kernels come from the device's libraries, as they are.
    events = json.loads(path.read_text(encoding="utf-8", errors="replace"), strict=False)["traceEvents"]
    if path.stat().st_size < LARGE:
        return path, events
    packed = path.with_suffix(".json.gz")
    with path.open("rb") as source, gzip.open(packed, "wb", compresslevel=4) as target:
        shutil.copyfileobj(source, target)
    path.unlink()
    return packed, events


def table(parts: dict[str, float], device: DeviceTimes | None = None) -> str:
    """The printed table: milliseconds of each part, and its share of the update."""
    lines = [f"{'part':<18}{'ms':>10}{'of the update':>16}" + (f"{'ms, device':>14}" if device else "")]
    for name, value in parts.items():
        row = f"{name:<18}{1e3 * value:>10.3f}{value / parts[WHOLE]:>15.1%} "
        lines.append((row + (f"{1e3 * device.seconds[name]:>14.3f}" if device else "")).rstrip())
    if device:
        lines.append(f"{'device busy':<18}{1e3 * device.busy:>10.3f}{device.busy / parts[WHOLE]:>15.1%}")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line, up to "--"."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=list(FOLDERS), help="the recommended recipe on this network")
    parser.add_argument("--updates", type=int, help="updates to profile: 2 on CUDA, else 20")
    parser.add_argument("--warm_up", type=int, help="updates before: until all graphs are captured, at least 3")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    default = ROOT / "build" / "benchmarks" / "profile_step.json"
    parser.add_argument("--output", type=Path, default=default, help="JSON; the trace is written next to it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    # Everything after "--" belongs to the training command.
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args, training = build_parser().parse_args(words[:cut]), words[cut + 1 :]
    if args.net:
        named = any(word.split("=")[0] == "--config" for word in training)
        training = [*([] if named else ["--config", str(RECIPE)]), *training, "--model.path", FOLDERS[args.net]]
    quiet_libraries()
    world = world_of(args.device)
    device = world.device
    content = {"benchmark": "profile_step", "complete": False, "environment": describe(device), "arguments": words}
    write_json(args.output, content)
    updates = args.updates or (2 if device.type == "cuda" else 20)
    with tempfile.TemporaryDirectory() as folder:
        trainer, recorder, _ = make_trainer(training, Path(folder) / "run", world)
        config = trainer.config
        groups = config.rollout.pool * config.engine.accumulation
        captures = CALLS_TO_CAPTURE * groups if config.engine.graphs and device.type == "cuda" else 0
        warm_up = max(3, captures) if args.warm_up is None else args.warm_up
        result = profiled(trainer, recorder, world, updates, warm_up)
        trainer.producer.close()
    # First what needs no trace: a run that is cut off while it writes one leaves that.
    on_host = recorded(result)
    parts, backs = seconds_of(on_host, updates), read_backs(on_host)
    content |= {"updates": updates, "warm_up": warm_up, "seconds_per_update": parts, "read_backs": backs}
    write_json(args.output, content)
    trace, events = write_trace(result, args.output)
    content["trace"] = trace.name
    on_device = DeviceTimes(events, updates) if device.type == "cuda" else None
    if on_device:
        content |= {"device_seconds_per_update": on_device.seconds, "device_busy_seconds_per_update": on_device.busy}
        content["device_seconds_without_launch"] = on_device.orphans
        content["longest_kernels"] = on_device.longest()
    print(table(parts, on_device))
    print(f"read-backs in {updates} updates: {backs or 'none'}")
    write_json(args.output, content | {"complete": True})
    print(f"{args.output}\n{trace}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
