"""Negatives written while a run goes on, and negatives made of checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import crash
import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from runs import CASE, at_update, run
from safetensors import safe_open
from safetensors.torch import load_file

from selfnpo_fast.cli import main
from selfnpo_fast.guidance.sampler import GuidedSampler
from selfnpo_fast.models import load_adapter
from selfnpo_fast.negatives.load import load_negative
from selfnpo_fast.runtime.errors import RunError
from selfnpo_fast.runtime.folders import write_manifest
from selfnpo_fast.training import trainer as trainer_module

SHORT = ["--updates", "3", "--log.export_every", "2", "--log.keep", "9"]
"""An export and a checkpoint at update 2, and others at the end."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("model"))


def content(path: Path) -> object:
    """The bytes of a file; of safetensors the metadata, which has no fixed order, and the bytes of
    each tensor."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        bits = {name: (t.dtype, t.shape, bytes(t.flatten().view(torch.uint8))) for name, t in tensors.items()}
        return file.metadata(), bits


def contents(folder: Path) -> dict[str, object]:
    return {str(path.relative_to(folder)): content(path) for path in folder.rglob("*") if path.is_file()}


def exported(checkpoint: Path, output: Path, *words: str) -> int:
    return main(["export", "--checkpoint", str(checkpoint), "--output", str(output), *words])


ENGINES = {
    "full weights": ({}, []),
    "bf16": ({}, ["--engine.precision", "bf16"]),
    "8 bit": ({}, ["--optimizer.name", "adamw8bit", "--engine.zero_stage", "1"]),
    "zero 3": ({"zero": 3}, []),
    "lora": ({"lora": 2}, ["--lora.alpha", "3", "--lora.targets", "[to_q, conv1]"]),
    "lora, bf16, zero 2": ({"lora": 2, "zero": 2, "reference": "frozen"}, ["--engine.precision", "bf16"]),
}
SLOW = ("8 bit", "zero 3", "lora, bf16, zero 2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ENGINES])
def test_a_checkpoint_gives_the_bytes_that_the_run_has_written(name, model, tmp_path, monkeypatch):
    changes, words = ENGINES[name]
    output, kept = tmp_path / "run", tmp_path / "kept"
    at_update(monkeypatch, 3, lambda trainer: shutil.copytree(output / "negative", kept))
    assert run(model, output, *SHORT, *words, **changes) == 0
    for update, expected in ((2, kept), (3, output / "negative")):
        assert exported(output / "checkpoints" / f"update-{update:07d}", tmp_path / str(update)) == 0
        assert contents(tmp_path / str(update)) == contents(expected)
    assert contents(kept) != contents(output / "negative"), "the run has gone on"


@pytest.mark.slow
def test_two_ranks_have_checkpoints_of_the_same_kind(model, tmp_path):
    argv = [*crash.words(CASE | {"ranks": 2, "zero": 3}, model, tmp_path / "run"), *SHORT]
    assert crash.finish(crash.start(2, argv, tmp_path), tmp_path) == [0, 0], crash.tail(tmp_path)
    assert exported(tmp_path / "run", tmp_path / "negative") == 0
    assert contents(tmp_path / "negative") == contents(tmp_path / "run" / "negative")


@pytest.mark.parametrize("changes", [{}, {"lora": 2}], ids=str)
def test_an_export_serves_while_training_goes_on(changes, model, tmp_path, monkeypatch):
    """It holds the student of that update; attach's loader and the sampler take it."""
    output, adapter, students = tmp_path / "run", load_adapter(str(model)), []

    def look(trainer) -> None:
        base = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
        negative = load_negative(base, output)
        sampler = GuidedSampler(adapter, base, negative)
        assert len(sampler(["a cat"], steps=2, output="latent").images) == 1
        found = [load_file(path) for path in (output / "negative").rglob("*.safetensors")]
        assert len(found) == 1
        for name, weight in students[-1].items():
            key = name if not changes else "unet." + name.replace(".default.", ".")
            assert torch.equal(found[0][key], weight), name
        assert not list(output.glob(".*-negative*")), "nothing half written"

    at_update(monkeypatch, 2, lambda t: students.append({n: p.detach().clone() for n, p in t.engine.trainable}))
    at_update(monkeypatch, 3, look)
    grids = ["--log.sample_every", "0", "--log.sample_prompts", "1", "--log.sample_steps", "1"]
    assert run(model, output, *SHORT, *grids, **changes) == 0
    pictures = sorted((output / "samples").iterdir())
    assert [path.name for path in pictures] == ["samples-000002.png", "samples-000003.png"]
    assert Image.open(pictures[0]).height > 8


def test_exports_change_no_bit_of_a_run_and_a_resumed_run_goes_on(model, tmp_path):
    plain, parts = tmp_path / "plain", tmp_path / "parts"
    assert run(model, plain, "--updates", "6") == 0
    assert run(model, parts, "--updates", "3", "--log.export_every", "2") == 0
    assert run(model, parts, "--updates", "6", "--log.export_every", "4", "--resume") == 0
    crash.assert_equal(plain, parts)


def test_an_export_that_cannot_be_written_costs_a_line(model, tmp_path, monkeypatch, capfd):
    calls, save = [], trainer_module.save_negative

    def fails_once(*arguments, **options):
        calls.append(None)
        if len(calls) == 1:
            raise RunError("negative could not be written (no room)")
        return save(*arguments, **options)

    monkeypatch.setattr(trainer_module, "save_negative", fails_once)
    assert run(model, tmp_path / "run", *SHORT) == 0
    line = "negative could not be written (no room); the export before it is untouched, training goes on"
    assert line in capfd.readouterr().err
    assert (tmp_path / "run" / "negative").is_dir()


def test_an_export_that_is_not_finite_ends_the_run_and_leaves_the_one_before(model, tmp_path, monkeypatch, capfd):
    output, kept = tmp_path / "run", []

    def spoil(trainer) -> None:
        kept.append(contents(output / "negative"))
        trainer.engine.trainable[0][1].data.view(-1)[0] = float("nan")

    at_update(monkeypatch, 3, spoil)
    assert run(model, output, *SHORT, "--log.export_every", "1", "--log.checkpoint_every", "2") == 1
    assert "not finite" in capfd.readouterr().err
    assert contents(output / "negative") == kept[0]


# What is refused


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    assert run(model, output, "--updates", "2") == 0
    return output


def refused(capfd, checkpoint: Path, output: Path, *words: str) -> str:
    """The line that refuses an export, of which nothing is written."""
    before = sorted(output.rglob("*"))
    assert exported(checkpoint, output, *words) == 2
    assert sorted(output.rglob("*")) == before
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    return line


def test_what_is_no_whole_checkpoint_is_refused(finished, tmp_path, capfd):
    assert "holds none" in refused(capfd, tmp_path / "none", tmp_path / "out")
    copy = Path(shutil.copytree(finished / "checkpoints" / "update-0000002", tmp_path / "update-0000002"))
    (copy / "student.safetensors").write_bytes(b"cut")
    assert "is not whole: student.safetensors has 3 bytes" in refused(capfd, copy, tmp_path / "out")
    (copy / "manifest.json").unlink()
    write_manifest(copy)
    assert "student.safetensors is not readable" in refused(capfd, copy, tmp_path / "out")


def test_a_recipe_that_is_none_is_refused(finished, tmp_path, capfd):
    copy = Path(shutil.copytree(finished / "checkpoints" / "update-0000002", tmp_path / "update-0000002"))
    state = json.loads((copy / "state.json").read_text())
    for key, value in (("lora", {"rank": "many"}), ("lora", {"rank": 2}), ("model", {"path": 1, "weights": 2})):
        (copy / "state.json").write_text(json.dumps(state | {"config": state["config"] | {key: value}}))
        (copy / "manifest.json").unlink()
        write_manifest(copy)
        assert str(copy) in refused(capfd, copy, tmp_path / "out")


def test_another_base_and_a_folder_that_holds_something_are_refused(finished, model, tmp_path, capfd):
    other = tiny.write_sd(tmp_path / "other", seed=1)
    assert "has other weights than the base of" in refused(capfd, finished, tmp_path / "out", "--model", str(other))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    assert "is not empty" in refused(capfd, finished, tmp_path / "full")
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    assert exported(finished, tmp_path / "negative", "--model", str(moved)) == 0
    found, expected = contents(tmp_path / "negative"), contents(finished / "negative")
    assert found.keys() == expected.keys()
    changed = {name for name in found if found[name] != expected[name]}
    assert changed == {"unet/config.json"}, "where diffusers has read it from"
