"""Trains and draws recipes of the digits report without scoring them.

So several processes can share the work:

python -m benchmarks.digits_report.make                      # all that is missing
python -m benchmarks.digits_report.make "w = -5" frozen      # these recipes
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from selfnpo_fast.runtime.command import short_spin

os.environ.update(short_spin())  # before torch is imported

import torch

from benchmarks.digits_report.painter import BASE, Painter
from benchmarks.digits_report.recipes import CONFIRMATION_SEEDS, RECIPES, SHIPPED, TRAINING_SEEDS, calibrate, train

BASE_SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)
"""Guidance scales of plain guidance."""
SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Guidance scales of the recipes' arms."""
WORK = Path("build/report")
"""Folder of trained negatives and cached pictures."""
CHOICE_SEED, CONFIRMATION_SEED = 1, 0
"""Seeds of prompt order and noise: the first chooses a recipe, the second judges the choice."""


def load_calibration(work: Path) -> dict[str, dict[str, float]]:
    """What `recipes.calibrate` measured, kept in calibration.json.

    The machine should do nothing else while it measures.
    """
    file = work / "calibration.json"
    if not file.exists():
        measured = calibrate(work)
        file.write_text(json.dumps(measured, indent=1))
    return json.loads(file.read_text())


def new_painter(work: Path, name: str) -> Painter:
    """The painter of a recipe. The shipped config is judged on other pictures than the rest."""
    return Painter(work, len(TRAINING_SEEDS), CONFIRMATION_SEED if name == SHIPPED else CHOICE_SEED)


def add_recipe(painter: Painter, name: str, work: Path, calibration: Mapping) -> list[str]:
    """Trains what is missing of a recipe and adds its arms to the painter; returns their names."""
    seeds = CONFIRMATION_SEEDS if name == SHIPPED else TRAINING_SEEDS
    folders = [train(name, seed, work, calibration) for seed in seeds]
    painter.add(name, folders, "empty")
    if name == SHIPPED or not RECIPES[name].same_prompt:
        return [name]
    painter.add(f"{name}, same prompt", folders, "same")
    return [name, f"{name}, same prompt"]


def draw(painter: Painter, arms: Iterable[str], scales: Iterable[float]) -> None:
    """Fills the painter's cache."""
    for arm in arms:
        for scale in scales:
            painter.all_of(arm, scale)


def main() -> None:
    """Trains and draws the recipes that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="recipe", help=f"of {', '.join([*RECIPES, SHIPPED, BASE])}")
    parser.add_argument("--work", type=Path, default=WORK)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    calibration = load_calibration(args.work)
    for name in args.recipes or [BASE, *RECIPES]:
        painter = new_painter(args.work, name)
        if name == BASE:
            draw(painter, [BASE], BASE_SCALES)
        else:
            draw(painter, add_recipe(painter, name, args.work, calibration), SCALES)
        print(name, "done", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
