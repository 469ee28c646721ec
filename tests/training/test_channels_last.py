"""`engine.channels_last`: what the convolutions of student and reference are given, and compute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from benchmarks.profile_step import make_trainer

SHORT = ["--engine.batch_size", "4", "--prompts.limit", "8", "--log.sample_every", "-1", "--rollout.grid_steps", "5"]
SHORT += ["--optimizer.name", "adamw", "--optimizer.lr", "1e-3"]


def convolutions(network: nn.Module) -> Iterator[nn.Conv2d]:
    return (module for module in network.modules() if isinstance(module, nn.Conv2d))


def in_order(tensor: torch.Tensor) -> bool:
    """Whether a tensor is channels_last, and could be something else."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@pytest.mark.parametrize(
    ("stage", "lora"),
    [
        ("1", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("0", False), ("1", True), ("3", False))),
    ],
)
def test_every_convolution_of_the_student_runs_in_channels_last(stage, lora, tmp_path):
    """By its weights or by its input, of which either is enough for torch."""
    words = ["--engine.channels_last", "true", "--engine.zero_stage", stage, *SHORT]
    if lora:
        words += ["--lora.rank", "2", "--lora.targets", "[to_q, conv1]"]
    trainer, recorder, _ = make_trainer(words, tmp_path / "run")
    orders: list[bool] = []

    def look(module: nn.Conv2d, inputs: tuple[torch.Tensor, ...]) -> None:
        # A 1x1 kernel has both orders at once, and so has a picture of one pixel.
        by_weight = stage == "0" or not module.weight.requires_grad
        telling = (
            inputs[0].shape[1] > 1 and inputs[0].shape[-1] > 1 and not (by_weight and module.kernel_size == (1, 1))
        )
        if torch.is_grad_enabled() and telling:
            orders.append(in_order(module.weight if by_weight else inputs[0]))

    for module in convolutions(trainer.engine.module):
        module.register_forward_pre_hook(look)
    trainer.train_update(recorder)
    assert len(orders) > 5
    assert all(orders)


def test_it_changes_no_more_than_rounding(tmp_path):
    weights = []
    for order in ("false", "true"):
        words = ["--engine.channels_last", order, "--engine.zero_stage", "1", *SHORT]
        trainer, recorder, _ = make_trainer(words, tmp_path / order)
        before = {name: value.clone() for name, value in trainer.engine.full_weights()}
        for _ in range(2):
            trainer.train_update(recorder)
        weights.append({name: value - before[name] for name, value in trainer.engine.full_weights()})
    moved = max(value.abs().max() for value in weights[0].values())
    assert moved > 1e-4
    # AdamW's first steps are lr times the gradient's sign: an element whose gradient is rounding
    # noise may go either way.
    differing = sum(((weights[1][n] - v).abs() > 1e-5).sum().item() for n, v in weights[0].items())
    assert differing < 1e-3 * sum(v.numel() for v in weights[0].values())
