"""Doctor's figures of a model with two experts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import tiny_transformers
import torch
from torch.utils.flop_counter import FlopCounterMode

from selfnpo_fast.config import EngineConfig, LoraConfig, ModelConfig, PromptConfig, RolloutConfig, TrainConfig
from selfnpo_fast.doctor import costs
from selfnpo_fast.doctor.expert_rows import rows_per_pair
from selfnpo_fast.doctor.report import compare_with_update, examine, make_tracer
from selfnpo_fast.models import load_adapter
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.rollout import Grid, PairMaker
from selfnpo_fast.rollout.continuous import ContinuousRollout
from selfnpo_fast.rollout.pairs import GuidedPredictor

SIZE = {"height": 32, "width": 48, "frames": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny_transformers.write_wan(tmp_path_factory.mktemp("wan"), experts=2))


def config(model: str, expert: str, rank: int = 0, batch: int = 4, **engine) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(path=model, expert=expert, **SIZE),
        prompts=PromptConfig(limit=8),
        rollout=RolloutConfig(grid_steps=5, pool=1),
        lora=LoraConfig(rank=rank),
        engine=EngineConfig(batch_size=batch, **engine),
    )


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_trained_is_counted_once_and_what_is_frozen_is_shared(model, rank):
    settings = {expert: config(model, expert, rank) for expert in ("both", "low")}
    runs = {expert: make_tracer(setting).plan(setting, 1, "cuda") for expert, setting in settings.items()}
    both, low = (run.parameter_counts for run in runs.values())
    one = sum(p.numel() for p in load_adapter(model, **SIZE).load_denoiser(torch.float32).first.parameters())
    assert both.trained == 2 * low.trained
    assert low.total == 2 * one + (low.trained if rank else 0)
    assert rank or low.trained == one
    for run in runs.values():
        assert costs.negative_bytes(run) == 4 * run.parameter_counts.trained
        memory = costs.memory(run)
        assert memory.resident["reference"] == run.parameter_counts.trained_bytes
        assert "pool of the CUDA graphs" not in memory.resident


def test_samples_of_the_student_are_those_of_a_rollout(model):
    """Against the pairs of a real continuous rollout, and with one expert by hand."""
    setting = RolloutConfig(grid_steps=5, pool=1)
    high, low, both = (load_adapter(model, expert=expert, **SIZE) for expert in ("high", "low", "both"))
    assert rows_per_pair(high, setting, 4) == 1
    # Of the states at 199, 399, 599, 799 and t = 0 one has no level below 700 above it.
    assert rows_per_pair(low, setting, 4) == pytest.approx(0.8 + 0.2**4 / 4)
    rows = {"row": torch.zeros(1, 1)}
    table = ConditioningTable.build(rows, {"row": torch.zeros(4, 1)}, torch.float32)
    maker = PairMaker(
        GuidedPredictor(lambda x, t, cond: torch.zeros_like(x), table, -1.0),
        Grid.build(both.schedule, 5, torch.device("cpu"), omega=-1.0, levels=both.trained_levels),
        setting, latent_shape=(1,), num_prompts=4, latents=None, seed=1, dropout=0.0, device=torch.device("cpu"),
    )  # fmt: skip
    rollout, computed, batches = ContinuousRollout(maker, batch=4, groups=1, rank=0, world_size=1), 0, 2000
    for _ in range(batches):
        owners = both.expert(rollout.next_pairs().s)
        computed += 4 + int(len(owners.unique()) == 1)
    assert rows_per_pair(both, setting, 4) == pytest.approx(computed / (4 * batches), rel=0.02)


def test_flops_are_those_of_one_expert(model):
    adapter = load_adapter(model, **SIZE)
    network = adapter.load_denoiser(torch.float32).first.requires_grad_(True)
    x = torch.randn(1, *adapter.latent_shape)
    rows = {name: torch.randn(1, *shape) for name, shape in adapter.conditioning_shapes.items()}
    with FlopCounterMode(display=False) as flops:
        adapter.predict(network, x, torch.tensor([900.0]), rows).sum().backward()
    for expert in ("high", "both"):
        setting = config(model, expert, batch=1)
        run = make_tracer(setting).plan(setting, 1, "cpu")
        assert run.student.flops >= flops.get_total_flops()  # which counts no attention of a CPU
        assert run.student.flops < 1.5 * flops.get_total_flops()
        assert run.reference.flops < run.student.flops / 2.5


def test_the_report_names_the_expert_and_the_pairs_it_cannot_use(model):
    text = examine(config(model, "low"))
    assert "(full weights, of transformer_2)" in text
    assert "the student computes 80% of them: above the others there is no level of the expert" in text


@pytest.mark.slow
@pytest.mark.parametrize("expert", ["both", "low"])
def test_the_memory_is_that_of_a_real_update(model, expert):
    setting = config(model, expert, batch=8, gradient_checkpointing=False)
    comparison = compare_with_update(replace(setting, reference=copy.deepcopy(setting.reference)))
    assert comparison.computed["at rest"] == pytest.approx(comparison.measured["at rest"], rel=0.1)
