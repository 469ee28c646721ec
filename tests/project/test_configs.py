"""The shipped configs: their first lines say what doctor computes, and what they need is little."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.config_costs import CARDS, LINE, NETWORKS, recomputed
from selfnpo_fast.doctor.machines import GPUS
from selfnpo_fast.train import parse

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "digits")
"""All but the embedded model's, which is made for CPUs."""
FAST = ("sd15",)


def name(path: Path) -> str:
    return path.stem


def lines(path: Path) -> dict[tuple[int, str], re.Match]:
    found = [LINE.match(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return {(int(line["ranks"]), line["card"]): line for line in found if line}


def words(path: Path, line: re.Match) -> list[str]:
    data = ["--data.source", "digits"] if path.stem.endswith("_paper") else []
    return ["--config", str(path), *data, *(line["options"] or "").split()]


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_the_first_lines_speak_of_one_and_eight_gpus_and_of_a_small_card(path):
    """Both numbers of ranks share the batch, with one more option at most on the large cards."""
    found = lines(path)
    assert found.keys() == {(1, "H100"), (8, "H100"), (1, "24 GB card")}
    text = path.read_text(encoding="utf-8")
    first = text[: text.index("\nmodel:")].splitlines()
    assert "not measured" in first[1] and "benchmarks.config_costs" in first[1]
    assert all(line.group() in first[2:5] for line in found.values())
    for (ranks, card), line in found.items():
        parse(words(path, line)).config.engine.check_shares(ranks)
        assert card == "24 GB card" or (line["options"] or "").count("--") <= 1


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_a_config_ends_within_four_hours_on_eight_gpus(path):
    hours = re.search(r"([\d.]+) h in all$", lines(path)[8, "H100"]["figures"])
    assert hours is not None, "it fits"
    assert float(hours[1]) < 4


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.stem.endswith("_lora")], ids=name)
def test_a_lora_fits_the_card_that_its_first_line_names(path):
    text = path.read_text(encoding="utf-8")
    card = int(re.match(r"# For one card of (\d+) GB: ", text)[1])
    assert float(re.match(r"[\d.]+", lines(path)[1, "24 GB card"]["figures"])[0]) < 0.92 * card
    assert lines(path)[1, "24 GB card"]["options"] is None, "with the file as it is"


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=() if p.stem in FAST else pytest.mark.slow) for p in SHIPPED], ids=name
)
def test_the_figures_are_those_that_doctor_computes(path):
    assert recomputed(path) == path.read_text(encoding="utf-8"), "python -m benchmarks.config_costs --write"


def test_each_family_has_a_network_without_weights_and_each_card_its_rates():
    assert all((NETWORKS / path.stem.partition("_")[0]).is_dir() for path in SHIPPED)
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
