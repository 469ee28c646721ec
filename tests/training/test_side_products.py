"""Grids, TensorBoard, metrics and logs: what goes wrong with them costs a warning, not the run."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import sys
import threading
from pathlib import Path

import crash
import pytest
import tiny
import torch
from PIL import Image
from runs import CASE, at_update, run

from selfnpo_fast.guidance.sampler import GuidedSampler
from selfnpo_fast.models.sd import StableDiffusionAdapter
from selfnpo_fast.training.outputs import RunOutputs

GRIDS = ["--log.sample_every", "3", "--log.sample_prompts", "2", "--log.sample_steps", "2"]
WARNING = "the sample grid could not be drawn: "


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """A run without grids."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert run(model, output) == 0
    return output


def warnings(capfd, words: str) -> list[str]:
    """The lines of the log with these words, without the progress bar before them."""
    log = capfd.readouterr().err
    return [words + line.partition(words)[2] for line in log.splitlines() if words in line]


def test_a_model_folder_that_has_vanished_costs_the_grids_alone(model, whole, tmp_path, monkeypatch, capfd):
    moved = shutil.copytree(model, tmp_path / "model")
    at_update(monkeypatch, 1, lambda trainer: moved.rename(tmp_path / "elsewhere"))
    assert run(moved, tmp_path / "run", *GRIDS) == 0
    assert len(warnings(capfd, WARNING)) == 1, "the four grids fail alike, and one line says so"
    crash.assert_equal(whole, tmp_path / "run")
    assert not (tmp_path / "run" / "samples").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no room")])
def test_a_grid_that_does_not_fit_into_memory_leaves_the_student_in_training(
    error, model, whole, tmp_path, monkeypatch, capfd
):
    modes = []
    original, calls = GuidedSampler.latents, []

    def latents(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GuidedSampler, "latents", latents)
    at_update(monkeypatch, 4, lambda trainer: modes.append(trainer.engine.module.training))
    assert run(model, tmp_path / "run", *GRIDS) == 0
    assert warnings(capfd, WARNING) == [
        f"{WARNING}{error}; training goes on (log.sample_every: -1 draws none)",
    ]
    assert modes == [True]
    crash.assert_equal(whole, tmp_path / "run")
    grids = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert grids == ["samples-000006.png", "samples-000009.png", "samples-000012.png"], "the next ones are drawn"


def test_a_grid_under_way_gives_way_to_a_request_to_stop(model, tmp_path, monkeypatch, capfd):
    """A launcher allows its ranks 30 s, and a grid may take longer."""
    output, original = tmp_path / "run", GuidedSampler.latents

    def latents(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GuidedSampler, "latents", latents)
    assert run(model, output, *GRIDS) == 0
    log = capfd.readouterr().err
    assert f"SIGTERM: stopped after update 3; checkpoint {output}/checkpoints/update-0000003" in log
    assert WARNING not in log
    assert not (output / "samples").exists()


@pytest.mark.parametrize("changes", [{}, {"reference": "frozen"}, {"lora": 2}], ids=str)
def test_the_base_is_loaded_and_drawn_once(changes, model, tmp_path, monkeypatch):
    """A moving reference needs one copy of the base; a frozen one, and LoRA, have it."""
    loads, rows, options = [], [], []
    load, latents, made = StableDiffusionAdapter.load_denoiser, GuidedSampler.latents, GuidedSampler.__init__

    def count_load(self, *args, **kwargs):
        loads.append(None)
        return load(self, *args, **kwargs)

    def count_row(self, *args, **kwargs):
        rows.append(None)
        return latents(self, *args, **kwargs)

    def note_options(self, *args, **kwargs):
        options.append(kwargs)
        made(self, *args, **kwargs)

    monkeypatch.setattr(StableDiffusionAdapter, "load_denoiser", count_load)
    monkeypatch.setattr(GuidedSampler, "latents", count_row)
    monkeypatch.setattr(GuidedSampler, "__init__", note_options)
    assert run(model, tmp_path / "run", *GRIDS, **changes) == 0
    assert len(loads) == (1 if changes else 2), "one of them is the student"
    assert len(rows) == 1 + 4, "the base's row, and base + negative for each of four grids"
    assert all(option == {"graphs": False} for option in options), "ZeRO 3 gathers weights in each forward"


def test_the_base_of_a_late_grid_is_the_base(model, tmp_path, monkeypatch):
    """The upper row of every grid is that of a run which draws a single grid, at its end."""
    for name, reference, words in (("a", "ema", GRIDS), ("b", "frozen", [*GRIDS, "--log.sample_every", "0"])):
        assert run(model, tmp_path / name, *words, reference=reference) == 0
    (one,) = (tmp_path / "b" / "samples").iterdir()
    expected = Image.open(one)
    upper = (0, 0, expected.width, expected.height // 2)
    paths = sorted((tmp_path / "a" / "samples").iterdir())
    assert len(paths) == 4
    lower = set()
    for path in paths:
        page = Image.open(path)
        assert page.crop(upper).tobytes() == expected.crop(upper).tobytes()
        lower.add(page.crop((0, expected.height // 2, *expected.size)).tobytes())
    assert len(lower) == 4, "the negative moves on"


def test_records_that_cannot_be_written_cost_a_line_each(model, whole, tmp_path, capfd):
    output = tmp_path / "run"
    # Folders where files should be, and a file where a folder should be.
    for name in ("metrics.jsonl", "train.log"):
        (output / name).mkdir(parents=True)
    for name in ("tensorboard", "samples"):
        (output / name).write_text("no folder")
    assert run(model, output, *GRIDS, "--resume") == 0
    log = capfd.readouterr().err
    for name in ("metrics.jsonl", "train.log", "tensorboard", "samples"):
        lines = [line for line in log.splitlines() if f"{output}/{name} could not be written" in line]
        assert len(lines) == len(set(lines)) >= 1, name
    expected, found = crash.files(whole), crash.files(output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name][key]) for name, file in expected.items() for key, value in file.items())


def test_tensorboard_that_fails_on_the_way_is_given_up_without_a_traceback(model, whole, tmp_path, monkeypatch, capfd):
    output, hook = tmp_path / "run", threading.excepthook
    at_update(monkeypatch, 4, lambda trainer: shutil.rmtree(output / "tensorboard"))
    assert run(model, output) == 0
    log = capfd.readouterr().err
    assert log.count(f"{output}/tensorboard could not be written: ") == 1
    assert "Traceback" not in log
    assert threading.excepthook is hook
    crash.assert_equal(whole, output)


def test_a_row_that_does_not_fit_on_the_disk_leaves_no_half_of_itself(tmp_path, monkeypatch):
    """The kernel writes what fits, here 10 bytes of the second row."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # a file, under pytest
    outputs, path = RunOutputs(tmp_path, 0, 3), tmp_path / "metrics.jsonl"
    row = {"update": 1, "loss": 1.0, "pairs_per_second": 2.0}
    outputs.write(1, row)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        outputs.write(2, row | {"update": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    outputs.write(3, row | {"update": 3})
    outputs.close()
    assert [json.loads(line)["update"] for line in path.read_text().splitlines()] == [1, 3]


def test_rows_that_nobody_can_read_are_dropped_at_a_resume(model, whole, tmp_path):
    output = tmp_path / "run"
    assert run(model, output, "--updates", "6") == 0
    rows = [b"\xff\xfe", b"[" * 100_000, b'{"update": "many"}', b"[]", b'{"up": 1}', b'{"update": 4']
    with (output / "metrics.jsonl").open("ab") as file:
        file.write(b"\n".join(rows))
    assert run(model, output, "--resume") == 0
    crash.assert_equal(whole, output)


def _fails_on_one_rank(argv, env, log):
    """A child whose grids fail: their base on rank 1 for ZeRO 3, all of them on rank 0 else."""
    three = argv[argv.index("--engine.zero_stage") + 1] == "3"
    load, loads = StableDiffusionAdapter.load_denoiser, []

    def load_denoiser(self, *args, **kwargs):
        loads.append(None)
        if len(loads) > 1 and env["RANK"] == ("1" if three else "0"):
            raise torch.OutOfMemoryError("no room for the base")
        return load(self, *args, **kwargs)

    StableDiffusionAdapter.load_denoiser = load_denoiser
    crash.run_child(argv, env, log)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_grid_that_fails_on_one_rank_leaves_no_rank_waiting(stage, model, tmp_path):
    argv = [*crash.words(CASE | {"ranks": 2, "zero": stage}, model, tmp_path / "run"), *GRIDS]
    processes = crash.start(2, argv, tmp_path, _fails_on_one_rank)
    assert crash.finish(processes, tmp_path) == [0, 0], crash.tail(tmp_path)
    assert f"{WARNING}no room for the base; training goes on" in (tmp_path / "rank0.log").read_text()
    assert (tmp_path / "run" / "negative").is_dir()


@pytest.mark.slow
def test_with_zero_3_all_ranks_draw_the_same_grid_as_one(model, tmp_path):
    pages = []
    for ranks, stage in ((1, 0), (2, 3)):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        argv = [*crash.words(CASE | {"ranks": ranks, "zero": stage}, model, folder / "run"), *GRIDS, "--updates", "3"]
        assert crash.finish(crash.start(ranks, argv, folder), folder) == [0] * ranks, crash.tail(folder)
        pages.append(Image.open(folder / "run" / "samples" / "samples-000003.png").convert("RGB"))
    one, two = (torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).int() for page in pages)
    assert (one - two).abs().max() <= 1, "gradients of two ranks are summed in another order"
