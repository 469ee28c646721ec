"""How often the host waits for the device in an update of a run that is under way."""

from __future__ import annotations

import pytest
import torch
from host_waits import HostWaits

from benchmarks.profile_step import make_trainer

SHORT = ["--engine.batch_size", "4", "--prompts.limit", "8", "--log.sample_every", "-1", "--rollout.grid_steps", "5"]
SHORT += ["--optimizer.name", "adamw", "--rollout.branches", "batched"]
# Updates may ask DeepSpeed for nothing without ZeRO. Its ZeRO optimisers look at the gradient norm
# on the host: whether it is finite, and in bf16 whether to clip.
RECIPES = {
    "plain": ([], 0),
    "guided": (["--rollout.omega", "-3"], 0),
    "data": (["--rollout.start", "data", "--data.source", "digits"], 0),
    "lora": (["--lora.rank", "2"], 0),
    "accumulation": (["--engine.accumulation", "2"], 0),
    "zero 1": (["--engine.zero_stage", "1"], 3),
    "zero 1 in bf16": (["--engine.precision", "bf16", "--engine.zero_stage", "1"], 3),
    "zero 2": (["--engine.zero_stage", "2"], 3),
}


SLOW = ("guided", "data", "lora", "accumulation", "zero 1", "zero 2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RECIPES])
def test_an_update_reads_nothing_back(name, tmp_path):
    """Neither metrics, nor spikes, nor the check for finite losses: all of that is at a flush."""
    words, most = RECIPES[name]
    trainer, recorder, _ = make_trainer([*SHORT, *words], tmp_path / "run")
    trainer.producer.rollout.fill()
    for _ in range(2):
        trainer.train_update(recorder)
    with HostWaits() as waits:
        trainer.train_update(recorder)
    deepspeed = waits.of("deepspeed")
    assert waits.seen - deepspeed == {}
    assert deepspeed.total() <= most


def test_waits_are_found():
    x = torch.arange(6.0)
    with HostWaits() as waits:
        x[x > 2]
        x[x > 4] = 0
        x.sum().item()
        bool(x.any())
        torch.tensor([1.0])
        x.nonzero()
        torch.where(x > 2, x, 0)
        x.to(torch.bfloat16)
        x.tolist()
        float(x[0])
    assert sorted(what for _, what in waits.seen.elements()) == sorted(
        ["mask", "mask", "item", "__bool__", "tensor", "nonzero", "tolist", "__float__"]
    )
