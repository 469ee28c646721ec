"""What happens to a pipeline while a negative is attached: nothing is lost without a word."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import stock
import torch
from attached import KINDS, SD, Setting, assert_clean, assert_same, three_times
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from torch import nn

from selfnpo_fast import attach_negative, detach_negative
from selfnpo_fast.runtime.errors import UserError


@pytest.fixture(params=KINDS)
def setting(request) -> Setting:
    return Setting(request.param)


# Another denoiser in the pipeline.


class Substitute(nn.Module):
    """A traced or exported denoiser: it computes the same and knows nothing of the negative."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.config, self.network = unet.config, copy.deepcopy(unet)

    def forward(self, *args, **kwargs):
        return self.network(*args, **kwargs)


class Engine:
    """A denoiser that is no module."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, unet: nn.Module) -> None:
        self.config, self.network = unet.config, copy.deepcopy(unet)

    def __call__(self, *args, **kwargs):
        return self.network(*args, **kwargs)


REPLACEMENTS = {"UNet2DConditionModel": copy.deepcopy, "Substitute": Substitute, "Engine": Engine}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_a_replaced_denoiser_is_noticed(setting, name):
    before, other = setting.pipe.unet, REPLACEMENTS[name](setting.pipe.unet)
    setting.attach()
    setting.pipe.unet = other
    expected = rf"^pipe: its unet was replaced, by a {name}, after .* call detach_negative\(pipe\), and attach it"
    for _ in range(2):
        with pytest.raises(UserError, match=expected):
            stock.draw(setting.pipe)
    # Set back, the negative is there as before.
    setting.pipe.unet = before
    assert_same(stock.draw(setting.pipe), setting.guided)
    # Detached, the other one is used, and nothing is left on any of them.
    setting.pipe.unet = other
    assert detach_negative(setting.pipe)
    assert_same(stock.draw(setting.pipe), setting.plain)
    assert_clean(before)
    assert "check_inputs" not in vars(setting.pipe)
    if isinstance(other, nn.Module):
        assert_clean(other)


def test_a_replaced_denoiser_of_a_sibling_is_noticed(setting):
    sibling = StableDiffusionImg2ImgPipeline(**setting.pipe.components, requires_safety_checker=False)
    sibling.set_progress_bar_config(disable=True)
    other = copy.deepcopy(setting.pipe.unet)
    setting.attach()
    stock.draw(sibling)
    sibling.unet = other
    with pytest.raises(UserError, match=r"^pipe: its unet was replaced"):
        stock.draw(sibling)
    assert_same(stock.draw(setting.pipe), setting.guided)
    assert detach_negative(sibling)
    assert_same(stock.draw(setting.pipe), setting.plain)


def test_without_guidance_a_replaced_denoiser_is_no_error(setting):
    expected = stock.draw(setting.pipe, guidance_scale=1.0)
    other = copy.deepcopy(setting.pipe.unet)
    with setting.attach():
        setting.pipe.unet = other
        assert_same(stock.draw(setting.pipe, guidance_scale=1.0), expected)


def test_a_users_own_first_method_is_kept(setting):
    called = []
    check = setting.pipe.check_inputs
    setting.pipe.check_inputs = mine = lambda *args, **kwargs: called.append(1) or check(*args, **kwargs)
    with setting.attach():
        assert_same(stock.draw(setting.pipe), setting.guided)
        assert called == [1]
    assert setting.pipe.check_inputs is mine
    with setting.attach():
        setting.pipe.check_inputs = mine  # which takes ours away: it comes back with the first step
        assert_same(stock.draw(setting.pipe), setting.guided)
        unet, setting.pipe.unet = setting.pipe.unet, copy.deepcopy(stock.build(SD).unet)
        with pytest.raises(UserError, match=r"^pipe: its unet was replaced"):
            stock.draw(setting.pipe)
        setting.pipe.unet = unet
    assert setting.pipe.check_inputs is mine


# A handle that is lost.


def test_a_second_cell_detaches_the_first_ones_negative(setting):
    assert not detach_negative(setting.pipe)
    setting.attach()
    with pytest.raises(UserError, match=r"^pipe: its unet has a negative already.*call detach_negative\(pipe\) first"):
        setting.attach()
    assert detach_negative(setting.pipe)
    assert not detach_negative(setting.pipe)
    assert_clean(setting.pipe.unet)
    assert_same(stock.draw(setting.pipe), setting.plain)
    with setting.attach():
        assert_same(stock.draw(setting.pipe), setting.guided)


def test_what_is_no_pipeline_has_no_negative(setting):
    for other in (None, "a path", setting.pipe.unet):
        with pytest.raises(UserError, match=r"^pipe: a \w+ is no diffusers pipeline"):
            detach_negative(other)


def test_a_sibling_detaches_it_too(setting):
    sibling = StableDiffusionPipeline(**setting.pipe.components, requires_safety_checker=False)
    handle = setting.attach()
    assert detach_negative(sibling)
    assert not handle.attached
    assert_clean(setting.pipe.unet)


def test_a_compiled_denoisers_negative_is_detached(setting):
    inner = setting.pipe.unet
    setting.pipe.unet = torch.compile(inner, backend="eager")  # never called, so nothing is compiled
    setting.attach()
    assert detach_negative(setting.pipe)
    assert_clean(setting.pipe.unet)
    assert_clean(inner)


# Copies.


COPIES = {
    "deepcopy of the pipeline": lambda pipe: copy.deepcopy(pipe),
    "deepcopy of the denoiser": lambda pipe: copy.deepcopy(pipe.unet),
    "pickle": lambda pipe: pickle.dumps(pipe),
    "torch.save": lambda pipe: torch.save(pipe, io.BytesIO()),
    "torch.save of the denoiser": lambda pipe: torch.save(pipe.unet, io.BytesIO()),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_refused_in_one_line(setting, name):
    with setting.attach():
        with pytest.raises(UserError, match=r"^pipe: a negative is attached to it.* call detach_negative\(pipe\)") as e:
            COPIES[name](setting.pipe)
        assert "\n" not in str(e.value)
        assert_same(stock.draw(setting.pipe), setting.guided)
    COPIES[name](setting.pipe)


def test_a_layer_alone_is_not_copied_either(setting):
    layer = setting.pipe.unet.conv_in if setting.kind == "lora" else setting.pipe.unet
    with setting.attach(), pytest.raises(UserError, match=r"^pipe: a negative is attached"):
        copy.deepcopy(layer)
    copy.deepcopy(layer)


def test_a_copy_after_detaching_is_whole(setting):
    with setting.attach():
        pass
    clone = copy.deepcopy(setting.pipe)
    assert_same(stock.draw(clone), setting.plain)
    with attach_negative(clone, setting.negative):
        assert_same(stock.draw(clone), setting.guided)


def test_a_shallow_copy_shares_the_negative(setting):
    handle = setting.attach()
    clone = copy.copy(setting.pipe)
    assert_same(stock.draw(clone), setting.guided)
    clone.unet = copy.deepcopy(stock.build(SD).unet)
    with pytest.raises(UserError, match=r"^pipe: its unet was replaced"):
        stock.draw(clone)
    three_times(setting)
    handle.detach()
    assert_same(stock.draw(clone), setting.plain)
    assert_same(stock.draw(setting.pipe), setting.plain)


def test_state_dicts_are_those_of_the_pipeline(setting):
    names = list(setting.pipe.unet.state_dict())
    with setting.attach():
        assert list(setting.pipe.unet.state_dict()) == names
        assert [name for name, _ in setting.pipe.unet.named_parameters()] == [
            name for name, _ in stock.build(SD).unet.named_parameters()
        ]


# Seamless tiling, as notebooks turn it on.


def circular(unet: nn.Module) -> None:
    for layer in unet.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "circular"


def along_x(layer: nn.Conv2d, x, weight, bias=None):
    x = nn.functional.pad(x, layer.padding_x, mode=layer.padding_mode_x)
    x = nn.functional.pad(x, layer.padding_y)
    return nn.functional.conv2d(x, weight, bias, layer.stride, 0, layer.dilation, layer.groups)


def circular_along_x(unet: nn.Module) -> None:
    for layer in unet.modules():
        if isinstance(layer, nn.Conv2d):
            left, right, top, bottom = layer._reversed_padding_repeated_twice
            layer.padding_mode_x, layer.padding_x = "circular", (left, right, 0, 0)
            layer.padding_y = (0, 0, top, bottom)
            layer._conv_forward = along_x.__get__(layer, nn.Conv2d)


def by_a_forward(unet: nn.Module) -> None:
    def forward(layer, x):
        return along_x(layer, x, layer.weight, layer.bias)

    circular_along_x(unet)
    for name in ("conv_in", "conv_out"):
        layer = getattr(unet, name)
        layer.forward = forward.__get__(layer, nn.Conv2d)


def plain_again(unet: nn.Module) -> None:
    for layer in unet.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "zeros"
            vars(layer).pop("_conv_forward", None)
            vars(layer).pop("forward", None)


TILINGS = [circular, circular_along_x]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("tile", TILINGS, ids=lambda tile: tile.__name__)
def test_tiling_reaches_the_negative(setting, tile, order):
    networks = [copy.deepcopy(setting.network), copy.deepcopy(setting.pipe.unet)]
    for network in networks:
        tile(network)
    expected = stock.reference(SD, *networks)
    assert (expected - setting.guided).abs().max() > 0.05
    if order == "before":
        tile(setting.pipe.unet)
    handle = setting.attach()
    if order == "after":
        assert_same(stock.draw(setting.pipe), setting.guided)
        tile(setting.pipe.unet)
    for _ in range(2):
        assert_same(stock.draw(setting.pipe), expected)
    if order == "after":
        plain_again(setting.pipe.unet)
        assert_same(stock.draw(setting.pipe), setting.guided)
        tile(setting.pipe.unet)
        assert_same(stock.draw(setting.pipe), expected)
    handle.detach()
    # The second network is as it was given.
    plain_again(setting.pipe.unet)
    assert_same(stock.reference(SD, setting.network, setting.pipe.unet), setting.guided)
    assert not any("_conv_forward" in vars(module) for module in setting.network.modules())


def test_a_forward_of_a_convolution_is_followed_too():
    setting = Setting("full")
    networks = [copy.deepcopy(setting.network), copy.deepcopy(setting.pipe.unet)]
    for network in networks:
        by_a_forward(network)
    expected = stock.reference(SD, *networks)
    with setting.attach():
        by_a_forward(setting.pipe.unet)
        assert_same(stock.draw(setting.pipe), expected)
        plain_again(setting.pipe.unet)
        assert_same(stock.draw(setting.pipe), setting.guided)


def test_a_convolution_that_cannot_be_followed_is_refused():
    setting = Setting("full")
    layer = setting.pipe.unet.conv_in
    with setting.attach():
        layer._conv_forward = lambda x, weight, bias: along_x(layer, x, weight, bias)
        layer.padding_mode_x, layer.padding_x, layer.padding_y = "circular", (1, 1, 0, 0), (0, 0, 1, 1)
        expected = r"^negative: the _conv_forward of conv_in was replaced by a function .* use a LoRA as the negative$"
        with pytest.raises(UserError, match=expected):
            stock.draw(setting.pipe)
        del layer._conv_forward
        three_times(setting)


# What is turned on or loaded afterwards.


def test_freeu_reaches_the_negative(setting):
    networks = [copy.deepcopy(setting.network), copy.deepcopy(setting.pipe.unet)]
    for network in networks:
        network.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    expected = stock.reference(SD, *networks)
    assert (expected - setting.guided).abs().max() > 0.01
    with setting.attach():
        setting.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        assert_same(stock.draw(setting.pipe), expected)
        setting.pipe.disable_freeu()
        assert_same(stock.draw(setting.pipe), setting.guided)
        setting.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert all(getattr(block, "b1", None) is None for block in setting.network.up_blocks)


def style(unet: nn.Module) -> None:
    """Load a LoRA as pipe.load_lora_weights does, with the same weights for every network."""
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "conv1", "conv_in"]), "style")
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def warnings_of(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "selfnpo" and record.levelname == "WARNING"]


def test_a_style_lora_that_comes_changes_and_goes(setting, caplog):
    """It acts on both branches of a LoRA negative, and next to full weights on the positive alone."""
    networks = [copy.deepcopy(setting.network), copy.deepcopy(setting.pipe.unet)]
    for network in networks if setting.kind == "lora" else networks[1:]:
        style(network)
    handle = setting.attach()
    style(setting.pipe.unet)
    for weight in (1.0, 0.5):
        for network in (*networks, setting.pipe.unet):
            if network is not networks[0] or setting.kind == "lora":
                network.set_adapters("style", weight)
        expected = stock.reference(SD, *networks)
        assert_same(stock.draw(setting.pipe), expected)
        assert (expected - setting.guided).abs().max() > 0.05
    setting.pipe.unet.disable_adapters()
    assert_same(stock.draw(setting.pipe), setting.guided)
    setting.pipe.unet.enable_adapters()
    assert_same(stock.draw(setting.pipe), expected)
    setting.pipe.unet.unload_lora()
    assert_same(stock.draw(setting.pipe), setting.guided)
    handle.detach()
    assert_clean(setting.pipe.unet)
    said = [message for message in warnings_of(caplog) if "acts on the positive only" in message]
    assert len(said) == (0 if setting.kind == "lora" else 1)
    assert all(message.startswith("negative: a style LoRA") for message in said)


class Merging(BasicTransformerBlock):
    """A block that a program like tomesd has put in place of the stock one."""


def patch_class(unet: nn.Module) -> None:
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.__class__ = Merging


def patch_forward(unet: nn.Module) -> None:
    forward = unet.mid_block.forward
    unet.mid_block.forward = lambda *args, **kwargs: 1.5 * forward(*args, **kwargs)


def patch_hook(unet: nn.Module) -> None:
    unet.mid_block.register_forward_hook(lambda module, args, output: 1.5 * output)


class Stronger(AttnProcessor):
    def __call__(self, *args, **kwargs):
        return 1.5 * super().__call__(*args, **kwargs)


def patch_processor(unet: nn.Module) -> None:
    unet.set_attn_processor(Stronger())


PATCHES = {
    "class": (patch_class, "the class of mid_block.attentions.0.transformer_blocks.0, a Merging"),
    "forward": (patch_forward, "the replaced forward of mid_block"),
    "hook": (patch_hook, "a hook on mid_block"),
    "processor": (patch_processor, "the attention processor Stronger"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_change_that_acts_on_one_branch_is_said_once(setting, name, caplog):
    patch, words = PATCHES[name]
    networks = [copy.deepcopy(setting.network), copy.deepcopy(setting.pipe.unet)]
    for network in networks if setting.kind == "lora" else networks[1:]:
        patch(network)
    expected = stock.reference(SD, *networks)
    with setting.attach():
        stock.draw(setting.pipe)
        assert not warnings_of(caplog)
        patch(setting.pipe.unet)
        for _ in range(2):
            assert_same(stock.draw(setting.pipe), expected)
    said = warnings_of(caplog)
    assert len(said) == (0 if setting.kind == "lora" else 1)
    assert all(message.startswith(f"negative: {words}: this acts on the positive only") for message in said)


def test_offload_of_layers_is_no_change(setting, caplog):
    with setting.attach():
        setting.pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        three_times(setting)
    assert not warnings_of(caplog)


def test_another_memory_format(setting):
    with setting.attach():
        setting.pipe.unet.to(memory_format=torch.channels_last)
        three_times(setting)


def test_projections_fused_later_are_refused_or_harmless(setting):
    with setting.attach():
        setting.pipe.unet.fuse_qkv_projections()
        if setting.kind == "lora":
            with pytest.raises(UserError, match=r"^negative: the attention projections are fused"):
                stock.draw(setting.pipe)
        else:
            three_times(setting)
        setting.pipe.unet.unfuse_qkv_projections()
        three_times(setting)


def test_a_layer_of_a_lora_that_was_replaced_is_refused():
    setting = Setting("lora")
    with setting.attach():
        setting.pipe.unet.conv_out = copy.deepcopy(stock.build(SD).unet.conv_out)
        with pytest.raises(UserError, match=r"^negative: conv_out was replaced after the negative was attached"):
            stock.draw(setting.pipe)
