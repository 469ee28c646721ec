"""Commands that end early keep what they have drawn: Ctrl-C, a full disk, a model that fails late."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfnpo_fast.cli import main
from selfnpo_fast.commands.drawn import DrawnPictures, digest
from selfnpo_fast.guidance.sampler import GuidedSampler
from selfnpo_fast.scoring import report

PROMPT = "a red handwritten seven on a yellow background"
FULL = OSError(errno.ENOSPC, "No space left on device")


def sample(output: Path, *words: str) -> int:
    batches = ["--images_per_prompt", "5", "--batch_size", "2"]
    return main(["sample", "--prompt", PROMPT, "--steps", "1", *batches, "--output", str(output), *words])


def evaluate(output: Path, *words: str) -> int:
    scales = ["--guidance_scales", "1", "2", "3"]
    return main(["evaluate", "--images", "12", "--steps", "1", *scales, "--output", str(output), *words])


def fail_at(monkeypatch, call: int, error: BaseException) -> list:
    """Let this call of the sampler raise; returns the list of the calls that drew something."""
    original, calls = GuidedSampler.images, []

    def images(self, *args, **more):
        if len(calls) + 1 == call:
            raise error
        calls.append(args)
        return original(self, *args, **more)

    monkeypatch.setattr(GuidedSampler, "images", images)
    return calls


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_sample_writes_each_batch_when_it_is_drawn(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        fail_at(patch, 2, KeyboardInterrupt())
        assert sample(tmp_path / "stopped") == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith("interrupted")
    assert files(tmp_path / "stopped") == {"0000-seed0.png", "0001-seed1.png"}
    assert sample(tmp_path / "whole") == 0
    assert sample(tmp_path / "at once", "--batch_size", "5") == 0
    for name in files(tmp_path / "whole"):
        pictures = [np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("whole", "at once")]
        assert abs(pictures[0] - pictures[1]).max() <= 1, name


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_full_disk_is_one_line(command, tmp_path, monkeypatch, capsys):
    def full(self, file, **more):
        Path(file).write_bytes(b"half")
        raise FULL

    monkeypatch.setattr(Image.Image, "save", full)
    assert {"sample": sample, "evaluate": evaluate}[command](tmp_path / "out") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    expected = f"error: {tmp_path / 'out'} could not be written: {FULL}; make room, or name another"
    assert [line[line.index("error") :] for line in lines] == [expected]
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in left if path.name.startswith(".") or path.read_bytes() == b"half"]


def test_an_interrupted_evaluation_goes_on_with_what_it_has_drawn(tmp_path, monkeypatch, capsys):
    assert evaluate(tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        fail_at(patch, 3, KeyboardInterrupt())
        assert evaluate(tmp_path / "report") == 130
    assert files(tmp_path / "report") == {"drawn"}
    assert "what was drawn is kept in" in capsys.readouterr().err
    # The disk is full when the report is written.
    with monkeypatch.context() as patch:
        calls = fail_at(patch, 0, KeyError())
        patch.setattr(report, "markdown", lambda *_: (_ for _ in ()).throw(FULL))
        assert evaluate(tmp_path / "report") == 1
    assert len(calls) == 1, "only the third row was drawn"
    with monkeypatch.context() as patch:
        calls = fail_at(patch, 0, KeyError())
        assert evaluate(tmp_path / "report") == 0
    assert calls == []
    assert files(tmp_path / "report") == files(tmp_path / "whole")
    # The sampler's choice between one batch and two, from a measurement, moves the last bits.
    one, two = (
        [mean["value"] for row in json.loads((tmp_path / name / "report.json").read_text())["rows"]
         for mean in row["means"].values()] for name in ("whole", "report")
    )  # fmt: skip
    assert len(two) >= 12
    assert two == pytest.approx(one, abs=1e-4), "the numbers of an evaluation that nothing stopped"


def test_pictures_of_another_model_are_drawn(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, 3, KeyboardInterrupt())
        assert evaluate(tmp_path) == 130
    with monkeypatch.context() as patch:
        calls = fail_at(patch, 0, KeyError())
        assert evaluate(tmp_path, "--seed", "5") == 0
    assert len(calls) == 3


def test_a_digest_sees_every_bit():
    weights = {"a": torch.ones(2, 3), "b": torch.tensor(1.0)}
    changed = weights | {"b": torch.tensor(1.0 + 2**-23)}
    contents = [(weights,), (changed,), (weights, 1), ({"a": torch.ones(3, 2), "b": weights["b"]},), ([], weights)]
    contents.append(({"a": torch.ones(2, 3, dtype=torch.int32), "b": weights["b"]},))
    assert len({digest(*content) for content in contents}) == len(contents)
    assert digest(weights) == digest(dict(reversed(weights.items())))


def test_pictures_that_cannot_be_kept_cost_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "drawn").write_text("a file")
    assert evaluate(tmp_path) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "cannot be kept" in line]
    assert len(lines) == 1
    assert (tmp_path / "report.md").exists()
    damaged = DrawnPictures(tmp_path / "other")
    damaged.keep("key", torch.ones(1, 3, 2, 2))
    assert torch.equal(damaged.get("key"), torch.ones(1, 3, 2, 2))
    (tmp_path / "other" / "drawn" / "key.safetensors").write_bytes(b"half")
    assert damaged.get("key") is None


COUNTS = {
    "sample": ["limit", "images_per_prompt", "steps", "batch_size"],
    "evaluate": ["images", "steps", "batch_size"],
    "correlate": ["limit", "steps"],
}


@pytest.mark.parametrize("value", [0, -1, 10**9, 10**30])
@pytest.mark.parametrize(("command", "name"), [(key, name) for key, names in COUNTS.items() for name in names])
def test_counts_have_a_bound(command, name, value, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = {"sample": ["--prompt", PROMPT], "evaluate": [], "correlate": ["--negative", "nowhere"]}[command]
    assert main([command, *words, f"--{name}", str(value)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"error: {name}: {value} is not possible; expected an integer from 1 to 1,000,000"
    assert list(tmp_path.iterdir()) == []


MANY = {
    "sample": ["sample", "--prompts", "digits", "--images_per_prompt", "100000"],
    "evaluate": ["evaluate", "--guidance_scales", *map(str, range(1, 1002))],
}


@pytest.mark.parametrize("words", MANY.values(), ids=MANY)
def test_many_times_many_is_refused(words, capsys, tmp_path):
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match("error: (images_per_prompt: 100000 is not possible|guidance_scales: 1,001 are too many)", line)
    assert not (tmp_path / "out").exists()
