"""Full weights: which of a call's tensors are rows of the batch, and in which dtypes they come."""

from __future__ import annotations

import copy
import inspect

import pytest
import stock
import tiny
import torch
from attached import SD, Setting, assert_same
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from selfnpo_fast import GuidedSampler, attach_negative
from selfnpo_fast.models import FAMILIES
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.runtime.dtypes import network_dtype
from selfnpo_fast.runtime.errors import UserError


@pytest.fixture
def setting() -> Setting:
    return Setting("full")


# Rows by the names of arguments.


def test_every_argument_of_the_unet_is_named():
    """A new argument of diffusers' would be refused next to full weights where it has rows."""
    family = FAMILIES[SD]
    names = set(inspect.signature(UNet2DConditionModel.forward).parameters) - {"self"}
    rows = {name.partition(".")[0] for name in family.row_names}
    assert names == rows | {"sample", "return_dict"} | {"cross_attention_kwargs", "added_cond_kwargs"}


class Recorder:
    """The rows of the tensors that each of two networks is given by a name, at the first step."""

    def __init__(self, setting: Setting, name: str) -> None:
        self.seen = {"positive": [], "negative": []}
        names = list(inspect.signature(UNet2DConditionModel.forward).parameters)[1:]
        for branch, network in (("positive", setting.pipe.unet), ("negative", setting.network)):

            def record(module, args, kwargs, branch=branch):
                values = dict(zip(names, args, strict=False)) | kwargs
                self.seen[branch].append(values[name])

            network.register_forward_pre_hook(record, with_kwargs=True)


class Between(nn.Module):
    """What stands between a pipeline and its denoiser, and changes the arguments."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, unet: nn.Module, **changes) -> None:
        super().__init__()
        self.unet, self.config, self.changes = unet, unet.config, changes

    def forward(self, sample, timestep, **kwargs):
        changed = {name: change(sample, timestep) for name, change in self.changes.items()}
        timestep = changed.pop("timestep", timestep)
        return self.unet(sample, timestep, **(kwargs | changed))


def attached_between(setting: Setting, **changes):
    """An attached pipeline, the arguments of whose denoiser are changed."""
    handle = setting.attach()
    setting.pipe.unet = Between(setting.pipe.unet, **changes)
    return handle


def test_one_timestep_a_sample(setting):
    """Two prompts, four rows: each has a timestep of its own."""
    recorder = Recorder(setting, "timestep")
    expected = stock.build(SD)
    expected.unet = stock.TwoBranches(setting.network, expected.unet)
    with attached_between(setting, timestep=lambda x, t: t.expand(len(x)) + 0):
        assert_same(stock.draw(setting.pipe, prompts=2), stock.draw(expected, prompts=2))
    assert [t.shape for t in recorder.seen["negative"][: stock.STEPS]] == [(2,)] * stock.STEPS


def test_one_timestep_for_all_samples_is_not_cut(setting):
    with attached_between(setting, timestep=lambda x, t: t[None]):
        assert_same(stock.draw(setting.pipe), setting.guided)


class Table(AttnProcessor):
    """A user's attention processor with an argument of its own, which this one does not read."""

    def __call__(self, *args, table=None, **kwargs):
        return super().__call__(*args, **kwargs)


def with_table(setting: Setting, table) -> torch.Tensor:
    for network in (setting.pipe.unet, setting.network):
        network.set_attn_processor(Table())
    return stock.draw(setting.pipe, cross_attention_kwargs={"table": table})


@pytest.mark.parametrize("table", [torch.ones(3, 4), torch.tensor(2.0), torch.ones(1, 4), "a word", None])
def test_a_tensor_of_another_length_is_passed_whole(setting, table):
    with setting.attach():
        assert_same(with_table(setting, table), setting.guided)


@pytest.mark.parametrize("table", [torch.ones(2, 4), [torch.ones(2, 4)], {"deep": (torch.ones(2),)}])
def test_a_tensor_of_the_batchs_length_that_nobody_knows_is_refused(setting, table):
    with setting.attach():
        with pytest.raises(UserError, match=r"^negative: cross_attention_kwargs\.table.* has as many rows") as caught:
            with_table(setting, table)
        assert "use a LoRA as the negative" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_lora_needs_no_names():
    setting = Setting("lora")
    with setting.attach():
        assert_same(with_table(setting, torch.ones(2, 4)), setting.guided)


def test_masks_of_image_prompts_are_no_rows(setting):
    """Two adapters' masks and two rows: equal lengths, and only the rows are cut."""
    masks = torch.ones(2, 1, 4, 4)
    recorder = Recorder(setting, "cross_attention_kwargs")

    class Masked(AttnProcessor):
        def __call__(self, *args, ip_adapter_masks=None, **kwargs):
            assert ip_adapter_masks.data_ptr() == masks.data_ptr()
            return super().__call__(*args, **kwargs)

    for network in (setting.pipe.unet, setting.network):
        network.set_attn_processor(Masked())
    with setting.attach():
        assert_same(stock.draw(setting.pipe, cross_attention_kwargs={"ip_adapter_masks": masks}), setting.guided)
    seen = recorder.seen["positive"] + recorder.seen["negative"]
    assert len(seen) == 2 * stock.STEPS


def test_a_known_argument_with_an_odd_number_of_rows_is_refused(setting):
    changes = {"encoder_attention_mask": lambda x, t: torch.ones(3, 12)}
    expected = r"^negative: encoder_attention_mask has 3 rows in a batch of 2; give 1 or 2$"
    with attached_between(setting, **changes), pytest.raises(UserError, match=expected):
        stock.draw(setting.pipe)


# Networks some of whose layers stay in float32.


def half(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """In bfloat16 but for the first layer, as diffusers loads networks with such layers."""
    unet.to(torch.bfloat16)
    unet._keep_in_fp32_modules = ["conv_in"]
    unet.conv_in.float()
    unet.conv_in.register_forward_pre_hook(lambda layer, args: (args[0].float(),))
    unet.conv_in.register_forward_hook(lambda layer, args, output: output.to(torch.bfloat16))
    return unet


def dtypes(network: nn.Module) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in (*network.named_parameters(), *network.named_buffers())}


@torch.no_grad()
def test_inputs_have_the_dtype_of_the_network_and_not_of_its_first_layer():
    pipe = stock.build(SD)
    half(pipe.unet)
    assert pipe.unet.dtype == network_dtype(pipe.unet) == torch.bfloat16
    sampler = GuidedSampler.from_pipeline(pipe)
    assert sampler.dtype == torch.bfloat16
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([500, 20]), torch.randn(2, 12, tiny.WIDTH)
    ours = sampler.adapter.predict(pipe.unet, x, t, {"encoder_hidden_states": text})
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, pipe.unet(x.bfloat16(), t, text.bfloat16()).sample)


def test_a_network_that_says_its_dtype_is_believed():
    for dtype in (torch.float16, torch.float32):
        network = nn.Linear(2, 2)
        network.dtype = dtype
        assert network_dtype(network) == dtype
    assert network_dtype(nn.Linear(2, 2, dtype=torch.bfloat16)) == torch.bfloat16


@pytest.mark.parametrize("way", ["attached", "given as a module", "sampler"])
def test_a_second_network_takes_each_layers_own_precision(way):
    pipe = stock.build(SD)
    network = stock.negative("full", pipe)[1]
    first, reference = network.conv_in.weight.clone(), half(copy.deepcopy(network))
    half(pipe.unet)
    assert set(dtypes(pipe.unet).values()) == {torch.bfloat16, torch.float32}
    if way == "sampler":
        GuidedSampler.from_pipeline(pipe, Negative(source="full weights", network=network))
    else:
        attach_negative(pipe, network if way == "given as a module" else Negative(source="full", network=network))
    assert dtypes(network) == dtypes(reference)
    assert torch.equal(network.conv_in.weight, first), "not rounded on the way"
