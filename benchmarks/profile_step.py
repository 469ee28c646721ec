"""Where the time of an update goes: a Chrome trace and a table.

    python -m benchmarks.profile_step                                        # configs/digits.yaml
    python -m benchmarks.profile_step --updates 10 -- --config configs/sd15_fast.yaml --model.path FOLDER

Words after -- are those of `selfnpo train`. The run's own parts are timed (`region`), each without those inside
it; `kernels` are the fused ops wherever they run. With `rollout.overlap` the rollout runs beside the rest, so the parts
add up to more than the update, and `waiting` is what the update waits for it. Times are the host's; on
a GPU the trace holds the device's as well. It opens in chrome://tracing or Perfetto.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: Python put this folder on the path, not the one above
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benchmarks.environment import describe  # noqa: E402
from selfnpo_fast.runtime.console import quiet_libraries  # noqa: E402
from selfnpo_fast.runtime.world import World, init_world  # noqa: E402
from selfnpo_fast.train import parse  # noqa: E402
from selfnpo_fast.training.recorder import Recorder  # noqa: E402
from selfnpo_fast.training.trainer import Trainer, load_inputs  # noqa: E402

PREFIX, WHOLE = "selfnpo_fast: ", "update"
PARTS = ("reference", "kernels", "student forward", "backward", "optimiser", "EMA", "waiting")
EVERY_THREAD = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
"""With overlap the rollout has a thread of its own, which the profiler would leave out."""
READ_BACKS = ("aten::_local_scalar_dense", "aten::item", "cudaStreamSynchronize", "cudaDeviceSynchronize")


def make_trainer(words: Sequence[str], output: Path) -> tuple[Trainer, Recorder, World]:
    """A run as `selfnpo train` would set it up, which writes nothing."""
    request = parse([*words, "--output", str(output)])
    world = init_world()
    trainer = Trainer(request.config, load_inputs(request.config, world), world, output)
    return trainer, Recorder(request.config, world, trainer.adapter.schedule.num_train_timesteps), world


def profiled(trainer: Trainer, recorder: Recorder, world: World, updates: int, warm_up: int) -> profile:
    """The profile of `updates` updates after `warm_up` others."""

    def update() -> None:
        trainer.train_update(recorder)
        recorder.pending = 0  # sums nobody reads

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
    """Host seconds per update of each part, without the parts inside it."""
    spans = defaultdict(list)
    for event in result.events():
        if event.name.startswith((PREFIX, "selfnpo::")):
            name = event.name.removeprefix(PREFIX) if event.name.startswith(PREFIX) else "kernels"
            spans[event.thread].append((event.time_range.start, event.time_range.end, name))
    own: dict[str, float] = defaultdict(float)
    for thread in spans.values():
        open_spans: list[tuple[float, str]] = []
        for start, end, name in sorted(thread, key=lambda span: (span[0], -span[1])):
            while open_spans and open_spans[-1][0] <= start:
                open_spans.pop()
            if open_spans:
                own[open_spans[-1][1]] -= end - start
            own[name] += end - start
            open_spans.append((end, name))
    total = sum(end - start for thread in spans.values() for start, end, name in thread if name == WHOLE)
    parts = {name: own[name] for name in PARTS} | {"everything else": own[WHOLE], WHOLE: total}
    return {name: microseconds / 1e6 / updates for name, microseconds in parts.items()}


def read_backs(result: profile) -> dict[str, int]:
    """How often the host has asked a device, or a tensor, for a value.

    Without what torch's fused AdamW does on a CPU, whose kernel reads the step count of every parameter. (From the
    profiler's raw records: it would take gigabytes to make those of a hundred updates into its own events.)
    """
    asked, inside = [], defaultdict(list)
    for event in result.profiler.kineto_results.events():
        if event.name() in READ_BACKS:
            asked.append(event)
        elif event.name() == "aten::_fused_adamw_":
            inside[event.start_thread_id()].append((event.start_ns(), event.end_ns()))
    counts = Counter(
        event.name()
        for event in asked
        if not any(start <= event.start_ns() <= end for start, end in inside[event.start_thread_id()])
    )
    return dict(counts)


def table(parts: dict[str, float]) -> str:
    """One line a part: milliseconds and share of the update."""
    lines = [f"{'part':<18}{'ms':>10}{'of the update':>16}"]
    lines += [f"{name:<18}{1e3 * value:>10.3f}{value / parts[WHOLE]:>15.1%}" for name, value in parts.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20, help="updates that are profiled")
    parser.add_argument("--warm_up", type=int, default=3, help="updates before them")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "benchmarks" / "profile_step.json")
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
