"""A LoRA's negative on pipelines whose denoiser bitsandbytes or torchao has quantised."""

from __future__ import annotations

import copy

import bitsandbytes
import pytest
import stock
import torch
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

from selfnpo_fast import GuidedSampler, attach_negative, detach_negative
from selfnpo_fast.negatives.load import Negative, as_network, load_negative
from selfnpo_fast.negatives.low_rank import Deltas
from selfnpo_fast.runtime.errors import UserError

NAME = "StableDiffusionPipeline"
KINDS = ("bitsandbytes int8", "bitsandbytes nf4", "torchao int8", "torchao fp8")


def by_bitsandbytes(layer: nn.Linear, kind: str) -> nn.Linear:
    """The layer as diffusers makes it, which asks for a GPU even where none is needed."""
    shape, bias, weight = (layer.in_features, layer.out_features), layer.bias is not None, layer.weight.detach().clone()
    if "nf4" in kind:
        new = bitsandbytes.nn.Linear4bit(*shape, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
        new.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        new = bitsandbytes.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
        new.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    return new.to("cpu").requires_grad_(False).eval()


def quantise(network: nn.Module, kind: str) -> nn.Module:
    """Quantise all Linear layers in place, as diffusers does; also those outside of blocks."""
    if kind.startswith("torchao"):
        quantize_(network, Int8WeightOnlyConfig() if "int8" in kind else Float8WeightOnlyConfig())
        return network
    for path, layer in list(network.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, by_bitsandbytes(layer, kind))
    return network


class WithUpdate(nn.Module):
    """A quantised layer, and its update beside it."""

    def __init__(self, layer: nn.Module, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.down, self.up = layer, down, up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def beside(network: nn.Module, deltas: Deltas) -> nn.Module:
    """A copy of a quantised network with the updates: beside Linear layers, in the weights of
    others."""
    network = copy.deepcopy(network)
    network = stock.merged(network, {p: d for p, d in deltas.items() if d.down.ndim == 4})
    for path, delta in deltas.items():
        if delta.down.ndim == 2:
            parent, _, name = path.rpartition(".")
            layer = WithUpdate(network.get_submodule(path), delta.down, delta.up * delta.scale)
            setattr(network.get_submodule(parent), name, layer)
    return network


def setting(kind: str):
    pipe = stock.build(NAME)
    deltas = stock.low_rank(pipe.unet)
    quantise(pipe.unet, kind)
    return pipe, deltas


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_attached_lora_is_added_to_the_quantised_layers(kind):
    pipe, deltas = setting(kind)
    plain = stock.draw(pipe)
    expected = stock.reference(NAME, beside(pipe.unet, deltas), copy.deepcopy(pipe.unet))
    attach_negative(pipe, Negative(source="a LoRA", deltas=deltas))
    drawn = stock.draw(pipe)
    print(kind, (drawn-expected).abs().max(), (drawn-plain).abs().max(), expected.abs().max())
    detach_negative(pipe)
    print((stock.draw(pipe)-plain).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_sampler_draws_with_a_quantised_network(kind):
    pipe, deltas = setting(kind)
    attach_negative(pipe, Negative(source="a LoRA", deltas=deltas))
    drawn = stock.draw(pipe)
    detach_negative(pipe)
    sampler = GuidedSampler.from_pipeline(pipe, Negative(source="a LoRA", deltas=deltas))
    print(sampler)
