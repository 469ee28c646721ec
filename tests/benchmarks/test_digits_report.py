"""The digits report: its recipes are configs, and its page says what its numbers say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.digits_report.pages import GROUPS, markdown, plot_gains, results_of
from benchmarks.digits_report.painter import BASE, PROMPTS, Painter
from benchmarks.digits_report.recipes import RECIPES, SHIPPED, TRAINING_SEEDS, options_of, slug
from selfnpo_fast import train

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CALIBRATION = {"updates at equal seconds": {"lockstep": 41.4, "full": 39.9}}


@pytest.fixture(scope="module")
def stored() -> dict:
    return json.loads((RESULTS / "digits.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_config(name):
    words = [word for key, value in options_of(name, CALIBRATION).items() for word in (f"--{key}", str(value))]
    config = train.parse(["--config", str(train.DEFAULT_CONFIG), *words]).config
    assert config.model.path == "digits"
    assert config.updates == (round(CALIBRATION["updates at equal seconds"][name.partition(",")[0]])
                              if RECIPES[name].equal_seconds else 240)  # fmt: skip


def test_recipes_differ_and_have_folders_of_their_own():
    options = [json.dumps(options_of(name, CALIBRATION), sort_keys=True) for name in RECIPES]
    assert len(set(options)) == len(options)
    names = [slug(name) for name in (*RECIPES, SHIPPED, BASE)]
    assert len(set(names)) == len(names)


def test_every_arm_was_measured_on_at_least_a_thousand_pictures(stored):
    same = (f"{name}, same prompt" for name, recipe in RECIPES.items() if recipe.same_prompt)
    assert {*RECIPES, SHIPPED, BASE, *same} <= stored["arms"].keys()
    for name, record in stored["arms"].items():
        assert all(row["images"] == PROMPTS * len(TRAINING_SEEDS) >= 1000 for row in record["rows"]), name
        for reach in record.get("reach", {}).values():
            assert len(reach["by_seed"]) == 3
            mean = sum(reach["by_seed"]) / 3
            assert mean == pytest.approx(reach["difference"]["value"], abs=1e-6), "as many pictures of each seed"


def test_the_page_is_that_of_its_numbers(stored):
    assert (RESULTS / "digits.md").read_text() == markdown(stored["arms"], stored["calibration"])


def test_the_page_shows_pictures_that_are_there():
    page = (RESULTS / "digits.md").read_text()
    shown = [part.partition(")")[0] for part in page.split("](")[1:]]
    pictures = [name for name in shown if name.endswith(".png")]
    assert len(pictures) >= len(GROUPS) + 4
    for name in pictures:
        assert Image.open(RESULTS / name).width > 300, name


def test_the_shipped_config_is_the_arm_that_the_findings_name(stored):
    """configs/digits.yaml does what arm `continuous` did, on other seeds."""
    config = train.parse(["--config", str(train.DEFAULT_CONFIG)]).config
    words = [word for key, value in options_of("continuous", CALIBRATION).items() for word in (f"--{key}", str(value))]
    arm = train.parse(["--config", str(train.DEFAULT_CONFIG), *words]).config
    arm.rollout.k = config.rollout.k  # 25 and its default are the same
    assert arm == config
    ours, theirs = (stored["arms"][name]["rows"] for name in (SHIPPED, f"{BASE}, {SHIPPED}"))
    assert ours[0]["means"] == next(row for row in theirs if row["guidance_scale"] == 1)["means"], "the same at scale 1"


def test_plots_have_every_arm(stored):
    for names in GROUPS.values():
        assert results_of(stored["arms"], names).arms == [BASE, *names]
    axes = plot_gains(stored["arms"]).axes[0]
    assert len(axes.get_yticklabels()) == len([r for n, r in stored["arms"].items() if r.get("reach") and n != SHIPPED])


def test_of_an_arm_each_training_run_draws_its_own_pictures(tmp_path):
    """Pictures come from the cache where they are; block b belongs to training run b."""
    painter = Painter(tmp_path, 3, 7)
    assert len(painter.cases) == 3 * PROMPTS
    for block in range(3):
        assert len({case.prompt for case in painter.cases[block * PROMPTS : (block + 1) * PROMPTS]}) == PROMPTS
        file = painter.folder / "arm" / f"2-{block}.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.full((PROMPTS, 3, 4, 4), 100 * block, dtype=torch.uint8), file)
    painter.add("arm", [Path("nowhere")] * 3, "empty")
    seeds = [painter.cases[i].seed for i in (2 * PROMPTS + 5, 3, PROMPTS)]
    images = painter("arm", 2.0, [], seeds)
    assert images[:, 0, 0, 0].tolist() == pytest.approx([200 / 127.5 - 1, -1, 100 / 127.5 - 1])
