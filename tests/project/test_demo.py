"""The demo as a person runs it: the shipped config from start to end, then the report in brief."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SELFNPO = Path(sys.executable).parent / "selfnpo"
NOISE = ("Warning", "WARNING", "warn(", "[transformers]", "[diffusers]", "DeepSpeed", "deprecat", "Traceback")


def run(*words: str) -> str:
    command = [str(SELFNPO), *words]
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    output = done.stdout + done.stderr
    assert not [line for line in output.splitlines() if any(word in line for word in NOISE)]
    return output


@pytest.mark.slow
def test_the_demo_runs_and_says_nothing_but_its_own_lines(tmp_path):
    train = run("train", "--config", "configs/digits.yaml", "--output", str(tmp_path / "run"))
    assert "negative model: " in train
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"], "the student learns its targets"
    brief = run("evaluate", "--negative", str(tmp_path / "run"), "--brief", "--output", str(tmp_path / "report"))
    assert "guidance_scale" in brief
    assert str(tmp_path / "report" / "grid.png") in brief
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    arms = {row["arm"] for row in report["rows"]}
    assert arms == {"base", "base + negative"}
    best = max(row["means"]["digit_correct"]["value"] for row in report["rows"] if row["arm"] != "base")
    assert best >= 0.9, "guidance against the negative still draws the digits that were asked for"
