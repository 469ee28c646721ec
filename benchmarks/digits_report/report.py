"""The digits report in benchmarks/results: digits.md, its numbers (digits.json) and its pictures.

    make report       # or: python -m benchmarks.digits_report.report

Every arm of `recipes.py` is trained with three seeds, drawn at all scales and held against plain
guidance. An arm that digits.json has already is skipped: an interrupted report goes on, also on
another machine. `--fresh` measures every arm again. A whole report takes about three hours on two
CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from selfnpo_fast.runtime.command import short_spin

os.environ.update(short_spin())  # before torch is imported

import numpy as np
import torch

from benchmarks.digits_report.make import BASE_SCALES, SCALES, WORK, add_recipe, load_calibration, new_painter
from benchmarks.digits_report.pages import write_pages
from benchmarks.digits_report.painter import BASE, PROMPTS, Painter
from benchmarks.digits_report.recipes import RECIPES, ROOT, SHIPPED, START, options_of
from selfnpo_fast.runtime.console import quiet_libraries
from selfnpo_fast.scoring.digits.measures import digits_measures
from selfnpo_fast.scoring.digits.scorer import FittedScorer
from selfnpo_fast.scoring.intervals import paired_difference
from selfnpo_fast.scoring.report import statements
from selfnpo_fast.scoring.results import Results
from selfnpo_fast.scoring.sweep import evaluate

RESULTS = ROOT / "benchmarks" / "results"
CONTINUOUS = "continuous"
"""The arm that all other arms are also held against."""


class Report:
    """Everything measured so far, kept in digits.json.

    `work` is the folder of negatives and pictures, `results` that of digits.json; `fresh` ignores
    an old digits.json.
    """

    def __init__(self, work: Path, results: Path, fresh: bool) -> None:
        self.work, self.store = work, results / "digits.json"
        old = {} if fresh or not self.store.exists() else json.loads(self.store.read_text())
        self.arms: dict[str, dict] = old.get("arms", {})
        self.calibration = old.get("calibration") or load_calibration(work)
        self.measures = digits_measures(FittedScorer.load())

    def save(self) -> None:
        """Writes digits.json, whole or not at all."""
        everything = {"start": START, "calibration": self.calibration, "arms": self.arms}
        temporary = self.store.with_suffix(".tmp")
        temporary.write_text(json.dumps(everything, indent=1, allow_nan=False) + "\n")
        temporary.replace(self.store)

    def measure(self, name: str, painter: Painter) -> None:
        """Scores one recipe's arms, and plain guidance where it is missing; keeps their records."""
        arms = add_recipe(painter, name, self.work, self.calibration)
        results = evaluate(painter, painter.cases, [BASE, *arms], SCALES, self.measures)
        for arm in arms:
            self.arms[arm] = self._record(results, arm, painter, name)
        base = f"{BASE}, {SHIPPED}" if name == SHIPPED else BASE
        if base not in self.arms:
            plain = evaluate(painter, painter.cases, [BASE], BASE_SCALES, self.measures)
            self.arms[base] = {"rows": [row.record() for row in plain.rows]}
        self.save()

    def _record(self, results: Results, arm: str, painter: Painter, name: str) -> dict:
        """What digits.json keeps of an arm of recipe `name`."""
        options = options_of(name, self.calibration)
        verdict = results.verdict(arm)
        reach = {}
        for measure in results.roles.compared:
            ours, theirs = results.highest(arm, measure), results.highest(BASE, measure)
            if ours is None:  # nowhere accurate enough to be compared
                continue
            reach[measure] = {
                "guidance_scale": ours.guidance_scale,
                "base_guidance_scale": theirs.guidance_scale,
                "difference": dataclasses.asdict(results.reach(arm, measure).differences[measure]),
                "by_seed": self._by_seed(painter, arm, ours.guidance_scale, theirs.guidance_scale, measure),
            }
        most = max(results.recall_gains_of(arm), key=lambda gain: gain.recall.value)
        return {
            "recipe": name,
            "changes": dict(RECIPES[name].changes) if name in RECIPES else {},
            "updates": options.get("updates"),
            "gain": verdict.gain,
            "statements": statements(results, arm),
            "reach": reach,
            "recall_gain": {"guidance_scale": most.guidance_scale, **dataclasses.asdict(most.recall)},
            "against": self._against(painter, arm),
            "rows": [row.record() for row in results.of(arm)],
        }

    def _scores(self, painter: Painter, arm: str, scale: float) -> Mapping[str, np.ndarray]:
        """By compared measure, the scores (N,) of all pictures."""
        scores = self.measures.score(painter.all_of(arm, scale), [case.prompt for case in painter.cases])
        return {name: scores[name].numpy() for name in self.measures.roles.compared}

    def _by_seed(self, painter: Painter, arm: str, scale: float, base_scale: float, measure: str) -> list[float]:
        """The mean difference to plain guidance over the pictures of each training seed."""
        ours, theirs = self._scores(painter, arm, scale)[measure], self._scores(painter, BASE, base_scale)[measure]
        return [float(part.mean()) for part in np.split(ours - theirs, len(ours) // PROMPTS)]

    def _against(self, painter: Painter, arm: str) -> dict[str, dict]:
        """Paired differences to `continuous` at the same scale, with intervals over prompts."""
        if CONTINUOUS not in painter.arms or arm == CONTINUOUS:
            return {}
        prompts = np.array([case.prompt for case in painter.cases])
        differences = {}
        for scale in SCALES[1:]:
            ours, theirs = self._scores(painter, arm, scale), self._scores(painter, CONTINUOUS, scale)
            differences[f"{scale:g}"] = {
                measure: dataclasses.asdict(paired_difference(ours[measure], theirs[measure], prompts))
                for measure in self.measures.roles.compared
            }
        return differences


def main() -> None:
    """Measures what is missing, then writes the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="recipe", help=f"only these, of {', '.join([*RECIPES, SHIPPED])}")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    report = Report(args.work, args.results, args.fresh)
    painters: dict[bool, Painter] = {}
    for name in args.recipes or [*RECIPES, SHIPPED]:
        if name in report.arms:
            continue
        print(f"measuring {name}", flush=True)
        shipped = name == SHIPPED
        if shipped not in painters:
            painters[shipped] = new_painter(args.work, name)
            if not shipped and name != CONTINUOUS:
                add_recipe(painters[shipped], CONTINUOUS, args.work, report.calibration)
        report.measure(name, painters[shipped])
    write_pages(report.arms, report.calibration, args.results, painters.get(True))
    print(f"report: {args.results / 'digits.md'}")


if __name__ == "__main__":
    main()
