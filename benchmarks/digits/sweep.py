"""The sweep that configs/digits.yaml was chosen by: recipes trained, drawn and scored against plain guidance.

    python -m benchmarks.digits.sweep            # every recipe that has no result yet; about four minutes each
    python -m benchmarks.digits.sweep w-1 w-5    # these recipes

Each recipe changes configs/digits.yaml by a few options and is trained with `selfnpo train`. Its negative branch is
tried with the empty prompt and with the positive's own. Pictures are cached under `build/sweep`, so an interrupted
sweep goes on where it was. Results: benchmarks/results/digits_sweep.{json,md}.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import torch

from selfnpo_fast.console import quiet_libraries
from selfnpo_fast.guidance.negative import load_negative
from selfnpo_fast.guidance.sampler import SamplerConfig, sample_images
from selfnpo_fast.models import load_adapter
from selfnpo_fast.scoring.evaluate import Results, evaluate, make_cases
from selfnpo_fast.scoring.report import statements
from selfnpo_fast.scoring.scorers import DigitsScorers

ROOT = Path(__file__).resolve().parents[2]
IMAGES, STEPS = 1120, 10
SEED = 1  # reports use 0: the recipe is not judged on the pictures that it was chosen by
SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)

START = {
    "rollout.mode": "continuous",
    "rollout.start": "noise",
    "rollout.grid_steps": 25,
    "rollout.k": 25,
    "rollout.w": -1.0,
    "reference.kind": "ema",
    "reference.decay": 0.999,
    "prompts.dropout": 0.0,
    "optimizer.lr": 1e-4,
    "engine.batch_size": 64,
    "updates": 240,
}
"""What every recipe starts from, so that the sweep does not move when the shipped config does."""

RECIPES = {
    "w-1": {},
    "w-1-long": {"updates": 720},
    "w-5": {"rollout.w": -5.0, "optimizer.lr": 2e-5, "updates": 150},
    "w-1-dropout": {"prompts.dropout": 0.5},
    "data-w-1": {"rollout.start": "data", "data.source": "digits", "rollout.k": 5},
    "w-2": {"rollout.w": -2.0, "optimizer.lr": 5e-5},
    "w0": {"rollout.w": 0.0},
    "frozen-w-1": {"reference.kind": "frozen"},
    "w-3": {"rollout.w": -3.0},
    "w2": {"rollout.w": 2.0},
}


def train(name: str, work: Path) -> Path:
    """The run's output folder; trained unless it holds a negative model already."""
    output = work / name
    if not (output / "negative").is_dir():
        options = START | RECIPES[name] | {"output": output, "log.sample_every": -1, "model.path": "digits"}
        if "data.source" not in options:
            options["prompts.source"] = "digits"
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        config = ["--config", str(ROOT / "configs" / "digits.yaml")]  # first: later words override it
        command = [sys.executable, "-m", "selfnpo_fast.cli", "train", *config, *words, "--overwrite"]
        subprocess.run(command, check=True)
    return output


class Painter:
    """Draws an arm at a guidance scale, or takes the pictures from the cache."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.adapter = load_adapter("digits")
        self.base = self.adapter.load_denoiser(torch.float32)
        self.cases = make_cases(IMAGES, SEED)
        cpu = torch.device("cpu")
        distinct = sorted({case.prompt for case in self.cases})
        self.place = {prompt: i for i, prompt in enumerate(distinct)}
        self.table = self.adapter.encode_prompts(distinct, cpu)
        self.empty = self.adapter.encode_empty(cpu)
        self.negatives: dict[str, tuple[torch.nn.Module | None, str, Path]] = {"base": (None, "empty", work / "base")}

    def add(self, name: str, output: Path) -> list[str]:
        """Arms of one training run: the negative branch with the empty and with the same prompt."""
        module = load_negative(self.adapter, str(output), torch.float32)
        for prompt in ("empty", "same"):
            self.negatives[f"{name}, {prompt}"] = (module, prompt, output)
        return [f"{name}, empty", f"{name}, same"]

    def all_of(self, arm: str, scale: float) -> torch.Tensor:
        """All pictures (N, 3, 32, 32) of an arm at a scale."""
        if scale == 1:
            arm = "base"  # guidance scale 1 is the positive model alone
        module, prompt, folder = self.negatives[arm]
        file = folder / f"images-{prompt}-{scale:g}.pt"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            index = torch.tensor([self.place[case.prompt] for case in self.cases])
            rows = {key: value[index] for key, value in self.table.items()}
            settings = SamplerConfig(steps=STEPS, guidance_scale=scale, negative_prompt=prompt)
            seeds = [case.seed for case in self.cases]
            images = sample_images(self.adapter, self.base, module, rows, self.empty, seeds, settings)
            aside = file.with_suffix(".tmp")
            torch.save(((images + 1) * 127.5).round().byte(), aside)
            aside.rename(file)
        return torch.load(file, weights_only=True).float() / 127.5 - 1

    def __call__(self, arm: str, guidance_scale: float, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        place = {case.seed: i for i, case in enumerate(self.cases)}
        return self.all_of(arm, guidance_scale)[[place[seed] for seed in seeds]]


def summary(results: Results, arms: list[str]) -> list[dict]:
    """One record per arm: verdict and rows."""
    out = []
    for arm in arms:
        rows = [dataclasses.asdict(row) for row in results.of(arm)]
        record = {"arm": arm, "rows": rows, "gain": None, "statements": []}
        if arm != "base":
            record |= {"gain": results.verdict(arm).gain, "statements": statements(results, arm)}
        out.append(record)
    return out


def markdown(records: dict[str, dict]) -> str:
    """The sweep as tables."""
    lines = [
        "# Sweep of recipes on the digits model",
        "",
        f"{IMAGES} pictures per row, the same prompts and seeds in all; {STEPS} DPM-Solver++ steps; one training seed. "
        "These are not the prompts and seeds that reports use. "
        "guidance_scale is diffusers' (omega + 1). `empty` and `same` name the negative branch's prompt. Made by "
        "`python -m benchmarks.digits.sweep`; every recipe changes the starting point below as its row says.",
        "",
        f"Starting point: `{json.dumps(START)}`",
        "",
        "| arm | changes | gain over plain guidance |",
        "| --- | --- | --- |",
    ]
    for arm, record in records.items():
        if arm != "base":
            name = arm.rsplit(", ", 1)[0]
            changes = json.dumps(RECIPES.get(name, {}))
            lines.append(f"| {arm} | `{changes}` | {'yes' if record['gain'] else 'no'} |")
    for arm, record in records.items():
        lines += ["", f"## {arm}", ""]
        lines += [f"- {statement}" for statement in record["statements"]]
        lines += [
            "",
            "| guidance_scale | accuracy | colour | realness | Frechet | precision | density | recall | coverage |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in record["rows"]:
            means = {key: value["value"] for key, value in row["means"].items()}
            overlap = [row[key]["value"] for key in ("precision", "density", "recall", "coverage")]
            cells = [means["digit_correct"], means["colour_match"], means["realness"], row["frechet"], *overlap]
            lines.append(f"| {row['guidance_scale']:g} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train, draw and score the recipes named, or all; results are written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="recipe", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--work", type=Path, default=Path("build/sweep"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    quiet_libraries()
    args.results.mkdir(parents=True, exist_ok=True)
    store = args.results / "digits_sweep.json"
    records = json.loads(store.read_text()) if store.exists() else {}
    painter, scorers = Painter(args.work), DigitsScorers.load()
    for name in args.recipes or [name for name in RECIPES if f"{name}, same" not in records]:
        arms = painter.add(name, train(name, args.work))
        results = evaluate(painter, painter.cases, ["base", *arms], SCALES, scorers)
        records |= {record["arm"]: record for record in summary(results, ["base", *arms])}
        store.write_text(json.dumps(records, indent=1))
        (args.results / "digits_sweep.md").write_text(markdown(records))
        for arm in arms:
            print("\n".join(statements(results, arm)), flush=True)


if __name__ == "__main__":
    main()
