"""Runs whose rollout steps are captured: by a stand-in that keeps the rules of CUDA graphs."""

from __future__ import annotations

import pytest
from recording import Recording
from torch._inductor import config as inductor
from torch._inductor import list_mode_options

from benchmarks.profile_step import make_trainer
from selfnpo_fast.config import EngineConfig, LoraConfig, TrainConfig
from selfnpo_fast.runtime.compiling import MODES
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.training.methods import self_npo

SHORT = ["--engine.batch_size", "2", "--prompts.limit", "8", "--log.sample_every", "-1", "--rollout.grid_steps", "5"]
SHORT += ["--optimizer.name", "adamw", "--rollout.pool", "1", "--rollout.branches", "batched"]
RECIPES = {
    "moving": [],
    "frozen": ["--reference.kind", "frozen"],
    "zero 3": ["--engine.zero_stage", "3"],
    "bf16": ["--engine.precision", "bf16", "--engine.channels_last", "true"],
    "checkpointing": ["--engine.gradient_checkpointing", "true"],
    "lora": ["--lora.rank", "2", "--engine.gradient_checkpointing", "true", "--engine.zero_stage", "1"],
}
SLOW = ("moving", "frozen", "zero 3", "checkpointing")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RECIPES])
def test_a_captured_step_finds_its_memory_in_every_update(name, tmp_path, monkeypatch):
    """Optimiser, moving average, ZeRO and a resumed state leave the reference where it was.

    The same ops run at each update, and nothing is asked of the device.
    """
    recording = Recording()
    monkeypatch.setattr(self_npo, "capture_of", lambda *_: recording)
    trainer, recorder, _ = make_trainer([*SHORT, *RECIPES[name]], tmp_path / "run")
    for _ in range(3):
        trainer.train_update(recorder)
    trainer.reference.load_state_dict({name: value.clone() for name, value in trainer.reference.state_dict()})
    trainer.method.load_state_dict({name: value.clone() for name, value in trainer.method.state_dict().items()})
    trainer.train_update(recorder)
    assert recording.replays == 2


def test_zero_3_takes_no_network_apart_that_a_rollout_captures():
    """The reference of full weights is a network of its own; that of LoRA is the student."""
    with pytest.raises(UserError, match=r"expected 0, 1 or 2 with lora\.rank"):
        TrainConfig(engine=EngineConfig(zero_stage=3), lora=LoraConfig(rank=2))


def test_no_compiler_captures_what_is_captured_already():
    """By inductor's own table of modes; engine.graphs alone makes CUDA graphs."""
    assert not inductor.triton.cudagraphs
    assert list_mode_options("max-autotune")["triton.cudagraphs"] is True
    for mode in MODES.values():
        assert mode is None or not list_mode_options(mode).get("triton.cudagraphs", False)
