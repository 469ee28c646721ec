"""Short runs on a GPU: they go through, replay their graphs, and resume; tiny networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from selfnpo_fast import train

pytestmark = pytest.mark.gpu

UPDATES = 10  # with a pool of 2 a group's third turn, which is captured, comes with the fifth
RATE = 1e-4
RECIPES = {
    "recommended": ("sd15.yaml", []),
    "overlap, zero 2": ("sd15.yaml", ["--rollout.overlap", "true", "--engine.zero_stage", "2"]),
    "two branches, accumulation": (
        "sd15.yaml",
        ["--rollout.omega", "-3", "--rollout.branches", "batched", "--engine.accumulation", "2"],
    ),
    "fp16": ("sd15.yaml", ["--engine.precision", "fp16", "--optimizer.name", "adamw"]),
    "fp32": ("sd15.yaml", ["--engine.precision", "fp32", "--engine.zero_stage", "0", "--optimizer.name", "adamw"]),
    "lora": ("sd15_lora.yaml", ["--engine.channels_last", "true"]),
    "lockstep": ("sd15.yaml", ["--rollout.mode", "lockstep"]),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def repeatable(monkeypatch) -> None:
    """cuDNN takes the same algorithm in each run."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def run(name: str, model: Path, output: Path, *more: str, updates: int = UPDATES) -> int:
    config, words = RECIPES[name]
    sizes = {"model.path": model, "updates": updates, "engine.batch_size": 4, "rollout.grid_steps": 5}
    sizes |= {"rollout.pool": 2, "prompts.limit": 6, "optimizer.lr": RATE, "log.every": 1}
    sizes |= {"log.sample_steps": 4, "log.sample_prompts": 2, "log.checkpoint_every": 0}
    small = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    argv = ["--config", str(train.CONFIGS / config), "--output", str(output), *small, *words, *more]
    return train.main(argv)


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_goes_through_and_resumes(name, model, tmp_path):
    whole, parts, plain = (tmp_path / part for part in ("whole", "parts", "plain"))
    assert run(name, model, whole) == 0
    log = (whole / "train.log").read_text()
    assert "CUDA graphs: off" not in log
    assert "the sample grid could not be drawn" not in log
    assert (whole / "samples" / f"samples-{UPDATES:06d}.png").is_file()
    # Without graphs: the same pairs, and so the same losses but for rounding.
    assert run(name, model, plain, "--engine.graphs", "false", "--log.sample_every", "-1") == 0
    assert losses(whole) == pytest.approx(losses(plain), rel=0.05)
    # In two parts.
    assert run(name, model, parts, "--log.sample_every", "-1", updates=UPDATES // 2) == 0
    assert run(name, model, parts, "--resume") == 0
    student = f"checkpoints/update-{UPDATES:07d}/student.safetensors"
    expected, found = (load_file(output / student) for output in (whole, parts))
    apart = torch.cat([(expected[key] - found[key]).abs().flatten() for key in expected])
    assert (apart > RATE / 2).float().mean() < 0.02, "a step of another sign moves a weight by twice the rate"


def test_the_run_names_its_kernels_and_its_gpu(model, tmp_path):
    assert run("recommended", model, tmp_path / "run", "--log.sample_every", "-1", updates=1) == 0
    (line,) = [line for line in (tmp_path / "run" / "train.log").read_text().splitlines() if "kernels: " in line]
    assert "bf16 on 1 x cuda, ZeRO 1" in line
    assert "kernels: triton (Triton kernels, compiled at first use)" in line
