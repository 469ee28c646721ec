"""What DeepSpeed is asked for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from benchmarks.profile_step import make_trainer
from selfnpo_fast.config import EngineConfig, OptimizerConfig, TrainConfig
from selfnpo_fast.training import engine
from selfnpo_fast.training.engine import deepspeed_config, parameter_groups

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


def test_8_bit_adamw_gets_no_tensor_that_it_cannot_count():
    """The sizes of SDXL's UNet at rank 1 of 1, as one flat tensor, are beyond 2^31 - 1."""
    sizes = [10**9, 10**9, 5 * 10**8, 67_463_684]
    params = [torch.nn.Parameter(torch.empty(n, device="meta")) for n in sizes]
    groups = [group["params"] for group in parameter_groups(OptimizerConfig(name="adamw8bit"), params)]
    assert [p for group in groups for p in group] == params
    assert [sum(p.numel() for p in group) for group in groups] == [2 * 10**9, 567_463_684]
    assert len(parameter_groups(OptimizerConfig(name="adamw"), params)) == 1


@pytest.mark.parametrize("stage", ["1", "3"])
def test_every_group_is_trained(stage, monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "EIGHT_BIT_ELEMENTS", 100_000)
    words = ["--engine.zero_stage", stage, "--optimizer.name", "adamw8bit", "--optimizer.warmup", "0", *SHORT]
    trainer, recorder, _ = make_trainer(words, tmp_path / "run")
    optimizer = trainer.engine.engine.basic_optimizer
    before = {name: value.clone() for name, value in trainer.engine.full_weights()}
    assert len(optimizer.param_groups) > 1
    for _ in range(2):
        trainer.train_update(recorder)
    after = dict(trainer.engine.full_weights())
    still = [name for name, value in before.items() if torch.equal(value, after[name])]
    assert not still
    assert all(p.numel() <= 100_000 for group in optimizer.param_groups for p in group["params"])


TF32 = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
TF32 += [(torch.backends.cudnn, "benchmark")]


@pytest.fixture
def switches():
    """torch's switches are put back."""
    before = [getattr(owner, name) for owner, name in TF32]
    yield
    for (owner, name), value in zip(TF32, before, strict=True):
        setattr(owner, name, value)


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_what_the_config_says(tf32, switches, caplog):
    for owner, name in TF32:
        setattr(owner, name, not tf32)
    config = TrainConfig(engine=EngineConfig(tf32=tf32))
    engine.allow_tf32(config, torch.device("cpu"))
    assert torch.backends.cudnn.benchmark is not tf32, "a CPU knows no TF32"
    with caplog.at_level("INFO", "selfnpo"):
        engine.allow_tf32(config, torch.device("cuda", 0))
    assert torch.backends.cuda.matmul.allow_tf32 is tf32
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cudnn.benchmark is tf32
    assert ["engine.tf32" in line for line in caplog.messages] == [True]
    engine.allow_tf32(TrainConfig(engine=EngineConfig(precision="bf16", tf32=not tf32)), torch.device("cuda", 0))
    assert torch.backends.cudnn.benchmark is tf32, "bf16 has no use for it"
