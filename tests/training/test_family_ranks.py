"""Stable Diffusion 3, CogVideoX and Wan on two ranks, killed and resumed: the same bits as never
killed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import family_runs
import pytest
from crash import assert_equal
from ranks import PATIENCE, finish, start, tail

from selfnpo_fast import cli

pytestmark = pytest.mark.slow
UPDATES = 6
RUNS = {
    "sd3": {"lora__rank": 2, "rollout__mode": "lockstep", "rollout__omega": 1.5, "rollout__branches": "split"},
    "cogvideox_2b": {"engine__zero_stage": 2},
    "cogvideox_5b": {"lora__rank": 2, "prompts__device_mib": 0},  # texts on the host
    "wan_two": {},
}
"""Options of a run of each case; between them are full weights, LoRA, both modes and ZeRO."""


def words(name: str, model: Path, output: Path) -> list[str]:
    more = {"updates": UPDATES, "log__checkpoint_every": 2, "log__sample_every": -1}
    return family_runs.words(family_runs.CASES[name], model, output, **RUNS[name], **more)


def wait_for_row(output: Path, count: int, processes) -> None:
    """Wait until so many updates are recorded."""
    file, deadline = output / "metrics.jsonl", time.monotonic() + PATIENCE
    while not (file.is_file() and file.read_text().count("\n") >= count):
        assert time.monotonic() < deadline and all(process.is_alive() for process in processes)
        time.sleep(0.002)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed_it_has_the_bits_of_a_run_that_never_stopped(name, tmp_path):
    model = family_runs.CASES[name].write(tmp_path / "model")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert finish(start(2, words(name, model, whole / "run"), whole), whole) == [0, 0], tail(whole)
    argv = words(name, model, parts / "run")
    processes = start(2, argv, parts)
    wait_for_row(parts / "run", 3, processes)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    assert finish(processes, parts) == [-signal.SIGKILL] * 2, tail(parts)
    assert finish(start(2, [*argv, "--resume"], parts), parts) == [0, 0], tail(parts)
    assert "resumed from" in (parts / "rank0.log").read_text()
    assert_equal(whole / "run", parts / "run")
    # Two ranks make the pairs of one.
    assert cli.main(["train", *words(name, model, tmp_path / "alone")]) == 0
    assert losses(tmp_path / "alone") == pytest.approx(losses(whole / "run"), rel=1e-3)
