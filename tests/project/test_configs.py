"""The shipped configs: their first lines say what doctor computes, and what they need is little."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import fitting_page
from benchmarks.config_costs import CARDS, LINE, network_of, recomputed
from selfnpo_fast.doctor.machines import GPUS
from selfnpo_fast.models import FAMILIES, Family
from selfnpo_fast.train import parse

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = pytest.mark.usefixtures("plain_linear")
SHIPPED = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "digits")
"""All but the embedded model's, which is made for CPUs."""
LORAS = [path for path in SHIPPED if path.stem.endswith("_lora")]
FAST, SLOW = ("sd15",), ("sdxl_lora", "sd35_medium_lora", "cogvideox_2b_lora", "wan21_1_3b_lora")
"""Configs whose figures are computed again here, one of each family."""


def name(path: Path) -> str:
    return path.stem


def figures(path: Path) -> list[re.Match]:
    found = [LINE.match(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in found if line]


def lines(path: Path) -> dict[tuple[int, str], re.Match]:
    """The three lines that every config has; others may follow."""
    return {(int(line["ranks"]), line["card"]): line for line in figures(path)[:3]}


def words(path: Path, line: re.Match) -> list[str]:
    data = ["--data.source", "digits"] if path.stem.endswith("_paper") else []
    return ["--config", str(path), *data, *(line["options"] or "").split()]


def family(path: Path) -> Family:
    return FAMILIES[json.loads((network_of(path) / "model_index.json").read_text(encoding="utf-8"))["_class_name"]]


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_the_first_lines_speak_of_one_and_eight_gpus_and_of_a_small_card(path):
    """Both numbers of ranks share the batch, with one more option at most on the large cards."""
    found = lines(path)
    assert found.keys() == {(1, "H100"), (8, "H100"), (1, "24 GB card")}
    text = path.read_text(encoding="utf-8")
    first = text[: text.index("\nmodel:")].splitlines()
    assert "not measured" in first[1] and "benchmarks.config_costs" in first[1]
    shown = [line.group() for line in figures(path)]
    assert first[2 : 2 + len(shown)] == shown, "one after another"
    for (ranks, card), line in found.items():
        parse(words(path, line)).config.engine.check_shares(ranks)
        assert card == "24 GB card" or (line["options"] or "").count("--") <= 1


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_a_config_ends_within_four_hours_on_eight_gpus(path):
    hours = re.search(r"([\d.]+) h in all$", lines(path)[8, "H100"]["figures"])
    assert hours is not None, "it fits"
    assert float(hours[1]) < 4


@pytest.mark.parametrize("path", LORAS, ids=name)
def test_a_lora_fits_the_card_that_its_first_line_names(path):
    text = path.read_text(encoding="utf-8")
    card = int(re.match(r"# For one card of (\d+) GB: ", text)[1])
    assert float(re.match(r"[\d.]+", lines(path)[1, "24 GB card"]["figures"])[0]) < 0.92 * card
    assert lines(path)[1, "24 GB card"]["options"] is None, "with the file as it is"


@pytest.mark.parametrize("path", LORAS, ids=name)
def test_a_lora_has_the_rate_and_the_layers_of_its_family_which_are_in_the_blocks(path):
    config, owner = parse(words(path, figures(path)[0])).config, family(path)
    assert (config.optimizer.lr, config.lora.targets) == (owner.lora_rate, list(owner.lora_targets))
    assert config.optimizer.lr >= 2e-5, "the least of other trainers"
    assert "tuned for this" in path.read_text(encoding="utf-8")
    network = json.loads((network_of(path) / owner.denoiser_name / "config.json").read_text(encoding="utf-8"))
    if "num_layers" in network:
        network["num_layers"] = 1
    with torch.device("meta"):
        layers = [f".{layer}" for layer, module in owner.new_denoiser(network).named_modules()
                  if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]  # fmt: skip
    for target in config.lora.targets:
        assert any(layer.endswith(f".{target}") for layer in layers), target


@pytest.mark.parametrize("path", [path for path in SHIPPED if family(path).draws_videos], ids=name)
def test_a_config_of_videos_says_that_its_number_of_pairs_is_a_guess(path):
    config, text = parse(words(path, figures(path)[0])).config, path.read_text(encoding="utf-8")
    head = " ".join(line.removeprefix("# ") for line in text[: text.index("\nmodel:")].splitlines())
    assert f"{config.updates * config.engine.batch_size:,} pairs are a guess" in head


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_the_documentation_lists_it(path):
    page = (CONFIGS.parent / "docs" / "training.md").read_text(encoding="utf-8")
    assert f"| [{path.name}](../configs/{path.name}) |" in page


def test_cogvideox_5b_trains_in_full_on_eight_cards_with_zero_2_and_3():
    path = CONFIGS / "cogvideox_5b.yaml"
    stages = {parse(words(path, line)).config.engine.zero_stage: line for line in figures(path) if line["ranks"] == "8"}
    assert stages.keys() == {2, 3}
    memory = {stage: float(re.match(r"[\d.]+", line["figures"])[0]) for stage, line in stages.items()}
    assert memory[3] < memory[2] < 0.92 * 80


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p.stem in FAST else pytest.mark.slow) for p in SHIPPED if p.stem in FAST + SLOW],
    ids=name,
)
def test_the_figures_are_those_that_doctor_computes(path):
    """Those of all take minutes: python -m benchmarks.config_costs."""
    assert recomputed(path) == path.read_text(encoding="utf-8"), "python -m benchmarks.config_costs --write"


def fitting_rows() -> dict[str, str]:
    found = [fitting_page.ROW.match(text) for text in fitting_page.PAGE.read_text(encoding="utf-8").splitlines()]
    return {line["stem"]: line.group() for line in found if line}


def test_the_page_of_what_fits_has_every_recipe_and_the_memory_that_its_first_lines_have():
    """Where a config fits as it is; elsewhere options follow the figure, or it is none."""
    found = fitting_rows()
    same = {"wan22_a14b_lora"}  # other frames of the model before it
    assert found.keys() == {path.stem for path in SHIPPED if not path.stem.endswith("_paper")} - same
    for stem, row in found.items():
        cells, shown = row.strip("| ").split(" | ")[1:], lines(CONFIGS / f"{stem}.yaml")
        sizes = fitting_page.CARDS if stem.endswith("_lora") else fitting_page.CARDS[2:]
        for (size, count), cell in zip(sizes, cells, strict=True):
            peak = re.search(r"([\d.]+) GiB", shown[count, "H100"]["figures"])[1]
            if float(peak) <= 0.92 * size:
                assert cell.removesuffix(" `engine.accumulation 1`") == peak, (stem, size)
            else:
                assert cell.startswith("no: ") or ("`" in cell and float(cell.split()[0]) <= 0.92 * size), (stem, size)


@pytest.mark.slow
def test_a_row_of_that_page_is_what_doctor_computes():
    """The others take minutes: python -m benchmarks.fitting_page."""
    assert fitting_page.row("sd15_lora") == fitting_rows()["sd15_lora"]


def test_each_config_has_a_network_without_weights_and_each_card_its_rates():
    assert all((network_of(path) / "model_index.json").is_file() for path in SHIPPED)
    with pytest.raises(LookupError, match="no network other in "):
        network_of(CONFIGS / "other_lora.yaml")
    assert {machine for machine, _ in CARDS.values()} <= {gpu.name for gpu in GPUS}


def test_the_authors_numbers():
    """Batch, rate, decay, guidance and steps of the authors' code for each model."""
    for stem, batch, rate, decay, omega, scale in (
        ("sd15_paper", 80, 1e-6, 1e-3, -1, 6.5),
        ("sdxl_paper", 40, 1e-7, 0, -5, 5),
    ):
        config = parse(["--config", str(CONFIGS / f"{stem}.yaml"), "--data.source", "digits"]).config
        optimizer, rollout = config.optimizer, config.rollout
        found = (config.engine.batch_size, optimizer.lr, optimizer.weight_decay, rollout.omega)
        assert found == (batch, rate, decay, omega)
        assert config.log.sample_guidance_scale == scale
        assert (rollout.mode, rollout.start, rollout.k, rollout.grid_steps) == ("lockstep", "data", 5, 25)
        assert (config.updates, config.engine.precision, optimizer.name) == (1000, "fp16", "adamw8bit")
        assert (optimizer.betas, optimizer.eps, optimizer.clip) == ((0.9, 0.999), 1e-8, 1)
        assert (config.loss.kind, config.loss.c, config.reference.kind, config.reference.decay) == (
            *("huber", 1e-3),
            *("ema", 0.999),
        )
