"""Seconds of training until a negative brings a given gain, on digits, for several recipes.

    python -m benchmarks.digits_report.time_to_gain train     # negatives, and their scores
    python -m benchmarks.digits_report.time_to_gain time      # seconds per update, when idle
    python -m benchmarks.digits_report.time_to_gain report    # results/time_to_gain.json and .png

A recipe is trained with three seeds, and its checkpoints draw 560 pictures at two guidance scales.
The gain is the best mean realness at an accuracy of 95%, less plain guidance's best on the same
prompts and noise. Seconds are updates times the seconds of one update (every schedule of
`bench_step`, in one run, taking turns), plus the seconds that fill a continuous rollout's slots, a
quarter of them in each of the first four updates. So a schedule that makes the same pairs with more
forwards shares the gains of the cheaper one, and noise of the machine during training counts for
nobody. All stages go on where they stopped; two `train` processes can take half of the recipes
each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from selfnpo_fast.runtime.command import short_spin

os.environ.update(short_spin())  # before torch is imported

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.arms.step import ARMS, CONTINUOUS, Workbench
from benchmarks.digits_report.painter import BASE, Painter
from benchmarks.digits_report.recipes import RECIPES, START, TRAINING_SEEDS, selfnpo_train, slug
from benchmarks.environment import RESULTS, describe, spread
from benchmarks.nets import digits
from selfnpo_fast.config import RolloutConfig
from selfnpo_fast.rollout import ContinuousRollout
from selfnpo_fast.runtime.console import quiet_libraries
from selfnpo_fast.scoring.digits.measures import ROLES, digits_measures
from selfnpo_fast.scoring.digits.scorer import FittedScorer

WORK = Path("build/time_to_gain")
"""Folder of negatives, pictures and scores."""
PICTURES_SEED = 5
"""Seed of prompt order and noise: neither CHOICE_SEED nor CONFIRMATION_SEED of the report."""
SCALES = (2.0, 3.0)
"""Guidance scales of the negatives."""
BASE_SCALES = (2.0, 2.5, 3.0, 4.0)
"""Guidance scales of plain guidance."""
CONTROL_UPDATE = 3
"""The update after which the control takes its negatives."""
LEAST_ACCURACY = 0.95
"""Accuracy from which on a scale counts."""
TARGETS = (0.01, 0.02, 0.03, 0.04)
"""Gains in mean realness to which the seconds are counted."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
"""File name of a network's weights in diffusers format."""
BATCH = int(START["engine.batch_size"])
"""Pairs per update."""
POOL = RolloutConfig().pool
"""Batches of slots of a continuous rollout."""


@dataclass(frozen=True)
class Course:
    """A recipe, when its negative is judged, and the schedules that make the same pairs."""

    recipe: str
    """Name of one of RECIPES."""
    updates: Sequence[int]
    """Updates at which the negative is judged."""
    schedules: Mapping[str, str]
    """By label in the report, the name of one of ARMS."""
    changes: Mapping[str, object] = field(default_factory=dict)
    """Options that differ from the recipe's."""


COURSES = {
    "continuous": Course("continuous", (1, 3, 6, 9, 15, 30, 60, 120, 240), {"continuous rollouts (ours)": CONTINUOUS}),
    "overlap": Course("continuous", (60, 240), {}, {"rollout.overlap": True}),
    "authors": Course(
        "authors",
        (1, 5, 10, 15, 30, 60, 120, 240),
        {
            "authors' recipe, their schedule": "released",
            "authors' recipe, no dead branches": "released_live",
            "authors' recipe, our lockstep mode": "lockstep",
        },
    ),
    "full": Course(
        "full",
        (1, 2, 5, 10, 20),
        {"full simulation, calls as released": "full", "full simulation, no dead branches": "full_live"},
    ),
}


def train_course(name: str, seed: int, work: Path) -> dict[int, Path]:
    """By update, the folders of a run's negative models; trains the run where one is missing."""
    course, output = COURSES[name], work / slug(name) / f"seed{seed}"
    folders = {update: output / f"negative-{update}" for update in course.updates}
    missing = [update for update in course.updates if not folders[update].is_dir()]
    if not missing:
        return folders
    options = START | dict(RECIPES[course.recipe].changes) | course.changes
    if options["rollout.start"] == "data":
        del options["prompts.source"]
    options |= {"output": output / "run", "seed": seed, "updates": max(missing)}
    options |= {
        "log.sample_every": -1,
        "log.every": 20,
        "log.checkpoint_every": int(np.gcd.reduce(missing)),
        "log.keep": 1000,
    }
    selfnpo_train(output / "run", options)
    network = digits().network()
    for update in missing:
        folder = folders[update]
        checkpoint = output / "run" / "checkpoints" / f"update-{update:07d}"
        network.load_state_dict(load_file(checkpoint / "student.safetensors"))
        network.save_pretrained(folder.with_suffix(".tmp") / "unet")
        folder.with_suffix(".tmp").rename(folder)
    shutil.rmtree(output / "run")
    return folders


class Judge:
    """Scores arms on the same prompts and noise; keeps the scores of course `name` in `work`."""

    def __init__(self, work: Path, name: str) -> None:
        self.store = work / f"scores-{slug(name)}.json"
        self.scores: dict[str, dict[str, float]] = json.loads(self.store.read_text()) if self.store.exists() else {}
        self.painter, self.measures = Painter(work, 1, PICTURES_SEED), digits_measures(FittedScorer.load())

    def best(self, arm: str, negative: Path | None, scales: Sequence[float]) -> float:
        """The highest mean realness of 560 pictures among the accurate scales; 0 without any."""
        found = [self._score(arm, negative, scale) for scale in scales]
        return max((score["realness"] for score in found if score["accuracy"] >= LEAST_ACCURACY), default=0.0)

    def _score(self, arm: str, negative: Path | None, scale: float) -> dict[str, float]:
        key = f"{arm} at {scale:g}"
        if key not in self.scores:
            if negative is not None:
                self.painter.add(arm, [negative], "empty")
            images = self.painter.all_of(arm, scale)
            scores = self.measures.score(images, [case.prompt for case in self.painter.cases])
            realness, accuracy = scores["realness"].mean(), scores[ROLES.accuracy].float().mean()
            self.scores[key] = {"realness": float(realness), "accuracy": float(accuracy)}
            self.store.write_text(json.dumps(self.scores, indent=1))
            self.painter.cache.clear()
        return self.scores[key]


def train(names: Sequence[str], work: Path) -> None:
    """Trains and judges courses; what is there already is not made again."""
    for name in names:
        judge = Judge(work, name)
        gains: dict[str, dict[int, float]] = {}
        base = judge.best(BASE, None, BASE_SCALES)
        for seed in TRAINING_SEEDS:
            course = train_course(name, seed, work)
            gains[str(seed)] = {
                update: judge.best(f"{name} {seed} {update}", folder, SCALES) - base
                for update, folder in course.items()
            }
            print(name, seed, {update: round(gain, 4) for update, gain in gains[str(seed)].items()}, flush=True)
        (work / f"gains-{slug(name)}.json").write_text(json.dumps({"base": base, "gains": gains}, indent=1))


def random_signs(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """-1 or 1, int64, with equal chance."""
    return torch.randint(2, shape, generator=generator) * 2 - 1


def control(work: Path) -> None:
    """Judges what the direction of training is worth, by negatives that moved to random sides.

    Each weight moves as far from the base as the first CONTROL_UPDATE updates moved it, with a
    random sign.
    """
    judge = Judge(work, "control")
    base = judge.best(BASE, None, BASE_SCALES)
    base_weights, gains = digits().network().state_dict(), {}
    for seed in TRAINING_SEEDS:
        folder = work / "control" / f"seed{seed}"
        trained = load_file(train_course("continuous", seed, work)[CONTROL_UPDATE] / "unet" / WEIGHTS)
        generator, network = torch.Generator().manual_seed(seed), digits().network()
        flipped = {
            name: base_weights[name] + (value - base_weights[name]) * random_signs(value.shape, generator)
            for name, value in trained.items()
        }
        network.load_state_dict(flipped)
        network.save_pretrained(folder / "unet")
        gains[str(seed)] = judge.best(f"control {seed}", folder, SCALES) - base
    print("control", gains, flush=True)
    (work / "control.json").write_text(json.dumps({"update": CONTROL_UPDATE, "gains": gains}, indent=1))


def time_arms(rounds: int) -> dict[str, object]:
    """Seconds of an update by schedule, of the optimiser and EMA, and of filling slots.

    A schedule's seconds are those of one update's pairs and gradients; the schedules take turns for
    `rounds` rounds.
    """
    device = torch.device("cpu")
    bench = Workbench(digits(), batch=BATCH, device=device, dtype=torch.float32)
    arms = {arm.name: arm for arm in ARMS if arm.config is not None}
    used = [arms[name] for course in COURSES.values() for name in course.schedules.values()]
    start = time.perf_counter()
    filling = ContinuousRollout(bench.rollout(arms[CONTINUOUS]).maker, batch=BATCH, groups=POOL, rank=0, world_size=1)
    filling.fill()
    start_up = (time.perf_counter() - start) / POOL
    rollouts = [bench.rollout(arm) for arm in used]
    seconds: dict[str, list[float]] = {arm.name: [] for arm in used}
    for number in range(rounds + 1):  # the first fills slots and is dropped
        for arm, rollout in zip(used, rollouts, strict=True):
            start = time.perf_counter()
            bench.student.zero_grad(set_to_none=True)
            bench.step(rollout.next_pairs())
            if number:
                seconds[arm.name].append(time.perf_counter() - start)
    updates = bench.update_seconds(rounds)
    return {
        "environment": describe(device),
        "batch": BATCH,
        "start_up": start_up,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "optimiser_and_ema": statistics.median(updates["optimiser"]) + statistics.median(updates["ema"]),
    }


def elapsed(updates: int, per_update: float, start_up: float) -> float:
    """Seconds of `updates` updates; each of the first POOL also fills slots for `start_up` s."""
    return min(updates, POOL) * start_up + updates * per_update


def seconds_to(target: float, gains: Mapping[int, float], per_update: float, start_up: float) -> float | None:
    """Seconds until the end of the first update whose gain reaches the target; None without any.

    `gains` are the gains by judged update; between judged updates the gain is linear, and it is 0
    at the start.
    """
    before, least = 0, 0.0
    for update, gain in sorted((int(update), gain) for update, gain in gains.items()):
        if gain >= target:
            crossing = before + (update - before) * (target - least) / (gain - least)
            return elapsed(math.ceil(round(crossing, 9)), per_update, start_up)
        before, least = update, gain
    return None


def summarise(work: Path) -> dict[str, object]:
    """Everything measured, and the seconds to each target by schedule and training seed."""
    timing = json.loads((work / "timing.json").read_text())
    control_record = json.loads((work / "control.json").read_text())
    summary = {"timing": timing, "control": control_record, "courses": {}, "schedules": {}}
    for name, course in COURSES.items():
        record = json.loads((work / f"gains-{slug(name)}.json").read_text())
        summary["courses"][name] = {"recipe": course.recipe, "changes": dict(course.changes), **record}
        for label, arm in course.schedules.items():
            start_up = timing["start_up"] if arm == CONTINUOUS else 0.0
            per_update = timing["seconds"][arm]["median"] + timing["optimiser_and_ema"]
            reached = {
                f"{target:g}": [seconds_to(target, gains, per_update, start_up) for gains in record["gains"].values()]
                for target in TARGETS
            }
            summary["schedules"][label] = {
                "course": name, "seconds_per_update": per_update, "start_up": start_up, "seconds_to": reached
            }  # fmt: skip
    return summary


def plot(result: Mapping, file: Path) -> None:
    """Writes a plot of gain against seconds: the seeds' median as a line, each seed as a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    for label, schedule in result["schedules"].items():
        gains = result["courses"][schedule["course"]]["gains"]
        updates = sorted(int(update) for update in next(iter(gains.values())))
        seconds = [elapsed(update, schedule["seconds_per_update"], schedule["start_up"]) for update in updates]
        values = np.array([[seed[str(update)] for update in updates] for seed in gains.values()])
        (line,) = axes.plot(seconds, np.median(values, axis=0), label=label)
        for row in values:
            axes.plot(seconds, row, "o", markersize=3, alpha=0.5, color=line.get_color())
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of training on two CPU cores")
    axes.set_ylabel("realness over plain guidance's best")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    figure.savefig(file)


def table(result: Mapping) -> str:
    """Seconds to each gain as text, a line per schedule: the median of the seeds, and each seed."""
    lines = []
    for label, schedule in result["schedules"].items():
        cells = []
        for target, values in schedule["seconds_to"].items():
            known = sorted(math.inf if value is None else value for value in values)
            shown = (known[len(known) // 2], *values)
            middle, *each = ("never" if seconds in (None, math.inf) else f"{seconds:.1f}" for seconds in shown)
            cells.append(f"+{target}: {middle} s ({', '.join(each)})")
        lines.append(f"{label:<40} {schedule['seconds_per_update']:.3f} s/update  " + "  ".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Runs one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "time", "report"])
    parser.add_argument("courses", nargs="*", metavar="course", help=f"of {', '.join(COURSES)}; all by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", type=Path, default=WORK)
    args = parser.parse_args()
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "train":
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
        train(args.courses or list(COURSES), args.work)
        if not args.courses:
            control(args.work)
    elif args.stage == "time":
        (args.work / "timing.json").write_text(json.dumps(time_arms(args.rounds), indent=1))
    else:
        result = summarise(args.work)
        (RESULTS / "time_to_gain.json").write_text(json.dumps(result, indent=1) + "\n")
        plot(result, RESULTS / "time_to_gain.png")
        print(table(result))


if __name__ == "__main__":
    main()
