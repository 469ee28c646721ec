"""Measures that the product does not know, from their definition to the report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import pytest
import torch

from selfnpo_fast.scoring.measures import RESERVED_NAMES, Measures, RememberLast, Roles, Terms
from selfnpo_fast.scoring.report import brief, markdown, statements, write_report
from selfnpo_fast.scoring.results import Case, Results, Row
from selfnpo_fast.scoring.sweep import check_sweep, evaluate

WORDS = ("dark", "bright")
CASES = [Case(prompt=f"a {WORDS[i % 2]} picture", seed=i) for i in range(40)]
SCALES = [1.0, 2.0]
FRONTIER_WORDS = ("precision", "recall", "Frontier", "frontier", "dominated")


class ShowsWord:
    """Whether a picture is as dark or bright as its prompt says."""

    name = "shows_word"

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        bright = torch.tensor(["bright" in prompt for prompt in prompts])
        return (images.mean(dim=(1, 2, 3)) > 0) == bright


class Contrast:
    """The spread of a picture's pixels."""

    name = "pixel_contrast"

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return images.flatten(1).std(dim=1)


class BrightnessGap:
    """How far the set's mean brightness is from that of real pictures."""

    name = "brightness_gap"
    least_images = 1

    def compare(self, images: torch.Tensor) -> float:
        return abs(images.mean().item() - 0.1)


class NearReal:
    """Whether each picture is about as bright as some real one."""

    name = "near_real"
    least_images = 1
    real = torch.linspace(-0.6, 0.6, 30)

    def compare(self, images: torch.Tensor) -> Terms:
        distance = (images.mean(dim=(1, 2, 3))[:, None] - self.real).abs()
        return Terms(distance.amin(dim=1) < 0.05, "generated")


class RealCovered:
    """How near some picture comes to each real one."""

    name = "real_covered"
    least_images = 7

    def compare(self, images: torch.Tensor) -> Terms:
        distance = (NearReal.real[:, None] - images.mean(dim=(1, 2, 3))).abs()
        return Terms((-10 * distance.amin(dim=1)).exp(), "real")


def generate(arm: str, guidance_scale: float, prompts: list[str], seeds: list[int]) -> torch.Tensor:
    """Noise around a brightness that depends on the prompt, with an arm's contrast."""
    noise = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    side = torch.tensor([1.0 if "bright" in prompt else -1.0 for prompt in prompts])
    contrast = 0.2 if arm == "base" else 0.3
    return contrast * noise + (0.2 * guidance_scale * side)[:, None, None, None]


def run(measures: Measures, arms: Sequence[str] = ("base", "negative")) -> Results:
    return evaluate(generate, CASES, arms, SCALES, measures)


def test_new_measures_come_out_in_the_report(tmp_path):
    measures = Measures(
        picture=[Contrast(), ShowsWord()],
        sets=[RealCovered(), BrightnessGap(), NearReal()],
        roles=Roles(accuracy="shows_word", compared=("pixel_contrast",)),
    )
    results = run(measures)
    paths = write_report(results, tmp_path, {})
    assert (
        set(paths) == {"report.json", "report.md", "accuracy.png", "grid.png"} == {p.name for p in tmp_path.iterdir()}
    )
    stored = json.loads(paths["report.json"].read_text(), parse_constant=pytest.fail)
    for row in stored["rows"]:
        images = generate(row["arm"], row["guidance_scale"], [c.prompt for c in CASES], [c.seed for c in CASES])
        contrast = Contrast().score(images, []).double().mean().item()
        assert row["means"]["pixel_contrast"]["value"] == pytest.approx(contrast)
        assert row["means"]["shows_word"]["value"] == 1
        assert row["brightness_gap"] == pytest.approx(BrightnessGap().compare(images))
        for measure in (NearReal(), RealCovered()):
            assert row[measure.name]["value"] == pytest.approx(measure.compare(images).values.double().mean().item())
            assert row[measure.name]["low"] <= row[measure.name]["value"] <= row[measure.name]["high"]
    assert stored["comparisons"][0]["wins"]["pixel_contrast"]["value"] == 1
    assert set(stored["comparisons"][0]["differences"]) == {"shows_word", "pixel_contrast"}
    text = paths["report.md"].read_text()
    assert "accuracy, held-out pairs | pixel contrast | real covered | brightness gap | near real |" in text
    assert "over prompts (real covered: over real pictures)" in text


def test_without_set_measures_their_sections_are_left_out(tmp_path):
    results = run(Measures(picture=[ShowsWord(), Contrast()], roles=Roles(accuracy="shows_word")))
    paths = write_report(results, tmp_path, {})
    assert set(paths) == {"report.json", "report.md", "accuracy.png", "grid.png"}
    stored = json.loads(paths["report.json"].read_text())
    assert stored.keys() == {"config", "note", "baseline", "accuracy", "rows", "comparisons", "verdicts"}
    assert stored["verdicts"] == {"negative": {"arm": "negative", "statements": []}}
    for text in (paths["report.md"].read_text(), brief(results)):
        assert not [word for word in (*FRONTIER_WORDS, "Verdict", "Best scale", "over real") if word in text]
    assert "## `negative` against `base`, pair by pair" in paths["report.md"].read_text()
    assert results.frontier("negative") == results.recall_gains == []
    assert results.verdict("negative").gain is None
    assert len(brief(results).splitlines()) == 1 + 1 + 4


def test_new_measures_take_the_roles_of_a_verdict(tmp_path):
    """Precision, recall and distance are whichever measures the roles name."""
    measures = Measures(
        picture=[ShowsWord(), Contrast()],
        sets=[BrightnessGap(), NearReal(), RealCovered()],
        roles=Roles(
            accuracy="shows_word",
            compared=("pixel_contrast",),
            precision="near_real",
            recall="real_covered",
            distance="brightness_gap",
        ),
    )
    results = run(measures)
    verdict = results.verdict("negative")
    gaps = {row.guidance_scale: row.sets["brightness_gap"] for row in results.of("negative")}
    assert verdict.best.guidance_scale == min(gaps, key=gaps.get)
    assert set(verdict.best.differences) == {"shows_word", "pixel_contrast", "near_real", "real_covered"}
    assert [point.arm for point in results.frontier("negative")] == ["negative"] * 2 + ["base"] * 2
    assert len(results.recall_gains) == 2
    first, frontier, *_, best = statements(results, "negative")
    assert first.startswith("negative: ")
    assert frontier.startswith("Frontier: ")
    assert best.startswith("Best scales by brightness gap, ")
    assert first in brief(results)
    assert "brightness gap" in brief(results).splitlines()[1]
    assert "frontier.png" in write_report(results, tmp_path, {})


@pytest.mark.parametrize(
    "roles",
    [
        Roles(accuracy="shows_word", distance="brightness_gap"),
        Roles(accuracy="shows_word", precision="near_real", recall="real_covered"),
    ],
    ids=["distance", "precision and recall"],
)
def test_a_verdict_has_the_parts_that_its_roles_allow(roles, tmp_path):
    sets = [BrightnessGap(), NearReal(), RealCovered()]
    results = run(Measures(picture=[ShowsWord(), Contrast()], sets=sets, roles=roles))
    stored = json.loads(write_report(results, tmp_path, {})["report.json"].read_text())["verdicts"]["negative"]
    if roles.distance:
        assert stored.keys() == {"arm", "best", "unbeaten", "statements"}
        assert len(stored["statements"]) == 1
        assert "it wins" not in stored["statements"][0], "no measure is compared"
    else:
        assert stored.keys() == {"arm", "gains", "beyond_reach", "gain", "statements"}
        assert stored["statements"][0] in brief(results)


def test_a_baseline_by_itself_needs_no_set_measures():
    results = run(Measures(picture=[ShowsWord()], roles=Roles(accuracy="shows_word")), arms=["base"])
    assert results.comparisons == []
    assert "| base | 2 | 1.000 [1.000, 1.000] | none |" in markdown(results, {})


def test_many_rows_are_briefly_those_of_highest_accuracy_without_a_distance():
    measures = Measures(picture=[ShowsWord()], roles=Roles(accuracy="shows_word"))
    results = evaluate(generate, CASES, ["base", "negative"], [0.1, 0.5, 1.0, 2.0], measures)
    lines = brief(results).splitlines()
    assert lines[0].endswith("Each arm at its most accurate:")
    assert len(lines) == 1 + 1 + 2


def test_a_sweep_of_too_few_pictures_for_a_measure_is_refused():
    measures = Measures(picture=[ShowsWord()], sets=[RealCovered()], roles=Roles(accuracy="shows_word"))
    with pytest.raises(ValueError, match="cases: 6 are too few; give more than 6"):
        check_sweep(CASES[:6], ["base"], SCALES, "base", measures)
    check_sweep(CASES[:7], ["base"], SCALES, "base", measures)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sets": [NearReal(), NearReal()]}, "names .* repeat"),
        (
            {"roles": Roles(accuracy="near_real")},
            r"\['near_real'\] are no picture measures; there are \['shows_word'\]",
        ),
        ({"roles": Roles(accuracy="shows_word", compared=("x",))}, r"\['x'\] are no picture measures"),
        ({"roles": Roles(accuracy="shows_word", distance="shows_word")}, "are no set measures"),
        ({"roles": Roles(accuracy="shows_word", recall="real_covered")}, "precision and recall are judged together"),
    ],
)
def test_names_and_roles_that_do_not_fit_are_refused(change, message):
    fitting = {"picture": [ShowsWord()], "sets": [NearReal(), RealCovered()], "roles": Roles(accuracy="shows_word")}
    Measures(**fitting)
    with pytest.raises(ValueError, match=message):
        Measures(**fitting | change)


def test_reserved_names_are_the_keys_of_a_row():
    assert {field.name for field in dataclasses.fields(Row)} - {"sets"} == RESERVED_NAMES


class Returns:
    """A measure that returns what it is told to."""

    name, least_images = "odd", 1

    def __init__(self, value: object) -> None:
        self.value = value

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.value

    def compare(self, images: torch.Tensor) -> object:
        return self.value


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("picture", torch.zeros(3, 2), r"odd: scores of shape \(3, 2\) for 3 images"),
        ("picture", torch.zeros(1), r"odd: scores of shape \(1,\) for 3 images"),
        ("sets", float("nan"), "odd: nan is not finite"),
        ("sets", Terms(torch.zeros(2), "generated"), r"odd: terms of shape \(2,\) for 3 images"),
    ],
)
def test_what_a_measure_must_not_return_is_refused(kind, value, message):
    measures = {"picture": [ShowsWord()], "sets": []}
    measures[kind] = [*measures[kind], Returns(value)]
    measures, images = Measures(**measures, roles=Roles(accuracy="shows_word")), torch.zeros(3, 3, 8, 8)
    with pytest.raises(ValueError, match=message):
        measures.score(images, ["a dark picture"] * 3)
        measures.compare(images)


@pytest.mark.parametrize(
    ("role", "value", "needed"),
    [
        ({"distance": "odd"}, Terms(torch.zeros(3), "generated"), "float"),
        ({"precision": "odd", "recall": "real_covered"}, 0.5, "generated"),
        ({"precision": "near_real", "recall": "odd"}, Terms(torch.zeros(3), "generated"), "real"),
    ],
)
def test_a_role_needs_its_kind_of_value(role, value, needed):
    sets = [NearReal(), RealCovered(), Returns(value)]
    measures = Measures(picture=[ShowsWord()], sets=sets, roles=Roles(accuracy="shows_word", **role))
    with pytest.raises(ValueError, match=f"odd: .* does not fit the measure's role; return '{needed}'"):
        measures.compare(torch.zeros(3, 3, 8, 8))


def test_results_are_remembered_for_the_last_images_only():
    calls = []
    remember = RememberLast(lambda images: calls.append(images.sum().item()) or len(calls))
    first, second = torch.zeros(2), torch.ones(2)
    assert [remember(first), remember(first), remember(second), remember(second), remember(first)] == [1, 1, 2, 2, 3]
    first.add_(1)
    assert remember(first) == 4
    with torch.inference_mode():
        third = torch.zeros(2)
    assert [remember(third), remember(third)] == [5, 5]
    del third
    assert [remember(torch.zeros(2)), remember(torch.zeros(2))] == [6, 7], "no images are mixed up after their death"
