"""The recipes that the digits report compares, and how one of them is trained.

Every recipe is `selfnpo train` with START and a few changes. Each run uses one thread, so that two
runs can share a machine without slowing each other; the number of threads does not change their
results.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAINING_SEEDS = (1, 2, 3)
"""Seeds of every recipe's runs."""
CONFIRMATION_SEEDS = (11, 12, 13)
"""Seeds of the shipped config's runs: no recipe was chosen by them."""

START: dict[str, object] = {
    "model.path": "digits",
    "rollout.mode": "continuous",
    "rollout.start": "noise",
    "rollout.grid_steps": 25,
    "rollout.k": 25,
    "rollout.omega": -1.0,
    "reference.kind": "ema",
    "reference.decay": 0.999,
    "prompts.source": "digits",
    "prompts.dropout": 0.0,
    "optimizer.lr": 1e-4,
    "engine.batch_size": 64,
    "updates": 240,
}
"""What every recipe starts from, so that the report does not move when the shipped config does."""

_DATA = {"rollout.start": "data", "data.source": "digits", "rollout.k": 5}
_LOCKSTEP = {"rollout.mode": "lockstep", "rollout.stop": "uniform"}
_FULL = {"rollout.mode": "lockstep", "rollout.stop": "fixed"}


@dataclass(frozen=True)
class Recipe:
    """Changes to START, and what the arm is for."""

    what: str
    """What the arm is, for the page."""
    changes: Mapping[str, object] = field(default_factory=dict)
    """Options that differ from START."""
    same_prompt: bool = False
    """Whether the negative branch is also tried with the positive's prompt."""
    equal_seconds: bool = False
    """Whether it trains for as long as `continuous` takes instead of for as many pairs."""


RECIPES = {
    "continuous": Recipe("continuous rollouts from noise, w = -1, EMA reference", same_prompt=True),
    "dropout .5": Recipe("half of the student's prompts empty", {"prompts.dropout": 0.5}, same_prompt=True),
    "w = -5": Recipe("rollout guidance", {"rollout.omega": -5.0, "optimizer.lr": 2e-5}, same_prompt=True),
    "frozen": Recipe("the original model makes all pairs", {"reference.kind": "frozen"}),
    "w = 0": Recipe("the conditional output alone", {"rollout.omega": 0.0}),
    "w = -3": Recipe("rollout guidance", {"rollout.omega": -3.0, "optimizer.lr": 3e-5}),
    "naive": Recipe("noise is added to the clean estimate (Eq. 15)", {"rollout.noising": "naive"}),
    "lockstep, equal seconds": Recipe("the paper's rollouts, stop uniform", _LOCKSTEP, equal_seconds=True),
    "full, equal seconds": Recipe("full simulation K = 25", _FULL, equal_seconds=True),
    "dropout .1": Recipe("a tenth of the student's prompts empty", {"prompts.dropout": 0.1}),
    "data": Recipe("continuous rollouts from noised data, K = 5", _DATA, same_prompt=True),
    "shuffled": Recipe("as continuous, prompts of other samples", {"prompts.shuffled": True}),
    "shuffled, w = -5": Recipe(
        "as w = -5, prompts of other samples",
        {"rollout.omega": -5.0, "optimizer.lr": 2e-5, "prompts.shuffled": True},
    ),
    "lockstep": Recipe("the paper's rollouts from noise, stop uniform", _LOCKSTEP),
    "authors": Recipe(
        "the released recipe: lockstep from data, K = 5, Huber loss",
        {**_DATA, "rollout.mode": "lockstep", "loss.kind": "huber"},
    ),
    "full": Recipe("full simulation K = 25 from noise: the paper's baseline", _FULL),
}
SHIPPED = "shipped"
"""configs/digits.yaml with other training seeds and pictures: it confirms what was chosen."""


def slug(name: str) -> str:
    """A folder name for a recipe."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-").replace("--", "-")


def selfnpo_train(output: Path, options: Mapping[str, object]) -> None:
    """Runs `selfnpo train` into `output` in one thread.

    Raises RuntimeError with the end of its output on failure.
    """
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    config = ["--config", str(ROOT / "configs" / "digits.yaml")]  # first: later words override it
    command = [sys.executable, "-m", "selfnpo_fast.cli", "train", *config, *words, "--overwrite"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)
    if done.returncode:
        raise RuntimeError(f"training {output.name} failed:\n{done.stderr[-3000:]}")


def options_of(name: str, calibration: Mapping[str, Mapping[str, float]]) -> dict[str, object]:
    """The options of a recipe over configs/digits.yaml.

    `calibration` is what `calibrate` returned: it holds the updates that fit into the seconds of
    `continuous`.
    """
    if name == SHIPPED:
        return {}
    recipe = RECIPES[name]
    options = START | dict(recipe.changes)
    if options["rollout.start"] == "data":
        del options["prompts.source"]
    if recipe.equal_seconds:
        options["updates"] = round(calibration["updates at equal seconds"][name.partition(",")[0]])
    return options


def train(name: str, seed: int, work: Path, calibration: Mapping[str, Mapping[str, float]]) -> Path:
    """The output folder of one run; trains the run unless its negative model is there already."""
    output = work / slug(name) / f"seed{seed}"
    if not (output / "negative").is_dir():
        common = {"output": output, "log.sample_every": -1, "log.every": 20, "seed": seed}
        selfnpo_train(output, options_of(name, calibration) | common)
        shutil.rmtree(output / "checkpoints")
    return output


def _seconds(output: Path, pairs: int) -> tuple[float, float]:
    """(seconds of the start-up pass, seconds per update) of a run that logged twice.

    `pairs` is the number of pairs between two logs.
    """
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    first, second = (pairs / row["pairs_per_second"] for row in rows)
    updates = rows[0]["update"]
    return max(0.0, first - second), second / updates


def calibrate(work: Path, rounds: int = 3, updates: int = 6) -> dict[str, dict[str, float]]:
    """Measures start-up and updates of each mode, and how many updates take as long as START's run.

    Seconds are medians over `rounds` runs of each mode; the modes take turns. Start-up is part of a
    run.
    """
    modes = {name: RECIPES[name] for name in ("continuous", "lockstep", "full")}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in modes}
    for _ in range(rounds):
        for name, recipe in modes.items():
            output = work / "calibration" / name
            options = START | dict(recipe.changes)
            options |= {"output": output, "log.sample_every": -1, "log.every": updates, "updates": 2 * updates}
            selfnpo_train(output, options)
            times[name].append(_seconds(output, updates * int(START["engine.batch_size"])))
    start_up = {name: statistics.median(start for start, _ in values) for name, values in times.items()}
    per_update = {name: statistics.median(each for _, each in values) for name, values in times.items()}
    budget = start_up["continuous"] + START["updates"] * per_update["continuous"]
    return {
        "seconds of the start-up pass": start_up,
        "seconds per update": per_update,
        "updates at equal seconds": {name: (budget - start_up[name]) / per_update[name] for name in modes},
    }
