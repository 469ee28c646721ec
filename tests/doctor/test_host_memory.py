"""Doctor's figures of `engine.offload` and `engine.attention`, and the table of what fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from selfnpo_fast.config import (
    EngineConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    ReferenceConfig,
    TrainConfig,
)
from selfnpo_fast.doctor import costs
from selfnpo_fast.doctor.fitting import fitting_table
from selfnpo_fast.doctor.report import examine
from selfnpo_fast.doctor.savings import memory_saving_changes
from selfnpo_fast.models import Family, load_adapter
from selfnpo_fast.runtime.errors import UserError

DIGITS_PARAMETERS = 1_077_572
STATE = ("moments", "fp32 masters", "fp32 gradients")


@pytest.fixture(scope="module")
def tracer() -> costs.Tracer:
    return costs.Tracer(load_adapter("digits"), 8)


def config(lora: int = 0, optimizer: str = "adamw", **engine) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(path="digits"),
        prompts=PromptConfig(source="digits"),
        log=LogConfig(sample_every=-1),
        reference=ReferenceConfig(kind="ema"),
        lora=LoraConfig(rank=lora),
        optimizer=OptimizerConfig(name=optimizer),
        engine=EngineConfig(**engine),
    )


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "fp32"), (0, "bf16"), (3, "bf16")])
def test_the_optimiser_s_state_leaves_the_device(stage, precision, tracer):
    """Per trained parameter and rank: 8 bytes of moments, 4 of the master and 4 of the gradient."""
    chosen = config(zero_stage=stage, precision=precision, offload="optimizer")
    plain = replace(chosen, engine=replace(chosen.engine, offload="none"))
    before, after = (costs.memory(tracer.plan(each, 4, "cuda")) for each in (plain, chosen))
    share = DIGITS_PARAMETERS // 4
    assert after.host == dict(zip(STATE, (8 * share, 4 * share, 4 * share), strict=True))
    assert before.host == {}
    assert not {*STATE} & after.resident.keys()
    assert before.total_at_rest - after.total_at_rest >= (8 + 4) * share
    assert after.peak < before.peak
    if precision == "bf16":
        assert after.resident["EMA masters"] == 4 * share, "the moving average stays"


def test_frozen_blocks_leave_the_device(tracer):
    """All but the largest, which computes."""
    chosen = config(lora=4, offload="blocks", graphs=False, gradient_checkpointing=True)
    plain = replace(chosen, engine=replace(chosen.engine, offload="none"))
    before, after = (costs.memory(tracer.plan(each, 1, "cuda")) for each in (plain, chosen))
    network = load_adapter("digits").load_denoiser(torch.float32)
    kinds = ("BasicTransformerBlock", "ResnetBlock2D")
    sizes = [sum(p.nbytes for p in block.parameters()) for block in network.modules() if type(block).__name__ in kinds]
    assert len(sizes) > 3
    assert after.host == {"frozen blocks": sum(sizes)}
    assert after.resident["block that computes"] == max(sizes)
    assert before.resident["weights"] - after.resident["weights"] == sum(sizes)


def test_both_are_proposed():
    full = [words for words, _ in memory_saving_changes(config(precision="bf16", optimizer="adamw8bit"), 1, Family())]
    assert "--engine.offload optimizer --optimizer.name adamw" in full
    assert not any("offload" in words for words, _ in memory_saving_changes(config(), 1, Family())), (
        "ZeRO 0 has no masters"
    )
    lora = dict(memory_saving_changes(config(lora=4), 1, Family()))
    words = "--engine.graphs false --engine.gradient_checkpointing true --engine.offload blocks"
    assert lora[words].engine.offload == "blocks"
    again = [words for words, _ in memory_saving_changes(lora[words], 1, Family())]
    assert again and not any("offload" in words for words in again)


def test_an_attention_that_no_gpu_has_is_refused():
    with pytest.raises(UserError, match=r"^engine.attention: flash computes in bf16 or fp16 on a GPU"):
        examine(config(attention="flash"))


def test_a_table_of_what_fits():
    table = fitting_table([("ours", config(precision="bf16"))], cards=((16, 1), (80, 8)))
    header, _, row = table.splitlines()
    assert header == "| computed | 16 GB | 8 x 80 GB |"
    name, one, eight = (cell.strip() for cell in row.strip("|").split("|"))
    assert name == "ours"
    assert float(one) >= float(eight) >= 0, "a model that fits as it is needs no options"
    small = fitting_table([("ours", config(precision="bf16", batch_size=2))], cards=((0.001, 1),))
    assert "| no: 0.0 |" in small
