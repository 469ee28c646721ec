"""What DeepSpeed is asked for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from benchmarks.profile_step import make_trainer
from selfnpo_fast.config import TrainConfig
from selfnpo_fast.training.engine import deepspeed_config

SHORT = ["--engine.batch_size", "4", "--prompts.limit", "8", "--log.sample_every", "-1", "--rollout.grid_steps", "5"]


@pytest.mark.parametrize("stage", ["0", "1"])
@pytest.mark.parametrize("overlap", ["false", "true"])
def test_no_update_waits_for_the_whole_device(stage, overlap, monkeypatch, tmp_path):
    """A device-wide synchronisation ends the overlap of the rollout with the update before it."""
    words = ["--engine.zero_stage", stage, "--rollout.overlap", overlap, *SHORT]
    trainer, recorder, _ = make_trainer(words, tmp_path / "run")
    waits = Counter()
    monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda *_: waits.update(["synchronize"]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waits.update(["synchronize"]))
    trainer.producer.rollout.fill()
    for _ in range(5):  # the throughput timer begins at the third step
        trainer.train_update(recorder)
    trainer.producer.close()
    assert not waits


@pytest.mark.parametrize(("ranks", "overlapped"), [(1, False), (2, True)])
def test_communication_is_overlapped_where_there_is_some(ranks, overlapped, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert deepspeed_config(TrainConfig(), ranks, 10)["zero_optimization"]["overlap_comm"] is overlapped
