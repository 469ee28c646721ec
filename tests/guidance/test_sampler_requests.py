"""Requests that a sampler cannot draw, and results that are no pictures: one line each."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import stock
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.hooks import apply_group_offloading

from selfnpo_fast import GuidedSampler
from selfnpo_fast.guidance.sampler import SamplerConfig, start_noise
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.runtime.errors import RunError, UserError
from selfnpo_fast.runtime.limits import MAX_PROMPT_CHARACTERS

PROMPTS, SEEDS = ["a cat", "two birds"], [11, 2**40]
ARGUMENTS = {"seeds": SEEDS, "steps": 2, "guidance_scale": 4.0, "output": "latent", "height": 32, "width": 32}


@pytest.fixture(scope="module")
def pipe():
    return stock.build("StableDiffusionPipeline")


@pytest.fixture(scope="module")
def sampler(pipe):
    return GuidedSampler.from_pipeline(pipe, branches="batched")


def draw(sampler: GuidedSampler, prompts=PROMPTS, **options) -> torch.Tensor:
    return sampler(prompts, **ARGUMENTS | options).images


NAN, INF = math.nan, math.inf
IMPOSSIBLE = {
    "steps": [0, -1, 2.5, "4", True, None, NAN, [4], 10**9, 1000, 10**400],
    "guidance_scale": [-0.1, NAN, INF, -INF, "7", None, True, [4.0], 1j, 10**400],
    "guidance_interval": [(0.7, 0.2), (0.1,), (0, 1, 1), (NAN, 1), (0, NAN), (-0.1, 1), "01", None, 0.5, ("0", 1)],
    "guidance_rescale": [-0.1, 1.5, NAN, "0", None, False],
    "eta": [-1, 2, NAN, "0", None],
    "solver": ["heun", "", None, 1, ["ddim"], "DDIM"],
    "batch_size": [0, -1, 1.5, "2", True, NAN, 2**70],
    "use_dynamic_cfg": [None, 1, "yes"],
    "seeds": [
        -1, 2**63, 2**63 - 1, 1.5, "7", True, NAN, [1], [1, 2, 3], [1.5, 2], [True, 2], [1, None], ["1", "2"], {1: 2},
        [1, 2**63], [-1, 2], torch.tensor([1.0, 2.0]), torch.Generator(), np.array([1.5, 2.5]), b"12",
        torch.tensor(1.5), np.array(None),
    ],
    "height": [0, -64, 33, 32.5, 32.0, "32", True, NAN, 2**40, [32]],
    "width": [0, -64, 33, 32.5, "32", True, 2**40],
    "frames": [0, -1, 2, 1.5, "1", True, 2**40],
    "output": ["np", "", None, 1, ["pil"], np.array(["pil", "pt"])],
    "negative_prompt": [1, [], ["a", "b", "c"], [None, "b"], b"a", {"a": 1}, [["a"], "b"], "x" * 10_001, "\ud800"],
    "prompts": [None, 1, [], [1], b"cat", {"a": 1}, [["a"]], ["a", None], "x" * 10_001, ["a", "x" * 10_001], "\udc00"],
    "progress": [1, "print"],
    "cancelled": [True],
    "num_inference_steps": [4],
    "negative": ["runs/x"],
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_arguments_are_one_line_that_names_them(sampler, name, monkeypatch):
    monkeypatch.setattr(sampler, "_turn", lambda: pytest.fail("it has taken the lock"))
    for value in IMPOSSIBLE[name]:
        with pytest.raises(UserError, match=f"^{name}: ") as caught:
            draw(sampler, value) if name == "prompts" else draw(sampler, **{name: value})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300


def test_what_is_possible_in_other_types_is_drawn(sampler):
    expected = draw(sampler, guidance_interval=(0.0, 0.5))
    same = [
        {"prompts": np.array(PROMPTS)}, {"seeds": np.array(SEEDS)}, {"seeds": torch.tensor(SEEDS)},
        {"seeds": tuple(SEEDS)}, {"steps": np.int64(2)},
        {"guidance_scale": 4}, {"guidance_scale": np.float64(4)}, {"guidance_scale": Fraction(4)},
        {"height": np.int32(32)}, {"prompts": tuple(PROMPTS)}, {"prompts": (text for text in PROMPTS)},
        {"batch_size": np.int64(4)}, {"guidance_interval": [0, 0.5]},
    ]  # fmt: skip
    for options in same:
        assert torch.equal(draw(sampler, **{"guidance_interval": (0.0, 0.5)} | options), expected)
    draw(sampler, ["x" * MAX_PROMPT_CHARACTERS, ""], negative_prompt="x" * MAX_PROMPT_CHARACTERS)


@pytest.mark.parametrize("kind", ["none", "lora", "full"])
def test_a_scale_up_to_1_is_the_positive_alone(pipe, kind):
    """As in diffusers, whose pipelines guide above 1 only: distilled models are drawn with 0."""
    negative, network = (None, pipe.unet) if kind == "none" else stock.negative(kind, pipe)
    rows, ran = [], []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    if kind == "full":
        network.register_forward_pre_hook(lambda *_: ran.append("the negative"))
    sampler = GuidedSampler.from_pipeline(pipe, negative)
    noise = start_noise(SEEDS, (4, 4, 4), torch.device("cpu"))
    stock_call = {"num_inference_steps": 2, "latents": noise, "output_type": "latent", "height": 32, "width": 32}
    for scale in (0, 0.5, 1):
        theirs = pipe(PROMPTS, guidance_scale=scale, **stock_call).images
        torch.testing.assert_close(draw(sampler, guidance_scale=scale), theirs, rtol=0, atol=1e-5)
    hook.remove()
    assert set(rows) == {len(PROMPTS)}
    assert not ran


@pytest.mark.parametrize("first", [True, False])
def test_calls_inside_and_outside_of_inference_mode_mix(pipe, first):
    sampler, pictures = GuidedSampler.from_pipeline(pipe), []
    for inside in (first, not first, first):
        with torch.inference_mode(inside):
            pictures.append(draw(sampler))
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])


CONSTRUCTOR = {
    "compile": ["fast", None, True, 1], "branches": ["both", None, 2], "graphs": ["on", None, 1],
    "max_shapes": [0, -1, 1.5, True, "4", NAN], "solver": ["heun", None, 3],
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTRUCTOR)
def test_impossible_options_of_a_sampler_are_named(pipe, name):
    for value in CONSTRUCTOR[name]:
        with pytest.raises(UserError, match=f"^{name}: "):
            GuidedSampler.from_pipeline(pipe, **{name: value})


@pytest.mark.parametrize(
    ("options", "name"),
    [({"alpha": value}, "alpha") for value in (None, "1", NAN, 2, True)]
    + [({"beta": value}, "beta") for value in (None, -1, [1])]
    + [({"negative": value}, "negative") for value in (3, b"x", {}, object())],
)
def test_impossible_negatives_are_named(pipe, options, name):
    with pytest.raises(UserError, match=f"^{name}: ") as caught:
        GuidedSampler.from_pipeline(pipe, **{"negative": "no/such/folder/x"} | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("thing", [None, "a folder", 3, torch.nn.Linear(1, 1)])
def test_what_is_no_pipeline_is_refused(thing):
    with pytest.raises(UserError, match=r"^pipe: a .* is not supported"):
        GuidedSampler.from_pipeline(thing)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "unet", "scheduler"])
def test_a_pipeline_without_a_part_is_refused(part):
    pipe = stock.build("StableDiffusionPipeline")
    setattr(pipe, part, None)
    with pytest.raises(UserError, match=f"^pipe: it has no {part}; load it with all its parts$"):
        GuidedSampler.from_pipeline(pipe)


def test_sdxl_without_its_first_text_encoder_is_refused():
    whole = stock.build("StableDiffusionXLPipeline").components
    pipe = StableDiffusionXLPipeline(**whole | {"text_encoder": None, "tokenizer": None})
    with pytest.raises(UserError, match=r"^pipe: it has no text_encoder"):
        GuidedSampler.from_pipeline(pipe)


# Networks that are not where, or what, they seem to be.


def cast_layerwise(pipe) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def group_offload(pipe) -> None:
    options = {"offload_type": "leaf_level", "onload_device": torch.device("cpu")}
    apply_group_offloading(pipe.unet, offload_device=torch.device("cpu"), **options)


HOOKED = {
    "cast": (cast_layerwise, "the layers of its unet are offloaded, cast or cached one by one"),
    "cast vae": (
        lambda pipe: pipe.vae.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32),
        "the layers of its vae are offloaded, cast",
    ),
    "group offload": (group_offload, "the layers of its unet are offloaded"),
    "model offload": (lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), "its vae is offloaded"),
    "sequential offload": (lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"), "its vae is offloaded"),
    "another device": (lambda pipe: pipe.vae.to("meta"), "its vae is on meta, its unet on cpu; move the whole"),
}


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_cast_and_offloaded_networks_are_one_line(name, kind):
    pipe = stock.build("StableDiffusionPipeline")
    negative, _ = stock.negative(kind, pipe)
    change, message = HOOKED[name]
    change(pipe)
    with pytest.raises(UserError, match=f"^pipe: {message}") as caught:
        GuidedSampler.from_pipeline(pipe, negative)
    assert "\n" not in str(caught.value)


def test_layers_that_are_cast_later_are_noticed():
    pipe = stock.build("StableDiffusionPipeline")
    sampler = GuidedSampler.from_pipeline(pipe)
    cast_layerwise(pipe)
    with pytest.raises(UserError, match=r"^pipe: its unet has changed .*; make a new sampler$"):
        draw(sampler)


# Callbacks.


@pytest.mark.parametrize("name", ["progress", "cancelled"])
@pytest.mark.parametrize("call", ["again", "latents", "close"])
def test_a_callback_that_calls_its_sampler_is_refused(pipe, name, call):
    sampler, other = (GuidedSampler.from_pipeline(pipe, branches="batched") for _ in range(2))
    expected = draw(sampler)
    rows = {"encoder_hidden_states": torch.zeros(1, 12, 16)}
    calls = {
        "again": lambda: draw(sampler),
        "latents": lambda: sampler.latents(rows, rows, [1], SamplerConfig(steps=1)),
        "close": sampler.close,
    }
    with pytest.raises(UserError, match=r"^sampler: progress and cancelled may not call the sampler that calls them$"):
        draw(sampler, **{name: lambda *_: calls[call]()})
    # Another sampler may be called, and this one is free again, for other threads too.
    inner = []
    assert torch.equal(draw(sampler, progress=lambda *_: inner.append(draw(other))), expected)
    assert torch.equal(inner[0], expected)
    drawn = []
    thread = threading.Thread(target=lambda: drawn.append(draw(sampler)))
    thread.start()
    thread.join()
    assert torch.equal(drawn[0], expected)


# What is not finite.


@torch.no_grad()
def damage(module: torch.nn.Module, name: str, value: float) -> None:
    module.get_parameter(name).view(-1)[0] = value


NOT_FINITE = {
    "unet": (lambda pipe: damage(pipe.unet, "conv_in.weight", NAN), {}, "conv_in.weight of the unet is not finite"),
    "unet infinite": (lambda pipe: damage(pipe.unet, "conv_out.bias", INF), {}, "conv_out.bias of the unet is not"),
    "scale": (lambda pipe: None, {"guidance_scale": 1e38, "steps": 4}, "take a lower guidance_scale"),
    "vae": (lambda pipe: damage(pipe.vae, "decoder.conv_in.weight", NAN), {}, "decoder.conv_in.weight of the auto"),
    "vae infinite": (lambda pipe: damage(pipe.vae, "decoder.conv_out.bias", INF), {}, "decoder.conv_out.bias of"),
    "scaling": (lambda pipe: pipe.vae.register_to_config(scaling_factor=0.0), {}, "look at its scaling_factor"),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_what_is_not_finite_is_one_line_and_no_black_picture(name):
    pipe = stock.build("StableDiffusionPipeline")
    change, options, reason = NOT_FINITE[name]
    change(pipe)
    sampler = GuidedSampler.from_pipeline(pipe)
    of_latents = name.startswith("unet") or name == "scale"
    for output in ("pil", "pt", *(["latent"] if of_latents else [])):
        with pytest.raises(RunError, match=reason) as caught:
            draw(sampler, output=output, **options)
        text = str(caught.value)
        assert text.startswith("latents: 2 of 2 are" if of_latents else "pictures: 2 of 2 are")
        assert "seed 11" in text
        assert "\n" not in text
    rows = {"encoder_hidden_states": torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))}
    empty = {"encoder_hidden_states": torch.zeros(1, 12, 16)}
    config = SamplerConfig(**{"steps": 2, "guidance_scale": 4.0} | options)
    with pytest.raises(RunError, match=reason):
        sampler.images(rows, empty, SEEDS, config)
    if of_latents:
        with pytest.raises(RunError, match=reason):
            sampler.latents(rows, empty, SEEDS, config)


def test_a_damaged_negative_is_named(pipe):
    negative, network = stock.negative("full", pipe)
    damage(network, "conv_in.weight", NAN)
    with pytest.raises(RunError, match=r"^latents: 2 of 2 are .* conv_in\.weight of the negative is not finite$"):
        draw(GuidedSampler.from_pipeline(pipe, negative))


def test_a_lora_times_1e30_is_one_line(pipe):
    deltas = {path: replace(delta, scale=1e30) for path, delta in stock.low_rank(pipe.unet).items()}
    with pytest.raises(UserError, match=r"^negative: the update of \S+ is larger than any weight can be"):
        draw(GuidedSampler.from_pipeline(pipe, Negative(source="strong", deltas=deltas)))


def test_one_picture_of_several_is_told_by_its_seed(pipe):
    """Only the prompt of the second picture leads to numbers that are not finite."""
    sampler = GuidedSampler.from_pipeline(pipe)
    rows = {"encoder_hidden_states": torch.zeros(3, 12, 16)}
    rows["encoder_hidden_states"][1] = NAN
    empty = {"encoder_hidden_states": torch.zeros(1, 12, 16)}
    with pytest.raises(RunError, match=r"^latents: 1 of 3 are not finite .* the first is that of seed 8;"):
        sampler.latents(rows, empty, [7, 8, 9], SamplerConfig(steps=1))
