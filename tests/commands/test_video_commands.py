"""Commands on models of videos: .mp4 files, sizes, grids of frames, and what is refused."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import stock
import tiny
import tiny_transformers
import torch
from diffusers import CogVideoXPipeline
from PIL import Image

from selfnpo_fast import GuidedSampler
from selfnpo_fast.cli import main
from selfnpo_fast.data.prompts import read_prompts
from selfnpo_fast.models import text
from selfnpo_fast.runtime.images import to_pil
from selfnpo_fast.runtime.videos import write_mp4

SIZE = ["--height", "32", "--width", "64", "--frames", "9"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "cogvideox": tiny_transformers.write_cogvideox(root / "cogvideox"),
        "wan": tiny_transformers.write_wan(root / "wan"),
        "sd": tiny.write_sd(root / "sd"),
    }


@pytest.fixture(scope="module")
def negative(models, tmp_path_factory) -> Path:
    """A run's folder with a LoRA of the CogVideoX."""
    folder = tmp_path_factory.mktemp("run") / "negative"
    pipe = CogVideoXPipeline.from_pretrained(models["cogvideox"])
    deltas = {path: delta for path, delta in stock.low_rank(pipe.transformer).items() if ".to_" in path}
    layers = {}
    for path, delta in deltas.items():
        layers[f"{path}.lora_A.weight"] = delta.down.contiguous()
        layers[f"{path}.lora_B.weight"] = delta.scale * delta.up
    CogVideoXPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder.parent


def sample(model: Path, output: Path, *more: object) -> int:
    words = ["--steps", 3, "--prompt", "a cat", "--output", output]
    return main(["sample", "--model", str(model), *map(str, words), *map(str, more)])


def frames_of(path: Path):
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.to_image() for frame in container.decode(stream)], stream.average_rate


def pixels(picture: Image.Image) -> torch.Tensor:
    return torch.tensor(bytearray(picture.tobytes())).int()


def test_videos_are_those_of_the_sampler(models, negative, tmp_path, monkeypatch):
    loaded, real = [], text.text_pipeline
    monkeypatch.setattr(text, "text_pipeline", lambda *args: loaded.append(1) or real(*args))
    written: dict[str, torch.Tensor] = {}

    def write(frames, path, *, fps):
        written[path.name] = frames
        write_mp4(frames, path, fps=fps)

    monkeypatch.setattr("selfnpo_fast.runtime.videos.write_mp4", write)
    more = ["--negative", negative, "--images_per_prompt", 2, "--use_dynamic_cfg", "--solver", "own", "--vae_slicing"]
    assert sample(models["cogvideox"], tmp_path / "out", *SIZE, *more) == 0
    assert loaded == [1], "text encoders for prompts and the empty prompt"
    names = ["0000-seed0.mp4", "0001-seed1.mp4"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "grid.png"]
    sampler = GuidedSampler.from_pipeline(CogVideoXPipeline.from_pretrained(models["cogvideox"]), negative)
    options = {"height": 32, "width": 64, "frames": 9, "steps": 3, "guidance_scale": 3.0, "output": "pt"}
    drawn = sampler(["a cat"] * 2, seeds=0, use_dynamic_cfg=True, **options).images
    assert (drawn - sampler(["a cat"] * 2, seeds=0, **options).images).abs().max() > 1e-2
    for name, video in zip(names, drawn, strict=True):
        torch.testing.assert_close(written[name], video, rtol=0, atol=1e-4)
        found, rate = frames_of(tmp_path / "out" / name)
        assert (len(found), rate, found[0].size) == (9, 8, (64, 32))
    # Two videos, each a row of six of their nine frames, enlarged twice.
    assert Image.open(tmp_path / "out" / "grid.png").width == 6 * (128 + 16)


def test_frames_per_second_are_the_familys_or_those_asked_for(models, tmp_path):
    assert sample(models["wan"], tmp_path / "a", *SIZE) == 0
    assert sample(models["wan"], tmp_path / "b", *SIZE, "--fps", 24) == 0
    assert [frames_of(tmp_path / name / "0000-seed0.mp4")[1] for name in ("a", "b")] == [16, 24]


def test_a_video_of_one_frame_is_a_picture(models, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else find(name))
    assert sample(models["wan"], tmp_path / "out", *SIZE[:-1], 1) == 0
    assert Image.open(tmp_path / "out" / "0000-seed0.png").size == (64, 32)


MISTAKES = {
    "frames": ("wan", [*SIZE[:-1], "8"], r"model\.frames: 8 is not possible; expected 1 and .* 4; the next is 9$"),
    "frames of 8": ("cogvideox", [*SIZE[:-1], "5"], r"model\.frames: 5 is not .* 8; the next is 9$"),
    "height": ("wan", ["--height", "40", "--width", "64"], r"model\.height: 40 is no multiple of 16 .* next is 48$"),
    "one side": ("wan", ["--height", "32"], r"model\.width: missing beside model\.height"),
    "both": ("wan", [*SIZE, "--resolution", "32"], r"model\.height: 32 is given beside model\.resolution"),
    "pictures": ("sd", ["--frames", "9"], r"model\.frames: 9 is not possible; .* draws pictures, of 1 frame"),
    "pictures' fps": ("sd", ["--fps", "9"], r"fps: 9 is given, and .* draws pictures; leave it out$"),
    "fps": ("wan", [*SIZE, "--fps", "0"], r"fps: 0(\.0)? is not possible; expected frames per second, 1 to 240"),
    "batch": ("wan", [*SIZE, "--batch_size", "0"], "batch_size: 0 is not possible"),
}


@pytest.mark.parametrize(("model", "words", "line"), MISTAKES.values(), ids=MISTAKES)
def test_what_is_not_possible_is_one_line_and_writes_nothing(models, tmp_path, capfd, model, words, line):
    assert sample(models[model], tmp_path / "out", *words) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and re.match(f"error: {line}", lines[0]), lines
    assert not (tmp_path / "out").exists()


def test_without_av_nothing_is_drawn(models, tmp_path, monkeypatch, capfd):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else find(name))
    assert sample(models["wan"], tmp_path / "out", *SIZE) == 2
    assert re.match(r"error: av: .* pip install 'selfnpo-fast\[video\]', or give --frames 1", capfd.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_pictures_alone_are_evaluated(models, tmp_path, capfd):
    words = ["evaluate", "--model", str(models["cogvideox"]), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert re.match("error: model: .* draws videos, and pictures are scored", capfd.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_correlations_are_measured_at_a_size(models, negative, capsys, monkeypatch):
    loaded, real = [], text.text_pipeline
    monkeypatch.setattr(text, "text_pipeline", lambda *args: loaded.append(1) or real(*args))
    words = ["correlate", "--model", models["cogvideox"], "--negative", negative, "--limit", 1, "--steps", 2]
    reports = []
    for size in ([], SIZE):
        assert main([*map(str, words), *size]) == 0
        reports.append(capsys.readouterr().out)
    assert loaded == [1, 1]
    assert all("timestep  999" in report for report in reports)
    assert reports[0] != reports[1]


def test_a_run_of_a_video_model_draws_grids_of_frames(models, tmp_path):
    """A row for each video: a prompt's of the base, then that of base + negative."""
    options = {
        "model.path": models["cogvideox"], "output": tmp_path / "run", "updates": 1,
        "prompts.source": "shipped", "prompts.limit": 2,
        "rollout.grid_steps": 2, "rollout.pool": 1, "engine.batch_size": 1, "optimizer.lr": 1e-2, "log.every": 1,
        "optimizer.warmup": 0, "log.sample_prompts": 2, "log.sample_steps": 2, "model.height": 32, "model.width": 64,
        "model.frames": 9,
    }  # fmt: skip
    assert main(["train", *(str(word) for key, value in options.items() for word in (f"--{key}", value))]) == 0
    page = Image.open(tmp_path / "run" / "samples" / "samples-000001.png")
    assert page.width == 6 * (128 + 16)
    pipe = CogVideoXPipeline.from_pretrained(models["cogvideox"])
    words = {"height": 32, "width": 64, "frames": 9, "steps": 2, "guidance_scale": 3.0, "solver": "dpm++"}
    rows = []
    for chosen in (None, tmp_path / "run"):
        sampler = GuidedSampler.from_pipeline(pipe, chosen)
        rows.append(sampler(read_prompts("shipped", limit=2), seeds=0, output="pt", **words).images)
    height = page.height // 4
    for row, (of, prompt) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
        for column, index in enumerate((0, 2, 3, 5, 6, 8)):
            left, top = column * 144 + 8, row * height + 8
            tile = page.crop((left, top, left + 128, top + 64))
            expected = to_pil(rows[of][prompt, index : index + 1], least_side=96)[0]
            found, wanted = (torch.tensor(bytearray(picture.tobytes())).int() for picture in (tile, expected))
            assert (found - wanted).abs().max() <= 1, (row, column)
