"""Whole training runs on tiny pipelines and on the embedded model: their results and refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import crash
import pytest
import tiny
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from selfnpo_fast import train
from selfnpo_fast.negatives.fingerprint import matches
from selfnpo_fast.negatives.load import load_negative
from selfnpo_fast.negatives.lora_files import read_record
from selfnpo_fast.negatives.sources import LORA_FILE, RECORD
from selfnpo_fast.negatives.weights import module_weights
from selfnpo_fast.runtime.errors import UserError
from selfnpo_kernels import Draw, NoiseKey, draw_id, randint

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
DIGITS = ROOT / "selfnpo_fast" / "assets" / "digits"


@pytest.fixture(scope="session")
def sd(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory) -> Path:
    return tiny.write_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na blue dog\ntwo birds\na red house\n")
    return path


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (80, 64), (60 * i, 100, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def run(config: str, output: Path, *words: str) -> int:
    return train.main(["--config", str(CONFIGS / config), "--output", str(output), *words])


def small(model: Path, updates: int = 2) -> list[str]:
    """Options that shrink any config to a tiny pipeline."""
    return [
        *("--model.path", str(model), "--updates", str(updates), "--engine.batch_size", "4"),
        *("--rollout.grid_steps", "5", "--rollout.pool", "2", "--log.sample_every", "-1"),
    ]


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_digits_run_leaves_all_it_should(tmp_path):
    output = tmp_path / "run"
    words = ["--updates", "6", "--engine.batch_size", "8", "--log.every", "2", "--log.sample_steps", "2"]
    assert run("digits.yaml", output, *words) == 0

    negative = UNet2DConditionModel.from_pretrained(output / "negative", subfolder="unet", use_safetensors=True)
    base = UNet2DConditionModel.from_pretrained(DIGITS, subfolder="unet")
    assert {n: p.shape for n, p in negative.named_parameters()} == {n: p.shape for n, p in base.named_parameters()}
    assert any(not torch.equal(a, b) for a, b in zip(negative.parameters(), base.parameters(), strict=True))

    rows = metrics(output)
    assert [row["update"] for row in rows] == [2, 4, 6]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 and row["pairs_per_second"] > 0 for row in rows)
    forwards = [row["reference_forwards_per_pair"] for row in rows]
    assert min(forwards[:2]) > forwards[2] == 1, "a quarter of the slots is filled in each of the first four updates"
    stored = yaml.safe_load((output / "config.yaml").read_text())
    assert stored["updates"] == 6
    assert stored["engine"]["batch_size"] == 8
    assert "negative model" in (output / "train.log").read_text()
    assert Image.open(output / "samples" / "samples-000006.png").width > 100
    assert list((output / "tensorboard").glob("events*"))
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["update-0000006"]

    again = tmp_path / "again"
    assert train.main(["--config", str(output / "config.yaml"), "--output", str(again)]) == 0
    assert metrics(again)[-1]["loss"] == rows[-1]["loss"], "the resolved config makes the same run"


def test_digits_negative_serves_in_a_stock_pipeline(tmp_path):
    output = tmp_path / "run"
    words = ["--updates", "1", "--engine.batch_size", "4", "--log.sample_every", "-1"]
    assert run("digits.yaml", output, *words) == 0
    unet = UNet2DConditionModel.from_pretrained(output / "negative", subfolder="unet")
    pipe = StableDiffusionPipeline.from_pretrained(DIGITS, unet=unet)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red handwritten seven on a yellow background", num_inference_steps=2).images[0]
    assert picture.size == (32, 32)


RECIPES = {
    "lockstep noise": ["--rollout.mode", "lockstep"],
    "lockstep noise fixed": ["--rollout.mode", "lockstep", "--rollout.stop", "fixed", "--rollout.k", "5"],
    "naive": ["--rollout.mode", "lockstep", "--rollout.noising", "naive"],
    "guided": ["--rollout.omega", "-3", "--prompts.dropout", "0.5"],
    "weighted": ["--rollout.pair_weight", "lockstep", "--rollout.k", "2", "--loss.kind", "l2"],
    "frozen": ["--reference.kind", "frozen"],
    "accumulation": ["--engine.accumulation", "2"],
    "lora": ["--lora.rank", "2"],
    "lora frozen": ["--lora.rank", "2", "--reference.kind", "frozen", "--engine.gradient_checkpointing", "true"],
    "lora, every option": [
        *["--lora.rank", "2", "--lora.targets", "[to_q, conv1]", "--engine.channels_last", "true"],
        *["--engine.gradient_checkpointing", "true", "--rollout.overlap", "true"],
    ],
    "lora fp32": ["--lora.rank", "2", "--engine.precision", "fp32", "--engine.zero_stage", "0"],
    "fp32 adamw": ["--engine.precision", "fp32", "--engine.zero_stage", "0", "--optimizer.name", "adamw"],
    "fp32 8 bit": ["--engine.precision", "fp32", "--engine.zero_stage", "0"],
    "zero 2": ["--engine.zero_stage", "2", "--optimizer.name", "adamw"],
    "zero 3": ["--engine.zero_stage", "3", "--optimizer.name", "adamw"],
    "zero 3 fp32": ["--engine.zero_stage", "3", "--optimizer.name", "adamw", "--engine.precision", "fp32"],
    "overlap": ["--rollout.overlap", "true"],
    "overlap zero 3": ["--rollout.overlap", "true", "--engine.zero_stage", "3", "--optimizer.name", "adamw"],
    "channels last": ["--engine.channels_last", "true"],
    "channels last fp32": ["--engine.channels_last", "true", "--engine.precision", "fp32", "--engine.zero_stage", "0"],
    "every second": ["--reference.every", "2"],
    "warm-up": ["--optimizer.warmup", "10", "--optimizer.clip", "0"],
}


def assert_knows_its_base(output: Path, base: UNet2DConditionModel, path: Path, lora: bool) -> None:
    """The result of a run is taken for a negative of its base, and of nothing else."""
    part = output / "negative"
    if lora:
        record = read_record(part / LORA_FILE, "negative")
        assert load_negative(base, output).deltas
    else:
        record = json.loads((part / RECORD).read_text())
        assert load_negative(base, output).network is not None
        with pytest.raises(UserError, match=f"was trained from {path}, and the positive model has other weights"):
            load_negative(tiny.unet(), output)
    assert record["path"] == str(path)
    assert matches(record["fingerprint"], module_weights(base, "the base"))
    assert not matches(record["fingerprint"], module_weights(tiny.unet(), "another"))


SLOW_RECIPES = ("warm-up", "every second", "channels last", "accumulation", "lora frozen", "frozen", "weighted")
SLOW_RECIPES += ("lockstep noise", "lockstep noise fixed", "naive", "fp32 adamw", "fp32 8 bit", "zero 2", "zero 3")
SLOW_RECIPES += ("overlap zero 3", "channels last fp32", "lora fp32")


def test_the_base_of_a_lora_runs_samples_is_the_base(sd, prompts, tmp_path, monkeypatch):
    """With LoRA it is the network without low-rank weights, otherwise one that is loaded again."""
    shown = []
    grid = lambda images, *_: shown.append(images) or Image.new("RGB", (1, 1))  # noqa: E731
    monkeypatch.setattr("selfnpo_fast.training.samples.image_grid", grid)
    for name in ("lora", "fp32 adamw"):
        words = [*small(sd, 4), "--prompts.source", str(prompts), "--optimizer.lr", "1e-2", *RECIPES["fp32 adamw"]]
        words += ["--log.sample_every", "0", "--log.sample_steps", "2", "--log.sample_prompts", "2", *RECIPES[name]]
        assert run("sd15.yaml", tmp_path / name, *words) == 0
    (base, worse), (expected, _) = (images.chunk(2) for images in shown)
    torch.testing.assert_close(base, expected, rtol=0, atol=1e-5)
    assert (worse - base).abs().max() > 1e-2


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW_RECIPES else n for n in RECIPES])
def test_every_choice_trains(name, sd, prompts, tmp_path):
    """The recommended config with one choice changed gives finite losses and a model that moved."""
    output = tmp_path / "run"
    words = [*small(sd), "--prompts.source", str(prompts), "--optimizer.lr", "1e-2"]
    assert run("sd15.yaml", output, *words, *RECIPES[name]) == 0
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in metrics(output))
    if "lora" in name:
        pipe = StableDiffusionPipeline.from_pretrained(sd)
        pipe.load_lora_weights(output / "negative")
        moved = [p for n, p in pipe.unet.named_parameters() if "lora_B" in n]
        assert moved
        assert any(p.abs().max() > 0 for p in moved)
        assert_knows_its_base(output, UNet2DConditionModel.from_pretrained(sd, subfolder="unet"), sd, lora=True)
        return
    base = UNet2DConditionModel.from_pretrained(sd, subfolder="unet")
    assert_knows_its_base(output, base, sd, lora=False)
    negative = UNet2DConditionModel.from_pretrained(output / "negative", subfolder="unet")
    difference = [(a - b).abs().max() for a, b in zip(negative.parameters(), base.parameters(), strict=True)]
    assert max(difference) > 1e-3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_authors_config_trains_on_images(prediction_type, images, tmp_path):
    model = tiny.write_sd(tmp_path / "model", prediction_type)
    output = tmp_path / "run"
    words = ["--data.source", str(images), "--engine.precision", "fp32", "--rollout.k", "2"]
    assert run("sd15_paper.yaml", output, *small(model), *words) == 0
    # At w = -1 each of the eight samples of two updates costs its steps, at most k, and one more.
    start = randint(NoiseKey(0, torch.arange(8), draw_id(Draw.START_INDEX)), 5)
    expected = ((start + 1).clamp(max=2) + 1).float().mean().item()
    assert metrics(output)[-1]["reference_forwards_per_pair"] == expected


def test_the_recommended_config_needs_only_a_model(sd, tmp_path):
    output = tmp_path / "run"
    words = ["--prompts.limit", "32"]
    assert run("sd15.yaml", output, *small(sd), *words) == 0
    assert metrics(output)[-1]["loss"] > 0


def test_sdxl_trains(sdxl, prompts, tmp_path):
    output = tmp_path / "run"
    words = ["--prompts.source", str(prompts), "--rollout.omega", "-5"]
    assert run("sd15.yaml", output, *small(sdxl), *words) == 0
    assert metrics(output)[-1]["loss"] > 0


RESUMED = {
    "plain": ["--engine.precision", "fp32", "--engine.zero_stage", "0", "--optimizer.name", "adamw"],
    "lockstep, 8 bit": ["--engine.precision", "fp32", "--engine.zero_stage", "0", "--rollout.mode", "lockstep"],
    "lora, zero 2": ["--engine.precision", "fp32", "--engine.zero_stage", "2", "--lora.rank", "2"],
    "bf16": ["--optimizer.name", "adamw"],
    "bf16, 8 bit, frozen": ["--reference.kind", "frozen"],
    "zero 3": ["--engine.precision", "fp32", "--engine.zero_stage", "3", "--optimizer.name", "adamw"],
    "bf16, zero 3": ["--engine.zero_stage", "3", "--optimizer.name", "adamw"],
}


SLOW = ("bf16", "bf16, 8 bit, frozen", "zero 3", "bf16, zero 3")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RESUMED])
def test_a_resumed_run_ends_like_an_uninterrupted_one(name, sd, prompts, tmp_path):
    words = ["--prompts.source", str(prompts), "--optimizer.lr", "1e-2", "--optimizer.warmup", "5", *RESUMED[name]]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("sd15.yaml", whole, *small(sd, 6), *words) == 0
    assert run("sd15.yaml", parts, *small(sd, 3), *words) == 0
    assert run("sd15.yaml", parts, *small(sd, 6), *words, "--resume") == 0
    name = "checkpoints/update-0000006/student.safetensors"
    expected, found = load_file(whole / name), load_file(parts / name)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.slow
def test_a_folder_that_is_not_empty_is_refused(sd, prompts, tmp_path, capsys):
    output = tmp_path / "run"
    words = [*small(sd), "--prompts.source", str(prompts)]
    assert run("sd15.yaml", output, *words) == 0
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    capsys.readouterr()
    assert run("sd15.yaml", output, *words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert run("sd15.yaml", output, *words, "--overwrite") == 0
    assert len(metrics(output)) == 1


def test_overwrite_deletes_nothing_that_a_run_did_not_write(sd, prompts, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    words = [*small(sd), "--prompts.source", str(prompts), "--overwrite"]
    assert run("sd15.yaml", output, *words) == 2
    assert "precious.txt" in capsys.readouterr().err
    assert (output / "precious.txt").read_text() == "mine"


def test_resuming_another_recipe_names_the_field(sd, prompts, tmp_path, capsys):
    output = tmp_path / "run"
    words = [*small(sd), "--prompts.source", str(prompts)]
    assert run("sd15.yaml", output, *words) == 0
    stored = (output / "config.yaml").read_text()
    for change in (["--seed", "9"], ["--rollout.omega", "3"], ["--rollout.mode", "lockstep"]):
        capsys.readouterr()
        assert run("sd15.yaml", output, *words, *change, "--resume") == 2
        assert change[0].removeprefix("--") in capsys.readouterr().err
    assert (output / "config.yaml").read_text() == stored


def clipping(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"clip_sample": false', '"clip_sample": true'))


def broken_weights(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def unknown_prediction(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"epsilon"', '"flow"'))


def no_pipeline(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def other_family(folder: Path) -> None:
    path = folder / "model_index.json"
    path.write_text(path.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_weights, "cannot load unet"),
        (unknown_prediction, "prediction_type: 'flow'"),
        (clipping, "clip_sample"),
        (no_pipeline, "is no diffusers pipeline"),
        (other_family, "FluxPipeline"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_broken_models_get_one_line(damage, message, sd, prompts, tmp_path, capsys):
    model, output = tmp_path / "model", tmp_path / "run"
    shutil.copytree(sd, model)
    damage(model)
    assert run("sd15.yaml", output, *small(model), "--prompts.source", str(prompts)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("error: ")
    assert "\n" not in error
    assert not output.exists()


BAD_OPTIONS = {
    "rollout.grid": ["--rollout.grid", "5"],
    "rollout.k": ["--rollout.k", "26"],
    "rollout.k: 5": ["--rollout.k", "5"],
    "rollout.grid_steps": ["--rollout.grid_steps", "7", "--rollout.k", "7"],
    "rollout.mode": ["--rollout.mode", "sideways"],
    "loss.c": ["--loss.c", "-1"],
    "optimizer.lr": ["--optimizer.lr", "fast"],
    "reference.decay": ["--reference.decay", "1.5"],
    "prompts.dropout": ["--prompts.dropout", "2"],
    "engine.zero_stage": ["--engine.zero_stage", "4"],
    "lora.rank": ["--engine.zero_stage", "3", "--lora.rank", "2"],
    "rollout.pair_weight": ["--rollout.mode", "lockstep", "--rollout.pair_weight", "lockstep"],
    "engine.batch_size": ["--engine.batch_size", "3", "--engine.accumulation", "2"],
    "updates": ["--updates", "0"],
    "data.source": ["--rollout.start", "data"],
    "prompts: no such file": ["--prompts.source", "nowhere.txt"],
    "--resume": ["--resume", "--overwrite"],
    "log.sample_steps": ["--log.sample_steps", "1000"],
    "output": ["--output", "~nosuchuser/run"],
    "reference.every": ["--reference.every", "0"],
    "rollout.branches": ["--rollout.branches", "both"],
    "engine.compile": ["--engine.compile", "yes"],
    "lora.targets": ["--lora.rank", "2", "--lora.targets", "[nothing]"],
}


@pytest.mark.parametrize("field", BAD_OPTIONS)
def test_bad_options_get_one_line_that_names_the_field(field, tmp_path, capsys):
    output = tmp_path / "run"
    assert run("digits.yaml", output, *BAD_OPTIONS[field]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert field in error
    assert not output.exists()


def test_an_unknown_key_in_a_config_file_is_named(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("rollout:\n  speed: 3\n")
    assert train.main(["--config", str(path), "--output", str(tmp_path / "run")]) == 2
    assert "speed" in capsys.readouterr().err


def test_the_authors_config_without_images_names_the_other_one(tmp_path, capsys):
    assert run("sd15_paper.yaml", tmp_path / "run") == 2
    error = capsys.readouterr().err.strip()
    assert "sd15.yaml" in error
    assert "\n" not in error


@pytest.mark.parametrize(("content", "message"), [(b"", "prompt"), (b"\n  \n", "prompt"), (b"good\nb\xffd\n", "UTF-8")])
def test_bad_prompt_files_get_one_line(content, message, tmp_path, capsys):
    path, output = tmp_path / "prompts.txt", tmp_path / "run"
    path.write_bytes(content)
    assert run("digits.yaml", output, "--prompts.source", str(path)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not output.exists()


def launch(module: list[str], output: Path, *words: str) -> subprocess.CompletedProcess:
    command = [*module, "--config", str(CONFIGS / "digits.yaml"), "--output", str(output), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "overlap"), [("0", "false"), ("2", "true")])
def test_two_ranks_train_like_one(stage, overlap, tmp_path):
    """`deepspeed --num_gpus 2` on CPU: equal pairs, losses to rounding, weights to Adam's signs."""
    words = ["--updates", "4", "--engine.batch_size", "8", "--log.every", "1", "--log.sample_every", "-1"]
    words += ["--rollout.overlap", overlap]
    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--master_port", str(crash.free_port())]
    two = launch([*deepspeed, "--num_gpus", "2", "selfnpo_fast/train.py"], tmp_path / "two", *words,
                 "--engine.zero_stage", stage)  # fmt: skip
    assert two.returncode == 0, two.stderr[-3000:]
    assert run("digits.yaml", tmp_path / "one", *words) == 0
    pairs = list(zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True))
    assert len(pairs) == 4
    for one, both in pairs:
        assert both["loss"] == pytest.approx(one["loss"], rel=2e-4)
        assert both["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-3)
    name = "unet/diffusion_pytorch_model.safetensors"
    base, one, both = (load_file(p / name) for p in (DIGITS, tmp_path / "one/negative", tmp_path / "two/negative"))
    # Adam's first steps are signs, which rounding flips where a gradient is about zero: bound the
    # bulk, not the worst.
    moved = sum((one[key] - base[key]).abs().sum() for key in base)
    apart = sum((one[key] - both[key]).abs().sum() for key in base)
    assert apart < 0.02 * moved
