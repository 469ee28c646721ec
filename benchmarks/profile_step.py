"""Where the time of a training update goes: a Chrome trace and a table.

    python -m benchmarks.profile_step                                   # configs/digits.yaml
    python -m benchmarks.profile_step --updates 10 -- --config FILE --model.path FOLDER

Arguments after -- are those of `selfnpo train`. Each part of an update (`runtime.profiling.region`)
is timed without the parts inside it; `kernels` are the fused operations in all parts. With
`rollout.overlap` the rollout runs at the same time as the other parts, so the parts add up to more
than the update; `waiting` is the time in which the update waits for the rollout. Times are those of
the host. The trace opens in chrome://tracing or Perfetto, and on a GPU it contains the device's
times as well.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: Python has put this folder on the path, not its parent
    sys.path[0] = str(ROOT)

from selfnpo_fast.runtime.command import short_spin  # noqa: E402

os.environ.update(short_spin())  # before torch is imported

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benchmarks.environment import describe  # noqa: E402
from selfnpo_fast.runtime.console import quiet_libraries  # noqa: E402
from selfnpo_fast.runtime.world import World, init_world  # noqa: E402
from selfnpo_fast.train import parse  # noqa: E402
from selfnpo_fast.training.inputs import load_inputs  # noqa: E402
from selfnpo_fast.training.recorder import Recorder  # noqa: E402
from selfnpo_fast.training.trainer import Trainer  # noqa: E402

PREFIX, WHOLE = "selfnpo_fast: ", "update"
PARTS = ("reference", "kernels", "student forward", "backward", "optimiser", "EMA", "waiting")
EVERY_THREAD = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
"""With overlap the rollout runs in a second thread, which the profiler leaves out by default."""
READ_BACKS = ("aten::_local_scalar_dense", "aten::item", "cudaStreamSynchronize", "cudaDeviceSynchronize")
"""Profiler events in which the host waits for a value of a tensor, or for the device."""


def make_trainer(arguments: Sequence[str], output: Path) -> tuple[Trainer, Recorder, World]:
    """The run that `selfnpo train` sets up for these arguments; nothing is written to `output`."""
    request = parse([*arguments, "--output", str(output)])
    world = init_world()
    trainer = Trainer(request.config, load_inputs(request.config, world), world, output)
    return trainer, Recorder(request.config, world, trainer.adapter.schedule.num_train_timesteps), world


def profiled(trainer: Trainer, recorder: Recorder, world: World, updates: int, warm_up: int) -> profile:
    """Runs `warm_up` updates, then profiles `updates` more."""

    def update() -> None:
        trainer.train_update(recorder)
        recorder.discard()  # metrics that nothing reads

    trainer.producer.rollout.fill()
    for _ in range(warm_up):
        update()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if world.device.type == "cuda" else [])]
    with profile(activities=activities, experimental_config=EVERY_THREAD) as result:
        for _ in range(updates):
            with torch.profiler.record_function(PREFIX + WHOLE):
                update()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
    return result


def seconds_of(result: profile, updates: int) -> dict[str, float]:
    """Host seconds per update of each part, each without the parts inside it.

    "everything else" is the time of an update outside of all parts, "update" its whole time.
    """
    # All ranges of a thread, as (start, end, name) in microseconds.
    spans = defaultdict(list)
    for event in result.events():
        if event.name.startswith((PREFIX, "selfnpo::")):
            name = event.name.removeprefix(PREFIX) if event.name.startswith(PREFIX) else "kernels"
            spans[event.thread].append((event.time_range.start, event.time_range.end, name))
    exclusive: dict[str, float] = defaultdict(float)
    for thread in spans.values():
        # The ranges of a thread are nested: each one's time is taken off the innermost open range.
        open_spans: list[tuple[float, str]] = []
        for start, end, name in sorted(thread, key=lambda span: (span[0], -span[1])):
            while open_spans and open_spans[-1][0] <= start:
                open_spans.pop()
            if open_spans:
                exclusive[open_spans[-1][1]] -= end - start
            exclusive[name] += end - start
            open_spans.append((end, name))
    total = sum(end - start for thread in spans.values() for start, end, name in thread if name == WHOLE)
    parts = {name: exclusive[name] for name in PARTS} | {"everything else": exclusive[WHOLE], WHOLE: total}
    return {name: microseconds / 1e6 / updates for name, microseconds in parts.items()}


def read_backs(result: profile) -> dict[str, int]:
    """Number of READ_BACKS events by name.

    Those inside torch's fused AdamW are left out: its CPU kernel reads the step count of every
    parameter. The counts come from the profiler's raw records, because it would need gigabytes to
    turn the records of a hundred updates into event objects.
    """
    read_back_events, adamw_spans = [], defaultdict(list)
    for event in result.profiler.kineto_results.events():
        if event.name() in READ_BACKS:
            read_back_events.append(event)
        elif event.name() == "aten::_fused_adamw_":
            adamw_spans[event.start_thread_id()].append((event.start_ns(), event.end_ns()))
    counts = Counter(
        event.name()
        for event in read_back_events
        if not any(start <= event.start_ns() <= end for start, end in adamw_spans[event.start_thread_id()])
    )
    return dict(counts)


def table(parts: dict[str, float]) -> str:
    """The printed table: milliseconds of each part, and its share of the update."""
    lines = [f"{'part':<18}{'ms':>10}{'of the update':>16}"]
    lines += [f"{name:<18}{1e3 * value:>10.3f}{value / parts[WHOLE]:>15.1%}" for name, value in parts.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20, help="number of updates to profile")
    parser.add_argument("--warm_up", type=int, default=3, help="number of updates before the profile")
    default = ROOT / "build" / "benchmarks" / "profile_step.json"
    parser.add_argument("--output", type=Path, default=default, help="JSON; the trace is written next to it")
    # Everything after "--" belongs to the training command.
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        trainer, recorder, world = make_trainer(words[cut + 1 :], Path(folder) / "run")
        result = profiled(trainer, recorder, world, args.updates, args.warm_up)
        trainer.producer.close()
    parts, backs = seconds_of(result, args.updates), read_backs(result)
    print(table(parts))
    print(f"read-backs in {args.updates} updates: {backs or 'none'}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    trace = args.output.with_suffix(".trace.json")
    result.export_chrome_trace(str(trace))
    content = {"benchmark": "profile_step", "environment": describe(world.device), "arguments": words}
    content |= {"seconds_per_update": parts, "read_backs": backs}
    args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{args.output}\n{trace}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
