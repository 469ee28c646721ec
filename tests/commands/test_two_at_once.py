"""Two commands that write to one folder: the second is refused, whoever reads goes on."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import crash
import pytest
import tiny
from diffusers import UNet2DConditionModel

from selfnpo_fast.cli import main
from selfnpo_fast.guidance.sampler import GuidedSampler
from selfnpo_fast.negatives.sources import RECORD
from selfnpo_fast.runtime.locks import only_writer
from selfnpo_fast.scoring.digits.domain import DIGITS_DIR

PROMPT = "a red handwritten seven on a yellow background"
CASE = {"ranks": 1, "zero": 0, "reference": "ema", "mode": "continuous", "lora": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("model"))


def test_of_two_runs_with_two_seeds_one_goes_on(model, tmp_path):
    """Both start in one moment: the folder holds one of them alone, in the bits of a lone run."""
    output, processes = tmp_path / "run", []
    for seed in (1, 2):
        (tmp_path / f"seed{seed}").mkdir()
        argv = [*crash.words(CASE, model, output), "--seed", str(seed)]
        processes += crash.start(1, argv, tmp_path / f"seed{seed}")
    codes = crash.finish(processes, tmp_path)
    assert sorted(codes) == [0, 2]
    winner, loser = (1, 2) if codes[0] == 0 else (2, 1)
    pid = processes[winner - 1].pid
    told = (tmp_path / f"seed{loser}" / "rank0.log").read_text().splitlines()[-1]
    assert told.startswith(f"error: output: {output} is being written by process {pid} on {socket.gethostname()} since")
    argv = [*crash.words(CASE, model, tmp_path / "alone"), "--seed", str(winner)]
    assert crash.finish(crash.start(1, argv, tmp_path), tmp_path) == [0]
    crash.assert_equal(tmp_path / "alone", output)
    assert {path.name for path in output.iterdir()} == {path.name for path in (tmp_path / "alone").iterdir()}


@pytest.fixture
def live(tmp_path) -> Path:
    """The folder of a run that goes on, with a negative model in it."""
    unet = UNet2DConditionModel.from_pretrained(DIGITS_DIR, subfolder="unet")
    unet.conv_out.weight.data.mul_(1.5)
    unet.save_pretrained(tmp_path / "live" / "negative" / "unet")
    with only_writer(tmp_path / "live"):
        yield tmp_path / "live"


WRITERS = {
    "train": ["train", "--overwrite", "--updates", "1"],
    "replay": ["train", "--replay-step", "1"],
    "sample": ["sample", "--prompt", PROMPT],
    "evaluate": ["evaluate"],
    "merge": ["merge", "--base", "digits", "--negative", "nothing"],
    "export": ["export", "--checkpoint", "nothing"],
}


@pytest.mark.parametrize("words", WRITERS.values(), ids=WRITERS)
def test_every_writer_is_refused_before_any_work(words, live, capsys, monkeypatch):
    monkeypatch.setattr(GuidedSampler, "images", lambda *args: pytest.fail("drew pictures first"))
    before = {path: path.stat().st_mtime_ns for path in live.rglob("*")}
    assert main([*words, "--output", str(live)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: output: {live} is being written by process {os.getpid()} on ")
    assert {path: path.stat().st_mtime_ns for path in live.rglob("*")} == before


def test_readers_of_a_live_run_go_on(live, tmp_path):
    words = ["--negative", str(live), "--steps", "1"]
    assert main(["sample", "--prompt", PROMPT, *words, "--output", str(tmp_path / "drawn")]) == 0
    scales = ["--images", "12", "--guidance_scales", "2"]
    assert main(["evaluate", *words, *scales, "--output", str(tmp_path / "report")]) == 0
    words = ["--base", str(DIGITS_DIR), "--negative", str(live), "--output", str(tmp_path / "merged")]
    assert main(["merge", *words]) == 0
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {"unet", RECORD}
    assert not [path for path in tmp_path.rglob(".*") if path.parent != live], "no locks, and nothing half-written"


def test_all_ranks_agree_that_the_folder_is_taken(model, tmp_path):
    output = tmp_path / "run"
    with only_writer(output):
        processes = crash.start(2, crash.words(CASE | {"ranks": 2}, model, output), tmp_path)
        assert crash.finish(processes, tmp_path) == [2, 2]
    assert "is being written by process" in (tmp_path / "rank0.log").read_text()
    assert "error" not in (tmp_path / "rank1.log").read_text()
    assert not output.exists()
