"""Whole commands whose screen fails: `train 2>&1 | tee log` with Ctrl-C, a log on a full disk."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import crash
import pytest
import tiny
from broken import broken_descriptor, broken_stream
from PIL import Image

from selfnpo_fast.cli import main

PROMPT = "a red handwritten seven on a yellow background"
CASE = {"ranks": 1, "zero": 0, "reference": "frozen", "mode": "continuous", "lora": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("kind", ["no reader", "full disk"])
def test_sample_and_evaluate_finish(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", broken_stream(kind))
    assert main(["sample", "--prompt", PROMPT, "--steps", "2", "--output", str(tmp_path / "drawn")]) == 0
    assert (tmp_path / "drawn" / "grid.png").exists()
    monkeypatch.setattr(sys, "stdout", broken_stream(kind))
    words = ["--images", "12", "--guidance_scales", "2", "--steps", "1", "--output", str(tmp_path / "report")]
    assert main(["evaluate", *words]) == (0 if kind == "no reader" else 1), "its result goes to standard output"
    assert (tmp_path / "report" / "report.md").exists()


def without_reader(argv, env, log):
    """A training process whose `tee` has ended, and which gets Ctrl-C in its first seconds."""
    os.environ.update(env)
    for number in (1, 2):
        os.dup2(broken_descriptor(), number)
    from selfnpo_fast import train

    with log.open("a") as file:
        code = train.main(argv)
        file.write(f"left with {code}")
    sys.exit(code)


def test_ctrl_c_where_tee_has_ended_still_saves(model, tmp_path):
    output = tmp_path / "run"
    argv = [*crash.words(CASE, model, output), "--updates", "100000", "--log.checkpoint_every", "0"]
    (process,) = crash.start(1, argv, tmp_path, without_reader)
    while not (output / "metrics.jsonl").exists() and process.is_alive():
        process.join(0.02)
    os.kill(process.pid, signal.SIGINT)
    assert crash.finish([process], tmp_path) == [0]
    assert (tmp_path / "rank0.log").read_text() == "left with 0"
    (saved,) = (output / "checkpoints").iterdir()
    assert saved.name.startswith("update-")
    assert "SIGINT: stopped after update" in (output / "train.log").read_text()


@pytest.mark.parametrize("kind", ["no reader", "full disk"])
def test_a_run_with_images_trains_and_encodes_to_its_end(kind, model, tmp_path, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 100, 200)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"picture {i}")
    monkeypatch.setattr(sys, "stderr", broken_stream(kind))
    words = ["--rollout.start", "data", "--data.source", str(images), "--data.store", str(tmp_path / "store")]
    words += ["--rollout.k", "3", "--prompts.source", "captions", "--updates", "2"]
    assert main(["train", *crash.words(CASE, model, tmp_path / "run"), *words]) == 0
    assert (tmp_path / "run" / "negative" / "unet").is_dir()
    assert len(list((tmp_path / "store").iterdir())) == 1
