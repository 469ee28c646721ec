"""A LoRA's negative on pipelines whose denoiser bitsandbytes or torchao has quantised."""

from __future__ import annotations

import copy

import bitsandbytes
import pytest
import stock
import tiny
import torch
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

from selfnpo_fast import GuidedSampler, attach_negative, detach_negative
from selfnpo_fast.guidance.lora_backbone import install
from selfnpo_fast.guidance.lora_layers import Rows
from selfnpo_fast.negatives.fingerprint import base_record, matches
from selfnpo_fast.negatives.formats import record_of_plain
from selfnpo_fast.negatives.load import Negative, as_network, load_negative
from selfnpo_fast.negatives.low_rank import Deltas
from selfnpo_fast.negatives.weights import module_weights
from selfnpo_fast.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("plain_linear")
NAME = "StableDiffusionPipeline"
PATH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
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
    if "nf4" in kind:  # the packing for CPUs with bfloat16 is for wider layers, and computes in it
        new.support_avx512bf16_for_cpu = False
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
    """A quantised pipeline, and updates of its layers."""
    pipe = stock.build(NAME, **tiny.SHALLOW)
    deltas = stock.low_rank(pipe.unet)
    quantise(pipe.unet, kind)
    return pipe, deltas


def close(kind: str) -> float:
    """Largest difference in shares of the largest value: float32's rounding, and for inputs that are
    rounded to 8 bits the steps that such a difference can flip."""
    return 2e-2 if kind == "bitsandbytes int8" else 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_lora_is_added_to_the_quantised_layers(kind):
    """Attached and sampled against a loop with two networks; detached, all is as before."""
    pipe, deltas = setting(kind)
    negative, plain = Negative(source="a LoRA", deltas=deltas), stock.draw(pipe)
    quantised = pipe.unet
    pipe.unet = stock.TwoBranches(beside(quantised, deltas), copy.deepcopy(quantised))
    expected = stock.draw(pipe)
    pipe.unet = quantised
    most = close(kind) * expected.abs().max().item()
    assert (expected - plain).abs().max() > 10 * most  # the update is not nothing
    attach_negative(pipe, negative)
    torch.testing.assert_close(stock.draw(pipe), expected, rtol=0, atol=most)
    detach_negative(pipe)
    assert torch.equal(stock.draw(pipe), plain)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_row_without_the_update_keeps_its_bits(kind):
    pipe, deltas = setting(kind)
    layer = pipe.unet.get_submodule(PATH)
    x = torch.randn(4, 3, layer.in_features, generator=torch.Generator().manual_seed(1))
    before = layer(x)
    backbone = install(pipe.unet, {PATH: deltas[PATH]})
    assert torch.equal(layer(x), before)
    with backbone.rows(Rows.FIRST_HALF):
        out = layer(x)
    delta = deltas[PATH]
    assert torch.equal(out[2:], before[2:])
    update = x[:2].double() @ delta.down.double().T @ delta.up.double().T * delta.scale
    torch.testing.assert_close(out[:2].double(), before[:2].double() + update, rtol=0, atol=1e-5)
    backbone.remove()
    assert torch.equal(layer(x), before) and not hasattr(layer, "low_rank")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_sampler_draws_the_attached_pipelines_picture(kind):
    pipe, deltas = setting(kind)
    negative = Negative(source="a LoRA", deltas=deltas)
    sampler = GuidedSampler.from_pipeline(pipe, negative, branches="batched")
    arguments = {"steps": 2, "guidance_scale": 4.0, "seeds": 3, "output": "latent"}
    first, again = (sampler("a cat", **arguments).images for _ in range(2))
    assert torch.equal(first, again)  # nothing that the first forward sets is taken for a change
    plain = GuidedSampler.from_pipeline(pipe, branches="batched")("a cat", **arguments).images
    assert (first - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_a_quantised_network_are_not_mixed_or_merged(kind, tmp_path):
    pipe, deltas = setting(kind)
    library = kind.split()[0]
    refused = rf"^model: the UNet2DConditionModel is quantised \({library}\), and its weights cannot be mixed, merged"
    negative = Negative(source="a LoRA", deltas=deltas)
    full = Negative(source="full weights", network=stock.build(NAME, **tiny.SHALLOW).unet)
    tiny.unet(**tiny.SHALLOW).save_pretrained(tmp_path / "unet")
    for source, options in (
        (negative, {"alpha": 0.5}),
        (negative, {"base": tmp_path}),
        (full, {}),
        (full.network, {}),
        (tmp_path, {}),
    ):
        with pytest.raises(UserError, match=refused) as caught:
            load_negative(pipe.unet, source, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=refused):
        as_network(pipe.unet, negative)


def test_the_record_of_the_base_is_compared_with_the_plain_layers(caplog):
    unet = stock.build(NAME, **tiny.SHALLOW).unet
    record = base_record("somewhere", None, module_weights(unet, "the base"))
    quantise(unet, "bitsandbytes nf4")
    kept = record_of_plain(record, unet)["fingerprint"]
    assert kept and kept.keys() < record["fingerprint"].keys()
    assert all(unet.get_parameter(name).dtype == torch.float32 for name in kept)
    assert record_of_plain({"fingerprint": {f"{PATH}.weight": {}}}, unet) is None
    assert matches(kept, module_weights(unet, "the positive"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_of_whole_numbers_get_the_networks_dtype(dtype):
    pipe, deltas = setting("bitsandbytes int8")
    pipe.unet.to(dtype)
    loaded = load_negative(pipe.unet, Negative(source="a LoRA", deltas=deltas))
    assert loaded.deltas[PATH].down.dtype == dtype
