"""A tiny pipeline, a negative for it, and the images that both should give."""

from __future__ import annotations

import functools

import stock
import tiny
import torch
from torch import nn

from selfnpo_fast import attach_negative
from selfnpo_fast.guidance.lora_layers import LowRankConv2d, LowRankLinear

SD = "StableDiffusionPipeline"
KINDS = ["lora", "full"]


@functools.cache
def images(shallow: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The stock images, and those whose negative branch another network computes."""
    pipe = stock.build(SD, **(tiny.SHALLOW if shallow else {}))
    plain = stock.draw(pipe)
    pipe.unet = stock.TwoBranches(stock.negative("full", pipe)[1], pipe.unet)
    return plain, stock.draw(pipe)


class Setting:
    """A pipeline, a negative for it, its stock images, and those with the negative."""

    def __init__(self, kind: str, shallow: bool = False) -> None:
        self.kind = kind
        self.pipe = stock.build(SD, **(tiny.SHALLOW if shallow else {}))
        self.negative, self.network = stock.negative(kind, self.pipe)
        self.plain, self.guided = images(shallow)

    def attach(self, pipe=None, **options):
        return attach_negative(self.pipe if pipe is None else pipe, self.negative, **options)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def assert_clean(unet: nn.Module) -> None:
    """No trace of a negative."""
    assert not unet._forward_pre_hooks
    assert not unet._forward_hooks
    assert not [name for name in vars(unet) if "negative" in name]
    assert not any(isinstance(module, LowRankLinear | LowRankConv2d) for module in unet.modules())
    assert not any("follower" in name for name, _ in unet.named_modules())
    assert not any("low_rank" in name for name, _ in unet.named_buffers())


def three_times(setting: Setting) -> None:
    for _ in range(3):
        assert_same(stock.draw(setting.pipe), setting.guided)
