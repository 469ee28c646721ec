"""The `selfnpo` command in process: what it writes, and how it refuses bad words.

A refusal is one line and exit code 2, and nothing is written.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from selfnpo_fast.cli import main
from selfnpo_fast.commands.evaluate import EvaluateOptions
from selfnpo_fast.commands.sample import SampleOptions
from selfnpo_fast.guidance.sampler import GuidedSampler, SamplerConfig, start_noise
from selfnpo_fast.models import load_adapter
from selfnpo_fast.runtime.options import parse_options
from selfnpo_fast.scoring.digits.cases import make_cases
from selfnpo_fast.scoring.digits.domain import DIGITS_DIR
from selfnpo_fast.scoring.digits.measures import digits_measures
from selfnpo_fast.scoring.digits.scorer import FittedScorer

ROOT = Path(__file__).parents[2]
PROMPT = "a red handwritten seven on a yellow background"
REPORT = {"report.json", "report.md", "frontier.png", "accuracy.png", "grid.png"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def negative(tmp_path_factory) -> Path:
    """The output folder of a run: the digits denoiser with disturbed weights."""
    run = tmp_path_factory.mktemp("runs") / "disturbed"
    unet = UNet2DConditionModel.from_pretrained(DIGITS_DIR, subfolder="unet")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    unet.save_pretrained(run / "negative" / "unet")
    return run


@pytest.fixture(scope="module")
def misfit(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("misfit")
    tiny.unet().save_pretrained(run / "negative" / "unet")
    return run


def sample(output: Path, *words: object) -> int:
    return main(["sample", "--output", str(output), "--steps", "2", *map(str, words)])


def evaluate(output: Path, *words: object) -> int:
    options = ["--images", "12", "--guidance_scales", "1", "2", "--steps", "2"]
    return main(["evaluate", "--output", str(output), *options, *map(str, words)])


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_sample_draws_what_the_stock_pipeline_draws(tmp_path, capsys):
    words = ["--prompt", PROMPT, "--images_per_prompt", 3, "--seed", 5, "--guidance_scale", 2.5]
    assert sample(tmp_path, *words) == 0
    names = ["0000-seed5.png", "0001-seed6.png", "0002-seed7.png"]
    assert contents(tmp_path) == {*names, "grid.png"}
    assert str(tmp_path / "grid.png") in capsys.readouterr().out

    pipe = StableDiffusionPipeline.from_pretrained(DIGITS_DIR)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    latents = start_noise([5, 6, 7], (4, 8, 8), CPU)
    pictures = pipe([PROMPT] * 3, num_inference_steps=2, guidance_scale=2.5, latents=latents).images
    for name, picture in zip(names, pictures, strict=True):
        ours = pixels(tmp_path / name)
        assert ours.shape == (32, 32, 3)
        assert abs(ours - np.asarray(picture)).max() <= 1
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width > 2 * grid.height, "three pictures side by side"


def test_sample_from_a_file_with_a_negative(tmp_path, negative):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\na teal handwritten two on a white background\na third that is one too many\n")
    common = ["--prompts", prompts, "--limit", 2, "--guidance_scale", 3]
    for name, words in {"with": ["--negative", negative], "again": ["--negative", negative], "plain": []}.items():
        assert sample(tmp_path / name, *common, *words, "--batch_size", 1 if name == "again" else 16) == 0
        assert contents(tmp_path / name) == {"0000-seed0.png", "0001-seed1.png", "grid.png"}
    for name in ("0000-seed0.png", "0001-seed1.png"):
        ours = pixels(tmp_path / "with" / name)
        assert abs(ours - pixels(tmp_path / "again" / name)).max() <= 1
        assert abs(ours - pixels(tmp_path / "plain" / name)).max() > 20


def test_guidance_outside_of_every_step_is_none(tmp_path, negative):
    common = ["--prompt", PROMPT, "--negative", negative]
    empty = ["--guidance_interval", 0.4, 0.6]  # holds neither of the two steps
    for name, words in {"interval": empty, "scale 1": ["--guidance_scale", 1], "guided": []}.items():
        assert sample(tmp_path / name, *common, *words) == 0
    drawn = {name: pixels(tmp_path / name / "0000-seed0.png") for name in ("interval", "scale 1", "guided")}
    assert abs(drawn["interval"] - drawn["scale 1"]).max() <= 1
    assert abs(drawn["interval"] - drawn["guided"]).max() > 20


def test_no_name_leaves_the_output_folder(tmp_path):
    """The name of a prompt file, a prompt or a negative never becomes a path that is written."""
    prompts = tmp_path / "in" / "..%2f..%2fprompts.txt"
    prompts.parent.mkdir()
    prompts.write_text("../../escaped\n/tmp/escaped\n..\\escaped\n")
    before = {path for path in tmp_path.rglob("*")}
    output = tmp_path / "out" / ".." / "out"
    assert sample(output, "--prompts", prompts, "--steps", 1) == 0
    new = {path for path in tmp_path.rglob("*")} - before - {tmp_path / "out"}
    assert {path.parent for path in new} == {tmp_path / "out"}
    assert {path.name for path in new} == {"grid.png", *(f"{i:04d}-seed{i}.png" for i in range(3))}


def test_sample_seed_and_resolution(tmp_path):
    """Another seed gives another picture; the same seed at another index gives the same picture."""
    assert sample(tmp_path / "a", "--prompt", PROMPT, "--seed", 3, "--images_per_prompt", 2) == 0
    assert sample(tmp_path / "b", "--prompt", PROMPT, "--seed", 4) == 0
    third, fourth = (pixels(tmp_path / "a" / f"000{i}-seed{i + 3}.png") for i in (0, 1))
    assert abs(fourth - pixels(tmp_path / "b" / "0000-seed4.png")).max() <= 1
    assert abs(fourth - third).max() > 20
    assert sample(tmp_path / "large", "--prompt", PROMPT, "--resolution", 48, "--guidance_scale", 1) == 0
    assert pixels(tmp_path / "large" / "0000-seed0.png").shape == (48, 48, 3)


def read_report(folder: Path) -> dict:
    assert contents(folder) == REPORT
    for name in REPORT:
        if name.endswith(".png"):
            assert min(Image.open(folder / name).size) > 100, name
    # NaN and Infinity are no JSON, but Python's reader takes them.
    return json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)


def test_evaluate_plain_guidance(tmp_path, capsys):
    assert evaluate(tmp_path, "--seed", 3) == 0
    report = read_report(tmp_path)
    assert [(row["arm"], row["guidance_scale"], row["images"]) for row in report["rows"]] == [
        ("base", 1, 12),
        ("base", 2, 12),
    ]
    assert report["comparisons"] == []
    assert report["config"]["seed"] == 3
    out = capsys.readouterr().out
    assert str(tmp_path / "grid.png") in out
    assert str(tmp_path / "report.md") in out

    adapter, cases = load_adapter("digits"), make_cases(12, 3)
    rows = adapter.encode_prompts([case.prompt for case in cases], CPU)
    denoiser, empty = adapter.load_denoiser(torch.float32), adapter.encode_empty(CPU)
    for row in report["rows"]:
        config = SamplerConfig(steps=2, guidance_scale=row["guidance_scale"])
        images = GuidedSampler(adapter, denoiser).images(rows, empty, [case.seed for case in cases], config)
        scores = digits_measures(FittedScorer.load()).score(images, [case.prompt for case in cases])
        for measure in ("digit_log_prob", "digit_correct", "colour_match", "realness"):
            expected = scores[measure].float().mean().item()
            assert row["means"][measure]["value"] == pytest.approx(expected, abs=1e-3), measure


def test_evaluate_holds_negatives_against_plain_guidance(tmp_path, negative, capsys):
    prompts = ["--negative_prompt", "empty", "same"]
    assert evaluate(tmp_path, "--negative", negative, *prompts, "--brief") == 0
    report = read_report(tmp_path)
    arms = ["base", "base + negative", "base + negative, same prompt"]
    assert [(row["arm"], row["guidance_scale"]) for row in report["rows"]] == [(arm, s) for arm in arms for s in (1, 2)]
    pairs = {(c["arm"], c["guidance_scale"], c["baseline_guidance_scale"]) for c in report["comparisons"]}
    assert pairs == {(arm, a, b) for arm in arms[1:] for a in (1, 2) for b in (1, 2)}
    rows = {(row["arm"], row["guidance_scale"]): row["means"] for row in report["rows"]}
    for arm in arms[1:]:
        # At guidance_scale 1 the negative is not asked; at 2 it is.
        assert rows[arm, 1] == rows["base", 1]
        assert rows[arm, 2] != rows["base", 2]
    for comparison in report["comparisons"]:
        if comparison["guidance_scale"] == comparison["baseline_guidance_scale"] == 1:
            assert {win["value"] for win in comparison["wins"].values()} == {0.5}
    assert "report.md" not in capsys.readouterr().out


DRAW = ["sample", "--prompt", PROMPT]
MISTAKES = {
    "no prompt": (["sample"], "prompt: give either"),
    "two prompts": ([*DRAW, "--prompts", "digits"], "prompt: give either"),
    "no such prompts": (["sample", "--prompts", "{folder}/none.txt"], "prompts: .*none.txt"),
    "prompts not UTF-8": (["sample", "--prompts", "{folder}/latin.txt"], "prompts: .*latin.txt"),
    "blank prompts": (["sample", "--prompts", "{folder}/blank.txt"], "prompts: .*blank.txt"),
    "no such model": ([*DRAW, "--model", "{folder}/none"], "model.path: no such folder"),
    "no pipeline": ([*DRAW, "--model", "{folder}"], "model.path: .* is no diffusers pipeline"),
    "no such negative": ([*DRAW, "--negative", "{folder}/none"], "negative: no such folder"),
    "nothing for a negative": ([*DRAW, "--negative", "{folder}"], "negative: .* holds neither"),
    "no name for a negative": ([*DRAW, "--negative", ""], "negative: "),
    "negative of other shapes": ([*DRAW, "--negative", "{misfit}"], "negative: .* does not fit the model"),
    "steps 0": ([*DRAW, "--steps", "0"], "steps: 0 is not possible"),
    "steps beyond the schedule": ([*DRAW, "--steps", "1001"], "steps: 1001 "),
    "scale below 0": ([*DRAW, "--guidance_scale", "-0.5"], "guidance_scale: -0.5 is not possible"),
    "prompt too long": (["sample", "--prompt", "x" * 10_001], "prompt: entry 0 has 10,001 characters"),
    "scale nan": ([*DRAW, "--guidance_scale", "nan"], ".*guidance_scale.*nan"),
    "too many images": ([*DRAW, "--images_per_prompt", str(10**9)], "images_per_prompt: 1000000000 is not possible"),
    "no images": ([*DRAW, "--images_per_prompt", "0"], "images_per_prompt: 0 is not possible"),
    "huge seed": ([*DRAW, "--seed", str(2**63)], "seed: "),
    "resolution no multiple": ([*DRAW, "--resolution", "30"], "model.resolution: 30 is no multiple of 4"),
    "resolution 0": ([*DRAW, "--resolution", "0"], "model.resolution: 0 "),
    "interval the wrong way": ([*DRAW, "--guidance_interval", "0.8", "0.2"], "guidance_interval: "),
    "half an interval": ([*DRAW, "--guidance_interval", "0.8"], "guidance_interval: "),
    "rescale above 1": ([*DRAW, "--guidance_rescale", "2"], "guidance_rescale: 2"),
    "alpha above 1": ([*DRAW, "--negative", "{negative}", "--alpha", "2"], "alpha: 2"),
    "alpha without a base": ([*DRAW, "--negative", "{negative}", "--alpha", "0.5"], "alpha: 0.5 needs the base"),
    "the model itself": ([*DRAW, "--negative", str(DIGITS_DIR)], "negative: .* equals the positive model"),
    "unknown solver": ([*DRAW, "--solver", "heun"], ".*solver"),
    "not a number": ([*DRAW, "--steps", "many"], ".*steps"),
    "unknown option": ([*DRAW, "--colour", "red"], ".*--colour"),
    "unknown command": (["paint"], "unknown command 'paint'; expected one of train, doctor, sample, evaluate"),
    "evaluate: no such negative": (["evaluate", "--negative", "{folder}/none"], "negative: no such folder"),
    "evaluate: other shapes": (["evaluate", "--negative", "{misfit}"], "negative: .* does not fit"),
    "evaluate: one negative twice": (["evaluate", "--negative", "{negative}", "{negative}"], "negative: "),
    "evaluate: scale below 1": (["evaluate", "--guidance_scales", "2", "0.5"], "guidance_scales: 0.5"),
    "evaluate: scale nan": (["evaluate", "--guidance_scales", "nan"], ".*guidance_scales"),
    "evaluate: a scale twice": (["evaluate", "--guidance_scales", "2", "2"], "guidance_scales: "),
    "evaluate: no scale": (["evaluate", "--guidance_scales"], "argument --guidance_scales"),
    "evaluate: too few images": (["evaluate", "--images", "3"], "cases: 3 are too few"),
    "evaluate: huge seed": (["evaluate", "--seed", str(2**63)], "seed: 9223372036854775808 is not possible"),
    "evaluate: the last seed is too large": (["evaluate", "--seed", str(2**62)], "seed: 4611686018427387904 is"),
    "evaluate: negative seed": (["evaluate", "--seed", "-1"], "seed: -1 is not possible; expected an integer from 0"),
    "evaluate: unknown option": (["evaluate", "--colour", "red"], ".*--colour"),
}


@pytest.mark.parametrize(("words", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, monkeypatch, capfd, negative, misfit, words, expected):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "blank.txt").write_text("\n\n")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    paths = {"{folder}": tmp_path, "{misfit}": misfit, "{negative}": negative}
    for name, path in paths.items():
        words = [word.replace(name, str(path)) for word in words]
    command = words if words[0] == "paint" else [*words, "--output", str(tmp_path / "out")]
    assert main(command) == 2
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert re.match(f"error: {expected}", lines[0]), err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", [DRAW, ["evaluate"]], ids=["sample", "evaluate"])
def test_a_file_for_the_output_folder_is_refused_before_any_work(tmp_path, monkeypatch, capfd, command):
    output = tmp_path / "file"
    output.write_text("mine")
    monkeypatch.setattr(GuidedSampler, "images", lambda *args: pytest.fail("drew pictures first"))
    assert main([*command, "--output", str(output)]) == 2
    assert capfd.readouterr().err == f"error: output: {output} is a file; name a folder\n"
    assert output.read_text() == "mine"


@pytest.mark.parametrize("command", [[*DRAW, "--guidance_scale"], ["evaluate", "--images", "12", "--guidance_scales"]])
def test_numbers_that_are_not_finite_are_no_pictures(tmp_path, capfd, command):
    assert main([*command, "1e38", "--steps", "3", "--output", str(tmp_path / "out")]) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert re.match(r"error: latents: \d+ of \d+ are not finite at guidance_scale 1e\+38", line)
    assert not (tmp_path / "out").exists()


def test_a_distilled_models_scale_of_0_is_the_positive_alone(tmp_path):
    for scale in (0, 1):
        assert sample(tmp_path / str(scale), "--prompt", PROMPT, "--guidance_scale", scale) == 0
    zero, one = (Image.open(tmp_path / str(scale) / "0000-seed0.png") for scale in (0, 1))
    assert zero.tobytes() == one.tobytes()


def test_the_models_own_scheduler_is_a_solver(tmp_path):
    """That of the digits is DDIM."""
    drawn = {}
    for solver in ("own", "ddim", "euler"):
        assert sample(tmp_path / solver, "--prompt", PROMPT, "--solver", solver) == 0
        drawn[solver] = Image.open(tmp_path / solver / "0000-seed0.png").tobytes()
    assert drawn["own"] == drawn["ddim"] != drawn["euler"]


MERGE, EXPORT = ["merge", "--base", "digits", "--negative", "none"], ["export", "--checkpoint", "none"]


@pytest.mark.parametrize("words", [DRAW, ["evaluate"], MERGE, EXPORT])
def test_an_output_without_a_name_is_refused(words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--output", " "]) == 2
    assert capfd.readouterr().err == "error: output: no name is given; name a folder\n"
    assert contents(tmp_path) == set()


@pytest.mark.parametrize("seed", [-1, 2**63, 2**80])
def test_correlate_refuses_seeds_before_it_reads_a_model(seed, capfd):
    assert main(["correlate", "--negative", "nowhere", "--seed", str(seed)]) == 2
    assert capfd.readouterr().err.startswith(f"error: seed: {seed} is not possible; expected 0 to 2^63 - 4")


def test_a_second_run_overwrites_file_by_file(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    for seed in (1, 1, 2):
        assert sample(tmp_path, "--prompt", PROMPT, "--seed", seed) == 0
    assert contents(tmp_path) == {"note.txt", "0000-seed1.png", "0000-seed2.png", "grid.png"}


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "usage: selfnpo COMMAND" in capsys.readouterr().out
    assert main([]) == 2
    assert "usage: selfnpo COMMAND" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["sample", "--help"])
    assert caught.value.code == 0
    assert "omega + 1" in capsys.readouterr().out


DOCUMENTED = [ROOT / "Makefile", ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def documented_commands() -> list[str]:
    """Every `selfnpo sample` and `selfnpo evaluate` line of the documentation."""
    from selfnpo_fast.cli import USAGE

    text = "\n".join([*(path.read_text() for path in DOCUMENTED), USAGE])
    return sorted({match.group(0) for match in re.finditer(r"selfnpo (sample|evaluate) --[^#\n`]+", text)})


def test_documented_commands_parse():
    commands = documented_commands()
    assert len(commands) >= 5
    kinds = {"sample": SampleOptions, "evaluate": EvaluateOptions}
    for command in commands:
        _, name, *words = shlex.split(command)
        parse_options(kinds[name], words, name)
