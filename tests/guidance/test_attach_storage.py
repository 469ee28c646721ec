"""attach_negative on pipelines whose layers are offloaded or cast one by one."""

from __future__ import annotations

import copy
from dataclasses import replace

import accelerate
import pytest
import stock
import torch
from accelerate.hooks import remove_hook_from_submodules
from attached import KINDS, SD, Setting, assert_clean, assert_same, three_times
from diffusers.hooks import apply_layerwise_casting
from torch import nn

from selfnpo_fast import attach_negative
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.runtime.errors import UserError

FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(params=KINDS)
def setting(request) -> Setting:
    return Setting(request.param)


# Layers offloaded one by one.


def offload_layers(unet: nn.Module) -> None:
    """What enable_sequential_cpu_offload does to a denoiser.

    The method itself would fail on the text encoder where there is no accelerator.
    """
    accelerate.cpu_offload(unet, torch.device("cpu"), offload_buffers=False)


def offload_leaves(unet: nn.Module) -> None:
    unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def offload_blocks(unet: nn.Module) -> None:
    unet.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


OFFLOADS = [offload_layers, offload_leaves, offload_blocks]


@pytest.mark.parametrize("offload", OFFLOADS, ids=lambda offload: offload.__name__)
def test_offload_turned_on_after_attaching(setting, offload):
    handle = setting.attach()
    offload(setting.pipe.unet)
    three_times(setting)
    handle.detach()
    assert_clean(setting.pipe.unet)
    assert_same(stock.draw(setting.pipe), setting.plain)


def test_layerwise_offload_turned_off_after_detaching(setting):
    """accelerate's hooks have kept the layers' forwards, and lists of their tensors."""
    handle = setting.attach()
    offload_layers(setting.pipe.unet)
    handle.detach()
    remove_hook_from_submodules(setting.pipe.unet)
    assert_same(stock.draw(setting.pipe), setting.plain)
    with setting.attach():
        three_times(setting)
    assert_clean(setting.pipe.unet)
    assert_same(stock.draw(setting.pipe), setting.plain)


@pytest.mark.parametrize("offload", OFFLOADS, ids=lambda offload: offload.__name__)
def test_offload_of_layers_before_attaching_is_refused(setting, offload):
    offload(setting.pipe.unet)
    with pytest.raises(UserError, match=r"^pipe: the layers of its unet are offloaded or cast one by one; attach"):
        setting.attach()
    assert_same(stock.draw(setting.pipe), setting.plain)


# Weights stored in a low precision.


def trained(kind: str, pipe) -> tuple[Negative, dict]:
    """A negative as training leaves it, most of whose entries are below float8's smallest number."""
    deltas = {path: replace(delta, up=1e-3 * delta.up) for path, delta in stock.low_rank(pipe.unet).items()}
    if kind == "lora":
        return Negative(source="a trained LoRA", deltas=deltas), deltas
    return Negative(source="trained weights", network=stock.merged(pipe.unet, deltas)), deltas


def stored(unet: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A plain copy of the network, with the values that its cast weights have in `dtype`."""
    cast, plain = copy.deepcopy(unet), copy.deepcopy(unet)
    cast.enable_layerwise_casting(storage_dtype=dtype)
    plain.load_state_dict({name: value.float() for name, value in cast.state_dict().items()})
    return plain


@pytest.mark.parametrize("dtype", [FLOAT8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_keeps_its_precision_when_the_pipeline_is_cast(kind, dtype):
    """Compared with two networks run apart, of which one has the pipeline's stored weights."""
    pipe = stock.build(SD)
    given, deltas = trained(kind, pipe)
    positive, uncast = stored(pipe.unet, dtype), pipe.unet
    negative = stock.merged(positive, deltas) if kind == "lora" else given.network
    expected, plain = stock.reference(SD, copy.deepcopy(negative), positive), stock.reference(SD, positive, positive)
    effect = (stock.reference(SD, stock.merged(uncast, deltas), uncast) - stock.draw(stock.build(SD))).abs().max()
    handle = attach_negative(pipe, given)
    factors = {name: value for name, value in pipe.unet.named_buffers() if "low_rank" in name}
    assert bool(factors) == (kind == "lora")
    pipe.unet.enable_layerwise_casting(storage_dtype=dtype)
    assert pipe.unet.conv_in.weight.dtype == dtype
    for _ in range(2):
        ours = stock.draw(pipe)
        torch.testing.assert_close(ours - plain, expected - plain, rtol=0, atol=0.01 * effect.item())
    buffers = dict(pipe.unet.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in factors.items())
    if kind == "lora":  # full weights stay apart from the weights that are cast
        assert 0.8 < (ours - plain).abs().max() / effect < 1.25
    # Detached, the pipeline draws the very bits of one that has only been cast.
    handle.detach()
    assert_clean(pipe.unet)
    never = stock.build(SD)
    never.unet.enable_layerwise_casting(storage_dtype=dtype)
    assert torch.equal(stock.draw(pipe), stock.draw(never))


def test_a_negative_keeps_its_precision_when_the_network_is_cast_as_one(setting):
    """diffusers' hook on the whole network, whose `to` reaches everything in it."""
    positive = copy.deepcopy(setting.pipe.unet)
    positive.to(FLOAT8).to(torch.float32)
    negative = stock.merged(positive, stock.low_rank(setting.pipe.unet)) if setting.kind == "lora" else setting.network
    expected = stock.reference(SD, copy.deepcopy(negative), positive)
    with setting.attach():
        apply_layerwise_casting(setting.pipe.unet, FLOAT8, torch.float32, None, None)
        for _ in range(2):
            assert_same(stock.draw(setting.pipe), expected)


@pytest.mark.parametrize("dtype", [FLOAT8, torch.bfloat16], ids=str)
def test_a_pipeline_that_is_cast_already_is_refused(setting, dtype):
    """Its weights are gone: nothing can be compared with them, and diffusers cannot undo the cast."""
    setting.pipe.unet.enable_layerwise_casting(storage_dtype=dtype)
    before = stock.draw(setting.pipe)
    with pytest.raises(UserError, match=r"^pipe: the layers of its unet are offloaded or cast one by one; attach") as e:
        setting.attach()
    assert "\n" not in str(e.value)
    assert_clean(setting.pipe.unet)
    assert torch.equal(stock.draw(setting.pipe), before)
