"""The sweep and its report, with made-up arms whose ranking is known beforehand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import pytest
import torch
from PIL import Image

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.images import image_grid
from selfnpo_fast.scoring.digits.cases import make_cases
from selfnpo_fast.scoring.digits.domain import digits_domain
from selfnpo_fast.scoring.digits.measures import digits_measures
from selfnpo_fast.scoring.digits.network import DigitScorer
from selfnpo_fast.scoring.digits.scorer import FittedScorer
from selfnpo_fast.scoring.intervals import Interval, win_rate_interval
from selfnpo_fast.scoring.measures import Measures, Roles
from selfnpo_fast.scoring.report import brief, statements, write_report
from selfnpo_fast.scoring.results import Case, Results, Row
from selfnpo_fast.scoring.set_measures import FrechetDistance, knn_measures
from selfnpo_fast.scoring.sweep import evaluate

SCALES = (1.0, 2.0, 3.0)
CONFIG = {"model": "fake", "steps": 10}


def mean_colour(images: torch.Tensor) -> torch.Tensor:
    """(N, 3): the features of toy pictures."""
    return images.mean(dim=(2, 3))


class Right:
    name = "right"

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return mean_colour(images)[:, 0] > -0.2


class Quality:
    """The mean of red."""

    name = "quality"

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return mean_colour(images)[:, 0]


def toy_measures() -> Measures:
    """A domain that is not digits."""
    real_features = torch.randn(150, 3, generator=torch.Generator().manual_seed(99)) * 0.2
    return Measures(
        picture=[Right(), Quality()],
        sets=[FrechetDistance(mean_colour, real_features), *knn_measures(mean_colour, real_features)],
        roles=Roles(
            accuracy="right", compared=("quality",), precision="precision", recall="recall", distance="frechet"
        ),
    )


def toy_cases(n: int = 120) -> list[Case]:
    return [Case(prompt=f"prompt {i % 60}", seed=i, held_out=i % 10 == 0) for i in range(n)]


def toy_generate(spread: dict[str, float], lift: dict[str, float]):
    """Arms that draw around `lift` with `spread`, which the guidance scale narrows.

    Real pictures have spread 0.2 around 0.
    """

    def generate(arm: str, guidance_scale: float, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        noise = torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        colour = noise * spread[arm] / guidance_scale
        colour[:, 0] += lift[arm]
        return colour[:, :, None, None].expand(-1, -1, 32, 32)

    return generate


def toy_results(spread: float, lift: float) -> Results:
    generate = toy_generate({"base": 0.4, "negative": spread}, {"base": 0.3, "negative": lift})
    return evaluate(generate, toy_cases(), ["base", "negative"], SCALES, toy_measures())


@pytest.fixture(scope="module")
def better() -> Results:
    """An arm whose pictures lie where the real ones lie; those of the base lie elsewhere."""
    return toy_results(spread=0.4, lift=0.0)


@pytest.fixture(scope="module")
def equal() -> Results:
    return toy_results(spread=0.4, lift=0.3)


@pytest.fixture(scope="module")
def worse() -> Results:
    return toy_results(spread=0.4, lift=-0.8)


def test_cases_walk_through_all_prompts_before_any_repeats():
    cases = make_cases(600, seed=3)
    domain = digits_domain()
    assert {case.prompt for case in cases[:560]} == {domain.prompt(label) for label in domain.labels()}
    assert [case.prompt for case in cases[560:]] == [case.prompt for case in cases[:40]]
    assert len({case.seed for case in cases}) == 600
    assert all(domain.prompt(domain.label(case.prompt)) == case.prompt for case in cases)
    assert all(case.held_out == domain.is_held_out(domain.label(case.prompt)) for case in cases)
    assert make_cases(96, seed=3) == cases[:96]
    assert [case.prompt for case in make_cases(96, seed=4)] != [case.prompt for case in cases[:96]]
    assert not {case.seed for case in make_cases(96, seed=4)} & {case.seed for case in cases}


def test_every_arm_sees_the_same_prompts_and_seeds_in_order():
    seen: dict[tuple[str, float], list] = {}
    inner = toy_generate({"base": 0.4, "negative": 0.3}, {"base": 0.0, "negative": 0.0})

    def generate(arm, guidance_scale, prompts, seeds):
        assert len(prompts) <= 50
        seen.setdefault((arm, guidance_scale), []).extend(zip(prompts, seeds, strict=True))
        return inner(arm, guidance_scale, prompts, seeds)

    cases, rows = toy_cases(), []
    results = evaluate(generate, cases, ["base", "negative"], SCALES, toy_measures(), batch_size=50, on_row=rows.append)
    assert len(seen) == 6
    assert all(pairs == [(case.prompt, case.seed) for case in cases] for pairs in seen.values())
    assert rows == results.rows


def test_rows_hold_the_means_of_the_scores(better):
    row = better.of("negative")[1]
    generate = toy_generate({"negative": 0.4}, {"negative": 0.0})
    cases = toy_cases()
    images = generate("negative", row.guidance_scale, [c.prompt for c in cases], [c.seed for c in cases])
    scores = toy_measures().score(images, [c.prompt for c in cases])
    assert row.images == 120
    assert row.means["right"].value == pytest.approx(scores["right"].double().mean().item())
    assert row.means["quality"].value == pytest.approx(scores["quality"].double().mean().item(), abs=1e-7)
    assert row.held_out.value == pytest.approx(scores["right"][::10].double().mean().item())
    assert row.means["quality"].low < row.means["quality"].value < row.means["quality"].high


def test_comparisons_cover_all_pairs_of_scales_and_count_wins(better):
    assert len(better.comparisons) == 9
    generate = toy_generate({"base": 0.4, "negative": 0.4}, {"base": 0.3, "negative": 0.0})
    seeds = [case.seed for case in toy_cases()]
    quality = {arm: generate(arm, scale, [], seeds)[:, 0, 0, 0] for arm, scale in (("negative", 1.0), ("base", 3.0))}
    pair = better.comparison("negative", 1.0, 3.0)
    assert pair.wins["quality"].value == pytest.approx(win_rate_interval(quality["negative"], quality["base"]).value)
    difference = (quality["negative"] - quality["base"]).double().mean().item()
    assert pair.differences["quality"].value == pytest.approx(difference, abs=1e-6)
    rows = {(row.arm, row.guidance_scale): row for row in better.rows}
    for name in ("precision", "recall"):
        ours, theirs = rows["negative", 1.0].sets[name], rows["base", 3.0].sets[name]
        assert pair.differences[name].value == pytest.approx(ours.value - theirs.value)


def test_a_better_arm_is_a_gain_and_dominates(better):
    verdict = better.verdict("negative")
    assert verdict.gain
    assert all(gain.recall.low > 0 for gain in verdict.gains)
    first = statements(better, "negative")[0]
    assert first == "negative: a gain in precision and recall over plain guidance at all scales tried."
    assert any(point.dominated_by for point in better.frontier("negative") if point.arm == "base")


def test_an_equal_arm_is_no_gain(equal):
    verdict = equal.verdict("negative")
    assert not verdict.gain
    assert not verdict.beyond_reach
    assert verdict.best.wins["quality"].value == 0.5
    text = " ".join(statements(equal, "negative"))
    assert "no gain in precision and recall over plain guidance" in text
    assert "no difference shown" in text


def with_rows(results, accuracy: float):
    """The same results with every point's accuracy set."""
    rows = [
        dataclasses.replace(row, means=row.means | {"right": Interval(value=accuracy, low=accuracy, high=accuracy)})
        for row in results.rows
    ]
    return dataclasses.replace(results, rows=rows)


def test_highest_points_are_compared_each_at_its_own_scale(better, equal, worse):
    words = {1: "(a gain)", 0: "(no difference shown)", -1: "(a loss)"}
    met = set()
    for results in (better, equal, worse):
        accurate = with_rows(results, 0.96)
        ours, theirs = accurate.highest("negative", "quality"), accurate.highest("base", "quality")
        assert ours.means["quality"].value == max(row.means["quality"].value for row in accurate.of("negative"))
        reach = accurate.reach("negative", "quality")
        assert (reach.guidance_scale, reach.baseline_guidance_scale) == (ours.guidance_scale, theirs.guidance_scale)
        line = next(line for line in statements(accurate, "negative") if line.startswith("Highest quality"))
        gap = ours.means["quality"].value - theirs.means["quality"].value
        met.add(sign := (gap > 0) - (gap < 0))
        assert words[sign] in line
        assert with_rows(results, 0.94).reach("negative", "quality") is None
    assert len(met) > 1, "the arms differ"


def test_a_worse_arm_is_no_gain_and_says_so(worse):
    assert not worse.verdict("negative").gain
    text = " ".join(statements(worse, "negative"))
    assert "Frontier: no gain" in text
    assert "(worse)" in text


def test_an_arm_that_only_moves_along_the_frontier_is_no_gain():
    # The arm at scale s is the base at scale 2 s: stronger effective guidance, nothing else.
    generate = toy_generate({"base": 0.6, "negative": 0.3}, {"base": 0.0, "negative": 0.0})
    results = evaluate(generate, toy_cases(), ["base", "negative"], (1.0, 2.0, 4.0, 8.0), toy_measures())
    for scale in (1.0, 2.0, 4.0):
        pair = results.comparison("negative", scale, 2 * scale)
        assert pair.differences["precision"].value == pair.differences["recall"].value == 0
    assert not results.verdict("negative").gain
    for gain in results.recall_gains[:3]:
        assert gain.recall.value <= 0


def test_a_shift_in_guidance_between_two_scales_is_no_gain():
    # At scale s the arm is the base at 1.2 s, which the sweep of the base leaves out; the arm may win
    # pairs, no more.
    generate = toy_generate({"base": 0.6, "negative": 0.5}, {"base": 0.0, "negative": 0.0})
    results = evaluate(generate, toy_cases(), ["base", "negative"], (1.0, 1.5, 2.0, 3.0), toy_measures())
    assert not results.verdict("negative").gain
    assert "no gain" in statements(results, "negative")[0]


def test_report_files_agree_with_the_results(better, tmp_path):
    paths = write_report(better, tmp_path / "report", CONFIG)
    assert set(paths) == {"report.json", "report.md", "frontier.png", "accuracy.png", "grid.png"}
    stored = json.loads(paths["report.json"].read_text())
    assert stored["config"] == CONFIG
    assert [row["frechet"] for row in stored["rows"]] == [row.sets["frechet"] for row in better.rows]
    assert [Row.from_record(record) for record in stored["rows"]] == better.rows
    assert stored["verdicts"]["negative"]["gain"] is True
    assert len(stored["comparisons"]) == 9
    text = paths["report.md"].read_text()
    assert text.count("omega + 1") == 1
    for row in better.rows:
        mean = row.means["right"]
        assert f"| {row.arm} | {row.guidance_scale:g} | {mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}] |" in text
    for name in ("frontier.png", "accuracy.png", "grid.png"):
        with Image.open(paths[name]) as image:
            assert image.width > 300, name
            # Something dark is drawn on the page.
            assert image.convert("L").getextrema()[0] < 60, name


def test_tables_have_as_many_cells_as_columns(better, tmp_path):
    text = write_report(better, tmp_path, CONFIG)["report.md"].read_text()
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert [len(table) for table in tables] == [2 + 6, 2 + 9, 2 + 6]
    for table in tables:
        assert len({line.count("|") for line in table}) == 1


def test_brief_is_short_and_ends_with_the_verdict(better, worse):
    for results in (better, worse):
        lines = brief(results).splitlines()
        assert len(lines) <= 15
        assert max(map(len, lines)) <= 120
        assert statements(results, "negative")[0] in lines
    assert "omega + 1" in brief(better)


def test_brief_stays_short_with_many_arms_and_scales():
    arms = ["base", "negative", "same prompt"]
    generate = toy_generate(dict.fromkeys(arms, 0.4), {"base": 0.3, "negative": 0.0, "same prompt": 0.2})
    results = evaluate(generate, toy_cases(60), arms, (1.0, 1.5, 2.0, 3.0, 5.0), toy_measures())
    assert len(brief(results).splitlines()) <= 15


def test_digits_run_through_with_only_a_baseline(tmp_path):
    torch.manual_seed(0)
    network = DigitScorer().eval()
    with torch.no_grad():
        real = network(torch.rand(40, 3, 32, 32) * 2 - 1)[0]

    def generate(arm, guidance_scale, prompts, seeds):
        return torch.stack(
            [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in seeds]
        )

    measures = digits_measures(FittedScorer(network, real, {}))
    results = evaluate(generate, make_cases(30), ["base"], [1.0, 2.0], measures)
    assert set(results.rows[0].means) == {"digit_log_prob", "digit_correct", "colour_match", "realness"}
    assert results.comparisons == []
    write_report(results, tmp_path, CONFIG)
    assert "| base | 2 |" in (tmp_path / "report.md").read_text()


def test_image_grid_places_enlarges_and_captions():
    images = torch.stack([torch.full((3, 32, 32), value) for value in (-1.0, 0.0, 1.0)])
    plain, captioned = image_grid(images, 2), image_grid(images, 2, ["first", "a caption of several words", "third"])
    assert plain.width == captioned.width == 2 * (96 + 16)
    assert captioned.height > plain.height
    assert plain.getpixel((50, 50)) == (0, 0, 0)
    assert plain.getpixel((112 + 50, 50)) == (128, 128, 128)
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[0, 0, 0, 0] = 1
    enlarged = image_grid(pixels, 1)
    assert [enlarged.getpixel((8 + x, 8)) for x in (0, 2, 3)] == [(255, 128, 128), (255, 128, 128), (128, 128, 128)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ["negative"]}, "arms: .* lack the baseline 'base'"),
        ({"arms": ["base", "base"]}, "arms: .* repeat"),
        ({"guidance_scales": []}, r"guidance_scales: \[\] is not possible"),
        ({"cases": toy_cases(5)}, "cases: 5 are too few"),
    ],
)
def test_impossible_sweeps_are_refused_before_anything_is_made(change, message):
    def generate(*args):
        pytest.fail("made pictures")

    sweep = {"cases": toy_cases(), "arms": ["base"], "guidance_scales": [1.0]} | change
    with pytest.raises(UserError, match=message):
        evaluate(generate, measures=toy_measures(), **sweep)


@pytest.mark.parametrize(
    ("images", "message"),
    [(torch.zeros(3, 3, 8, 8), r"generate: shape \(3, 3, 8, 8\)"), (torch.full((20, 3, 8, 8), torch.nan), "NaN")],
)
def test_broken_pictures_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        evaluate(lambda *_: images, toy_cases(20), ["base"], [1.0], toy_measures())


@pytest.mark.parametrize(("n", "seed", "message"), [(0, 0, "cases: 0"), (5, -1, "seed: -1")])
def test_impossible_cases_are_refused(n, seed, message):
    with pytest.raises(UserError, match=message):
        make_cases(n, seed)
