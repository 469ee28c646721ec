"""The sampler's one rule: it draws with the pipeline it was made of, and notices every change."""

from __future__ import annotations

import copy

import pytest
import stock
import tiny
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import CLIPTextModel

from selfnpo_fast import GuidedSampler, attach_negative
from selfnpo_fast.guidance.sampler import SamplerConfig, start_noise
from selfnpo_fast.runtime.errors import UserError

PROMPTS, SEEDS, CPU = ["a cat", "two birds"], [11, 2**40], torch.device("cpu")
ARGUMENTS = {"seeds": SEEDS, "steps": 2, "guidance_scale": 4.0, "output": "pt", "height": 32, "width": 32}


def pipeline(name: str = "StableDiffusionPipeline"):
    return stock.build(name)


def by_diffusers(pipe) -> torch.Tensor:
    noise = start_noise(SEEDS, (4, 4, 4), CPU).to(pipe.unet.dtype)
    arguments = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt", "height": 32, "width": 32}
    return pipe(PROMPTS, latents=noise, **arguments).images * 2 - 1


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """A LoRA file on the UNet and the text encoder."""
    pipe, folder = pipeline(), tmp_path_factory.mktemp("style")
    parts = {}
    for part, targets in (("unet", ["to_q", "to_v"]), ("text_encoder", ["q_proj"])):
        torch.manual_seed(3)
        network = getattr(pipe, part)
        network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
        parts[f"{part}_lora_layers"] = get_peft_model_state_dict(network)
    StableDiffusionPipeline.save_lora_weights(folder, **parts)
    return folder


@torch.no_grad()
def write_past_the_version(network: nn.Module) -> None:
    """As PEFT's merging does."""
    for parameter in network.parameters():
        before = parameter._version
        parameter.data += 0.01
        assert parameter._version == before


def with_a_note(pipe) -> None:
    """An attribute that does not matter, and weights that do."""
    pipe.unet._note = "mine"
    write_past_the_version(pipe.unet)


@torch.no_grad()
def write(network: nn.Module) -> None:
    next(network.parameters()).mul_(1.5)


def textual_inversion(pipe) -> None:
    pipe.load_textual_inversion({"<blot>": torch.ones(1, tiny.WIDTH)}, token="<blot>")


def patch(pipe) -> None:
    original = pipe.unet.mid_block.forward
    pipe.unet.mid_block.forward = lambda *args, **kwargs: 2 * original(*args, **kwargs)


CHANGES = {
    "unet replaced": ("unet was replaced", lambda pipe: setattr(pipe, "unet", copy.deepcopy(pipe.unet))),
    "unet's weights": ("unet has changed", lambda pipe: write(pipe.unet)),
    "unet's data": ("unet has changed", lambda pipe: write_past_the_version(pipe.unet)),
    "unet's data and a note": ("unet has changed", with_a_note),
    "unet moved": ("unet has changed", lambda pipe: pipe.unet.to("meta")),
    "unet patched": ("unet has changed", patch),
    "unet hooked": (
        "unet has changed",
        lambda pipe: pipe.unet.conv_in.register_forward_hook(lambda module, args, out: out + 0.1),
    ),
    "unet's class": (
        "unet has changed",
        lambda pipe: setattr(pipe.unet.conv_out, "__class__", type("Other", (nn.Conv2d,), {})),
    ),
    "freeu": ("unet has changed", lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)),
    "processors": ("unet has changed", lambda pipe: pipe.unet.set_default_attn_processor()),
    "a layer": ("unet has changed", lambda pipe: setattr(pipe.unet, "conv_out", nn.Conv2d(8, 4, 3, padding=1))),
    "precision": ("vae has changed", lambda pipe: pipe.to(torch.bfloat16)),
    "device": ("vae has changed", lambda pipe: pipe.to("meta")),
    "scheduler replaced": (
        "scheduler was replaced",
        lambda pipe: setattr(pipe, "scheduler", DDIMScheduler.from_config(pipe.scheduler.config)),
    ),
    "scheduler's config": (
        r"scheduler has changed .*timestep_spacing: 'leading', now 'trailing'",
        lambda pipe: pipe.scheduler.register_to_config(timestep_spacing="trailing"),
    ),
    "scheduler's levels": (
        "scheduler has changed",
        lambda pipe: setattr(pipe.scheduler, "alphas_cumprod", pipe.scheduler.alphas_cumprod * 0.9),
    ),
    "vae replaced": ("vae was replaced", lambda pipe: setattr(pipe, "vae", tiny.vae())),
    "vae's weights": ("vae has changed", lambda pipe: write_past_the_version(pipe.vae)),
    "vae's config": ("vae has changed", lambda pipe: pipe.vae.register_to_config(scaling_factor=0.5)),
    "vae sliced": ("vae has changed .*use_slicing False, now True", lambda pipe: pipe.vae.enable_slicing()),
    "vae tiled": ("vae has changed .*use_tiling False, now True", lambda pipe: pipe.vae.enable_tiling()),
    "text encoder replaced": (
        "text_encoder was replaced",
        lambda pipe: setattr(pipe, "text_encoder", CLIPTextModel(pipe.text_encoder.config)),
    ),
    "text encoder's weights": ("text_encoder has changed", lambda pipe: write(pipe.text_encoder)),
    "tokenizer replaced": ("tokenizer was replaced", lambda pipe: setattr(pipe, "tokenizer", tiny.tokenizer())),
    "tokens added": (
        "tokenizer has changed .*number of tokens",
        lambda pipe: pipe.tokenizer.add_tokens(["<blot>"]),
    ),
    "textual inversion": ("text_encoder has changed", textual_inversion),
    "pipe's config": ("config has changed", lambda pipe: pipe.register_to_config(requires_safety_checker=True)),
}


OF_ALL_KINDS = [
    (name, kind)
    for name in ("unet's data", "unet patched", "freeu", "scheduler replaced", "vae replaced")
    for kind in ("lora", "full")
]


@pytest.mark.parametrize(("name", "kind"), [*((name, "none") for name in CHANGES), *OF_ALL_KINDS])
def test_every_change_is_noticed(name, kind):
    pipe = pipeline()
    message, change = CHANGES[name]
    negative = None if kind == "none" else stock.negative(kind, pipe)[0]
    sampler = GuidedSampler.from_pipeline(pipe, negative)
    sampler(PROMPTS, **ARGUMENTS)
    change(pipe)
    with pytest.raises(UserError, match=f"^pipe: its {message}.*; make a new sampler$") as caught:
        sampler(PROMPTS, **ARGUMENTS)
    assert "\n" not in str(caught.value)
    rows = {"encoder_hidden_states": torch.zeros(1, 12, tiny.WIDTH)}
    with pytest.raises(UserError, match=message):
        sampler.latents(rows, rows, [1], SamplerConfig(steps=1))
    with pytest.raises(UserError, match=message):
        sampler.images(rows, rows, [1], SamplerConfig(steps=1))


DRAWN_AGAIN = ["unet's data", "freeu", "vae replaced", "text encoder's weights", "scheduler's config"]


@pytest.mark.parametrize("name", DRAWN_AGAIN)
def test_a_new_sampler_draws_the_changed_pipeline(name):
    pipe = pipeline()
    before = GuidedSampler.from_pipeline(pipe)(PROMPTS, **ARGUMENTS).images
    CHANGES[name][1](pipe)
    after = GuidedSampler.from_pipeline(pipe)(PROMPTS, **ARGUMENTS).images
    assert_same(after, by_diffusers(pipe))
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["none", "lora", "full"])
def test_adapters_that_are_loaded_scaled_and_removed_are_noticed(style, kind):
    pipe = pipeline()
    negative = None if kind == "none" else stock.negative(kind, pipe)[0]

    def noticed_by(sampler: GuidedSampler) -> GuidedSampler:
        with pytest.raises(UserError, match=r"pipe: its (unet|text_encoder) has changed .*; make a new sampler"):
            sampler(PROMPTS, **ARGUMENTS)
        new = GuidedSampler.from_pipeline(pipe, negative)
        new(PROMPTS, **ARGUMENTS)
        return new

    sampler = GuidedSampler.from_pipeline(pipe, negative)
    sampler(PROMPTS, **ARGUMENTS)
    pipe.load_lora_weights(style, adapter_name="style")
    sampler = noticed_by(sampler)
    pipe.set_adapters(["style"], [0.5])
    sampler = noticed_by(sampler)
    pipe.disable_lora()
    sampler = noticed_by(sampler)
    pipe.enable_lora()
    sampler = noticed_by(sampler)
    pipe.unload_lora_weights()
    noticed_by(sampler)


def test_a_lora_that_was_fused_and_taken_off_between_two_calls_is_noticed(style):
    """All modules are back where they were; only the numbers in the weights differ."""
    pipe = pipeline()
    sampler = GuidedSampler.from_pipeline(pipe)
    sampler(PROMPTS, **ARGUMENTS)
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    with pytest.raises(UserError, match="has changed since the sampler was made"):
        sampler(PROMPTS, **ARGUMENTS)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_calls_of_the_pipeline_itself_are_no_change(name, style):
    pipe = pipeline(name)
    if name == "StableDiffusionPipeline":
        pipe.load_lora_weights(style, adapter_name="style")
    sampler = GuidedSampler.from_pipeline(pipe)
    first = sampler(PROMPTS, **ARGUMENTS).images
    assert_same(first, by_diffusers(pipe))
    pipe(PROMPTS, num_inference_steps=1, cross_attention_kwargs={"scale": 0.3}, output_type="latent")
    with attach_negative(pipe, stock.negative("lora", pipe)[0] if "XL" in name else stock.negative("full", pipe)[0]):
        with pytest.raises(UserError, match="pipe: its unet has changed"):
            sampler(PROMPTS, **ARGUMENTS)
    assert torch.equal(sampler(PROMPTS, **ARGUMENTS).images, first), "detached, it is as it was"


def test_a_negative_network_of_the_callers_is_watched_too():
    pipe = pipeline()
    _, network = stock.negative("full", pipe)
    sampler = GuidedSampler.from_pipeline(pipe, network)
    sampler(PROMPTS, **ARGUMENTS)
    write_past_the_version(network)
    with pytest.raises(UserError, match=r"negative: its network has changed .*; make a new sampler"):
        sampler(PROMPTS, **ARGUMENTS)


def test_what_the_sampler_does_not_use_may_change():
    pipe = pipeline()
    sampler = GuidedSampler.from_pipeline(pipe)
    first = sampler(PROMPTS, **ARGUMENTS).images
    pipe.safety_checker, pipe.unet._note = nn.Identity(), "mine"
    assert torch.equal(sampler(PROMPTS, **ARGUMENTS).images, first)


# Networks whose module tree is copied: with a LoRA, or compiled.


def patched_by_closure(unet: nn.Module) -> None:
    original = unet.forward
    unet.forward = lambda *args, **kwargs: original(*args, **kwargs)


def patched_below(unet: nn.Module) -> None:
    block = unet.mid_block
    block.forward = lambda *args, forward=block.forward, **kwargs: forward(*args, **kwargs)


def hooked(unet: nn.Module) -> None:
    """A cache in the way of DeepCache: a hook that computes with another layer of the network."""
    unet.conv_out.register_forward_pre_hook(lambda module, args: (args[0] + 0 * unet.conv_in.weight.sum(),))


@pytest.mark.parametrize("patch", [patched_by_closure, patched_below, hooked])
def test_functions_that_reach_back_into_the_original_network_are_refused(patch):
    """In a copy of the module tree the negative would have no effect at all."""
    pipe = pipeline()
    low, full = (stock.negative(kind, pipe)[0] for kind in ("lora", "full"))
    whole = GuidedSampler.from_pipeline(pipe, full)(PROMPTS, **ARGUMENTS).images
    patch(pipe.unet)
    with pytest.raises(UserError, match=r"^pipe: its unet has another forward.*use attach_negative") as caught:
        GuidedSampler.from_pipeline(pipe, low)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^pipe: its unet has another forward"):
        GuidedSampler.from_pipeline(pipe, compile="default")
    # Nothing is copied here, and the patch is at work.
    assert_same(GuidedSampler.from_pipeline(pipe, full)(PROMPTS, **ARGUMENTS).images, whole)
    with attach_negative(pipe, low):
        assert_same(by_diffusers(pipe), whole)


def test_methods_of_the_network_itself_and_harmless_hooks_are_copied():
    """accelerate leaves a network's own bound method as its forward."""
    pipe = pipeline()
    low, full = (stock.negative(kind, pipe)[0] for kind in ("lora", "full"))
    whole = GuidedSampler.from_pipeline(pipe, full)(PROMPTS, **ARGUMENTS).images
    pipe.unet.forward = pipe.unet.forward
    pipe.unet.mid_block.forward = pipe.unet.mid_block.forward
    seen = []
    pipe.unet.conv_in.register_forward_hook(lambda module, args, out: seen.append(module))
    assert_same(GuidedSampler.from_pipeline(pipe, low)(PROMPTS, **ARGUMENTS).images, whole)
    assert seen
    assert pipe.unet.conv_in not in seen


def test_a_pipeline_that_was_loaded_in_inference_mode_is_served():
    """torch counts no writes to its weights; its pictures are those of any other."""
    expected = GuidedSampler.from_pipeline(pipeline())(PROMPTS, **ARGUMENTS).images
    with torch.inference_mode():
        pipe = pipeline()
    assert next(pipe.unet.parameters()).is_inference()
    sampler = GuidedSampler.from_pipeline(pipe)
    assert_same(sampler(PROMPTS, **ARGUMENTS).images, expected)
    with torch.inference_mode():
        pipe.unet.conv_in.weight.add_(1)
    with pytest.raises(UserError, match="unet has changed since the sampler was made"):
        sampler(PROMPTS, **ARGUMENTS)
