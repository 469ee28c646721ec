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
