"""attach_negative on pipelines that are moved, offloaded, saved, compiled, shared, and detached."""

from __future__ import annotations

import copy
import gc
import logging
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import stock
import tiny
import torch
from attached import KINDS, SD, Setting, assert_clean, assert_same, three_times
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from selfnpo_fast import attach_negative
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.runtime.errors import UserError


@pytest.fixture(params=KINDS)
def setting(request) -> Setting:
    return Setting(request.param)


def test_a_handle_detaches_once_and_leaves_nothing(setting):
    forward, unet, components = setting.pipe.unet.forward, setting.pipe.unet, dict(setting.pipe.components)
    with setting.attach() as handle:
        assert handle.attached
        assert setting.pipe.unet is unet
        assert unet.forward == forward
        assert setting.pipe.components == components
        assert_same(stock.draw(setting.pipe), setting.guided)
    assert not handle.attached
    handle.detach()
    assert_clean(unet)
    assert_same(stock.draw(setting.pipe), setting.plain)
    with setting.attach():
        assert_same(stock.draw(setting.pipe), setting.guided)


def test_an_error_in_the_block_detaches_too(setting):
    with pytest.raises(RuntimeError, match="on purpose"), setting.attach():
        raise RuntimeError("on purpose")
    assert_clean(setting.pipe.unet)


def test_a_second_negative_is_refused(setting):
    with setting.attach():
        for kind in KINDS:
            with pytest.raises(UserError, match=r"^pipe: its unet has a negative already") as caught:
                attach_negative(setting.pipe, stock.negative(kind, stock.build(SD))[0])
            assert "\n" not in str(caught.value)
        sibling = StableDiffusionImg2ImgPipeline(**setting.pipe.components, requires_safety_checker=False)
        with pytest.raises(UserError, match=r"^pipe: its unet has a negative already"):
            setting.attach(sibling)
        assert_same(stock.draw(setting.pipe), setting.guided)


def test_a_second_negative_on_the_network_inside_of_a_compiled_one_is_refused(setting):
    sibling = StableDiffusionPipeline(**setting.pipe.components, requires_safety_checker=False)
    # Never called, so nothing is compiled.
    setting.pipe.unet = torch.compile(setting.pipe.unet, backend="eager")
    with setting.attach(), pytest.raises(UserError, match=r"^pipe: its unet has a negative already"):
        setting.attach(sibling)
    assert_clean(sibling.unet)


def test_the_denoiser_as_its_own_negative_is_refused():
    pipe = stock.build(SD)
    with pytest.raises(UserError, match=r"^negative: it is the pipeline's own denoiser"):
        attach_negative(pipe, Negative(source="itself", network=pipe.unet))
    assert_clean(pipe.unet)


def test_a_lora_that_does_not_fit_leaves_nothing():
    pipe = stock.build(SD)
    deltas = stock.low_rank(pipe.unet)
    deltas["up_blocks.9.resnets.0.conv1"] = next(iter(deltas.values()))
    with pytest.raises(UserError, match=r"the model: it has no up_blocks\.9\.resnets\.0\.conv1"):
        attach_negative(pipe, Negative(source="another model's", deltas=deltas))
    assert_clean(pipe.unet)


def test_the_negatives_forwards_are_counted(setting):
    """Full weights: a guided step is a forward of each network, on half the rows.

    A LoRA: a guided step is one forward on all rows.
    """
    rows = []
    setting.pipe.unet.conv_in.register_forward_hook(lambda layer, args, output: rows.append(("positive", len(output))))
    if setting.negative.network is not None:
        count = setting.negative.network.conv_in.register_forward_hook
        count(lambda layer, args, output: rows.append(("negative", len(output))))
    with setting.attach():
        stock.draw(setting.pipe, prompts=2)
        step = [("positive", 4)] if setting.kind == "lora" else [("positive", 2), ("negative", 2)]
        assert rows == step * stock.STEPS
        rows.clear()
        stock.draw(setting.pipe, prompts=2, guidance_scale=1.0)
        assert rows == [("positive", 2)] * stock.STEPS


def test_what_was_attached_is_said_once(setting, caplog):
    with caplog.at_level(logging.INFO, logger="selfnpo"), setting.attach():
        stock.draw(setting.pipe)
    (record,) = caplog.records
    assert setting.negative.source in record.message
    assert "(alpha 1, beta 1)" in record.message
    assert ("one network computes both branches" if setting.kind == "lora" else "a second network") in record.message


def call_directly(unet: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 12, tiny.WIDTH, generator=generator)
    with torch.no_grad():
        return unet(x, 100, text).sample


def test_called_outside_of_a_pipeline_the_denoiser_is_the_positive_and_says_so(setting, caplog):
    plain = call_directly(setting.pipe.unet)
    with setting.attach():
        stock.draw(setting.pipe)
        caplog.clear()  # of what attaching logs where another test has turned INFO on
        with caplog.at_level(logging.WARNING, logger="selfnpo"):
            assert torch.equal(call_directly(setting.pipe.unet), plain)
            call_directly(setting.pipe.unet)
    assert [record.message for record in caplog.records] == [
        "the denoiser is called outside of a pipeline's call: its negative is not used there"
    ]


def test_a_dictionary_output_is_joined_too(setting):
    class Dictionary(nn.Module):
        """Asks a pipeline's denoiser for a UNet2DConditionOutput."""

        config, dtype, device = setting.pipe.unet.config, torch.float32, torch.device("cpu")

        def forward(self, *args, return_dict, **kwargs):
            return (unet(*args, **kwargs).sample,)

    unet = setting.pipe.unet
    with setting.attach():
        setting.pipe.unet = Dictionary()
        assert_same(stock.draw(setting.pipe), setting.guided)


def break_next(unet: nn.Module, error: BaseException) -> None:
    """The next forward of the denoiser fails half-way."""

    def fail(module, args) -> None:
        hook.remove()
        raise error

    hook = unet.mid_block.register_forward_pre_hook(fail)


@pytest.mark.parametrize("error", [RuntimeError("on purpose"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_call_that_fails_leaves_no_state(setting, error):
    plain = call_directly(setting.pipe.unet)
    with setting.attach():
        break_next(setting.pipe.unet, error)
        with pytest.raises(type(error)):
            stock.draw(setting.pipe)
        assert torch.equal(call_directly(setting.pipe.unet), plain)
        assert_same(stock.draw(setting.pipe), setting.guided)


def test_an_odd_number_of_rows_under_guidance_is_refused(setting):
    class Odd(nn.Module):
        config, dtype, device = setting.pipe.unet.config, torch.float32, torch.device("cpu")

        def forward(self, x, t, encoder_hidden_states, **kwargs):
            return unet(x[:1], t, encoder_hidden_states[:1], **kwargs)

    unet = setting.pipe.unet
    with setting.attach():
        setting.pipe.unet = Odd()
        with pytest.raises(UserError, match="guidance is on, but the denoiser was given 1 rows"):
            stock.draw(setting.pipe)


# Moves and changes of the pipeline while a negative is attached: three images in a row in each.


@pytest.mark.parametrize("order", ["before", "after"])
def test_model_offload(setting, order):
    if order == "before":
        setting.attach()
    setting.pipe.enable_model_cpu_offload(device="cpu")
    if order == "after":
        setting.attach()
    three_times(setting)


@pytest.mark.parametrize("order", ["before", "after"])
def test_under_model_offload_the_negative_moves_with_the_denoiser(order, monkeypatch):
    """Every move of the denoiser is a move of the negative: both leave the accelerator together."""
    setting = Setting("full")
    moved = []
    apply = UNet2DConditionModel._apply

    def recording(self, *args, **kwargs):
        moved.append("positive" if self is setting.pipe.unet else "negative")
        return apply(self, *args, **kwargs)

    if order == "after":
        setting.pipe.enable_model_cpu_offload(device="cpu")
    setting.attach()
    if order == "before":
        setting.pipe.enable_model_cpu_offload(device="cpu")
    monkeypatch.setattr(UNet2DConditionModel, "_apply", recording)
    for _ in range(3):
        moved.clear()
        stock.draw(setting.pipe)
        assert moved
        assert moved == ["positive", "negative"] * (len(moved) // 2)


def devices(network: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*network.parameters(), *network.buffers())}


def test_the_negative_is_where_the_denoiser_is(setting):
    """The meta device stands for an accelerator."""
    with setting.attach():
        setting.pipe.unet.to("meta")
        assert devices(setting.pipe.unet) == {"meta"}
        if setting.negative.network is not None:
            assert devices(setting.negative.network) == {"meta"}


def test_the_negative_takes_the_pipelines_precision(setting):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    with setting.attach():
        single = stock.draw(setting.pipe, latents=latents)
        setting.pipe.to(torch.float64)
        doubled = stock.draw(setting.pipe, latents=latents.double())
        assert doubled.dtype == torch.float64
        assert_same(doubled.float(), single)
        setting.pipe.to(torch.float32)
        three_times(setting)


def test_attached_to_a_pipeline_of_another_precision():
    setting = Setting("full")
    setting.negative.network.to(torch.float64)
    with setting.attach():
        three_times(setting)


def test_a_negative_that_was_left_behind_is_named():
    setting = Setting("full")
    with setting.attach():
        setting.negative.network.to("meta")
        with pytest.raises(UserError, match=r"^negative: it is on meta, the denoiser computes on cpu: ") as caught:
            stock.draw(setting.pipe)
        assert "\n" not in str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_saved_pipeline_is_the_original(setting, tmp_path):
    stock.draw(setting.pipe)  # which leaves its truncation in the tokenizer
    setting.pipe.save_pretrained(tmp_path / "original")
    with setting.attach():
        stock.draw(setting.pipe)
        setting.pipe.save_pretrained(tmp_path / "attached")
        three_times(setting)
    assert contents(tmp_path / "attached") == contents(tmp_path / "original")


def test_a_change_of_attention_processors(setting):
    with setting.attach():
        setting.pipe.unet.set_attn_processor(AttnProcessor())
        three_times(setting)
        setting.pipe.unet.set_default_attn_processor()
        setting.pipe.enable_attention_slicing()
        three_times(setting)


# Pipelines that share the denoiser.


def test_a_pipeline_made_from_this_one_has_its_own_guidance(setting):
    """It is called with guidance where the first was called without, and the other way round."""
    name = "StableDiffusionImg2ImgPipeline"
    expected = stock.reference(name, setting.network, setting.pipe.unet)
    with setting.attach():
        stock.draw(setting.pipe, guidance_scale=1.0)
        other = StableDiffusionImg2ImgPipeline.from_pipe(setting.pipe)
        other.set_progress_bar_config(disable=True)
        assert other.unet is setting.pipe.unet
        assert_same(stock.draw(other), expected)
        stock.draw(setting.pipe)
        unguided = stock.draw(other, guidance_scale=1.0, prompts=2)
    assert torch.equal(unguided, stock.draw(other, guidance_scale=1.0, prompts=2))


class Reordered(StableDiffusionPipeline):
    """A user's class, which may do anything."""


def test_a_pipeline_of_an_unknown_class_that_shares_the_denoiser_is_refused_when_called(setting):
    other = Reordered(**setting.pipe.components, requires_safety_checker=False)
    with setting.attach():
        with pytest.raises(UserError, match=r"^pipe: Reordered is not supported: .* made from StableDiffusionPipeline"):
            other("a cat", num_inference_steps=2, output_type="latent")
        assert_same(stock.draw(setting.pipe), setting.guided)


def test_two_pipelines_on_one_denoiser_in_two_threads(setting):
    def sibling() -> StableDiffusionPipeline:
        # Neither a scheduler nor a tokenizer is thread-safe.
        separate = {"scheduler": tiny.scheduler(), "tokenizer": tiny.tokenizer()}
        pipe = StableDiffusionPipeline(**(setting.pipe.components | separate), requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    calls = [{}, {"guidance_scale": 1.0, "prompts": 2}, {"prompts": 2}]
    pipes, wrong = [sibling() for _ in calls], []
    with setting.attach():
        expected = [stock.draw(pipe, **call) for pipe, call in zip(pipes, calls, strict=True)]
        start = threading.Barrier(len(calls))

        def draw(pipe, call: dict, images: torch.Tensor) -> None:
            start.wait()
            for _ in range(3):
                if not torch.allclose(stock.draw(pipe, **call), images, rtol=0, atol=1e-4):
                    wrong.append(call)

        threads = [threading.Thread(target=draw, args=args) for args in zip(pipes, calls, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert_same(expected[0], setting.guided)


# Compiled denoisers.


def whole(pipe) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)


def in_place(pipe) -> None:
    pipe.unet.compile(backend="eager", fullgraph=True)


def blocks(pipe) -> None:
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)


COMPILED = [
    pytest.param(kind, how, order, id=f"{kind}-{how.__name__}-{order}", marks=() if how is blocks else pytest.mark.slow)
    for kind in KINDS
    for how in (whole, in_place, blocks)
    for order in ("before", "after")
]


@pytest.mark.parametrize(("kind", "how", "order"), COMPILED)
def test_a_compiled_denoiser(kind, how, order):
    """Compiled and called before the negative is attached, or compiled with it, in one graph."""
    torch._dynamo.reset()
    setting = Setting(kind, shallow=True)
    unet = setting.pipe.unet
    if order == "before":
        how(setting.pipe)
        assert_same(stock.draw(setting.pipe), setting.plain)
    handle = setting.attach()
    if order == "after":
        how(setting.pipe)
    three_times(setting)
    handle.detach()
    assert_same(stock.draw(setting.pipe), setting.plain)
    assert_clean(unet)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_a_pipeline_without_the_wrapper_shares_the_negative(compiled):
    """It was made before torch.compile's wrapper, in whose place the negative is attached."""
    torch._dynamo.reset()
    setting = Setting("lora", shallow=True)
    sibling = StableDiffusionPipeline(**setting.pipe.components, requires_safety_checker=False)
    sibling.set_progress_bar_config(disable=True)
    inner = sibling.unet
    setting.pipe.unet = torch.compile(inner, backend="eager", fullgraph=True)
    with setting.attach():
        for _ in range(2):
            assert_same(stock.draw(sibling), setting.guided)
            if compiled:
                assert_same(stock.draw(setting.pipe), setting.guided)
    assert_clean(inner)
    assert_same(stock.draw(sibling), setting.plain)


# IP-Adapter and other LoRAs on the positive.


def ip_adapter(unet: nn.Module) -> dict:
    """The weights of an image prompt adapter.

    They are a projection to four tokens, and keys and values for each attention.
    """
    generator = torch.Generator().manual_seed(8)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    attentions, layers = {}, [name for name in unet.attn_processors if "attn2" in name]
    for i, name in enumerate(layers):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for side in ("k", "v"):
            attentions[f"{2 * i + 1}.to_{side}_ip.weight"] = random(width, tiny.WIDTH)
    projection = {"proj.weight": random(4 * tiny.WIDTH, 6), "proj.bias": random(4 * tiny.WIDTH)}
    projection |= {"norm.weight": torch.ones(tiny.WIDTH), "norm.bias": torch.zeros(tiny.WIDTH)}
    return {"image_proj": projection, "ip_adapter": attentions}


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_image_prompt(setting, order):
    embeds = [torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(2))]
    weights = ip_adapter(setting.pipe.unet)
    network = copy.deepcopy(setting.network)
    network._load_ip_adapter_weights([weights])
    prompted = copy.deepcopy(setting.pipe.unet)
    prompted._load_ip_adapter_weights([weights])
    call = {"ip_adapter_image_embeds": embeds}
    expected = stock.reference(SD, network, prompted, **call)
    if order == "before":
        setting.pipe.unet._load_ip_adapter_weights([weights])
    processors = setting.negative.network.attn_processors if setting.negative.network is not None else None
    with setting.attach():
        if order == "after":
            assert_same(stock.draw(setting.pipe), setting.guided)
            setting.pipe.unet._load_ip_adapter_weights([weights])
        assert_same(stock.draw(setting.pipe, **call), expected)
        assert (expected - setting.guided).abs().max() > 0.1
        setting.pipe.unload_ip_adapter()
        assert_same(stock.draw(setting.pipe), setting.guided)
    if processors is not None:
        assert setting.negative.network.attn_processors == processors


def test_image_prompts_that_are_kept_in_the_network_need_a_lora(setting):
    """FaceID Plus: a part of the prompt is an attribute of the projection, with all rows."""
    setting.pipe.unet._load_ip_adapter_weights([ip_adapter(setting.pipe.unet)])
    call = {"ip_adapter_image_embeds": [torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(2))]}
    with setting.attach():
        expected = stock.draw(setting.pipe, **call)
        setting.pipe.unet.encoder_hid_proj.image_projection_layers[0].clip_embeds = torch.ones(2, 1, 1, 6)
        if setting.kind == "full":
            with pytest.raises(UserError, match=r"^negative: the image prompts are FaceID Plus's.* use a LoRA"):
                stock.draw(setting.pipe, **call)
        else:
            assert_same(stock.draw(setting.pipe, **call), expected)


def test_a_dropped_pipeline_is_collected(setting, caplog):
    """Nothing outside the pipeline holds on to the hooks."""
    with caplog.at_level(logging.WARNING, logger="selfnpo"):  # pytest keeps records with their arguments
        setting.attach()
    alive = weakref.ref(setting.pipe.unet)
    del setting.pipe
    gc.collect()
    assert alive() is None


def test_a_detached_negative_is_collected():
    """Also where the handle is kept, as a notebook keeps it."""
    setting = Setting("full")
    given = Negative(source="full weights", network=copy.deepcopy(setting.network))
    alive, handle = weakref.ref(given.network), attach_negative(setting.pipe, given)
    del given
    stock.draw(setting.pipe)
    handle.detach()
    gc.collect()
    assert alive() is None


def test_the_public_names_import_nothing_heavy():
    code = (
        "import sys\n"
        "from selfnpo_fast import GuidedSampler, attach_negative\n"
        "print([name for name in ('deepspeed', 'bitsandbytes', 'gradio') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_unknown_public_name_is_an_attribute_error():
    import selfnpo_fast

    assert "attach_negative" in dir(selfnpo_fast)
    with pytest.raises(AttributeError, match="has no attribute 'attach_positive'"):
        _ = selfnpo_fast.attach_positive
