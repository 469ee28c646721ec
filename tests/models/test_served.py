"""Models that stock diffusers draws are drawn, and the others are refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from fuzzing import assert_one_line, assert_refused, call
from PIL import Image

from selfnpo_fast import GuidedSampler, cli, train
from selfnpo_fast.models import adapter_of, load_adapter
from selfnpo_fast.runtime.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """A pipeline of each family."""
    folder = tmp_path_factory.mktemp("models")
    return {"sd": tiny.write_sd(folder / "sd"), "sdxl": tiny.write_sdxl(folder / "sdxl")}


@pytest.fixture
def model(written, tmp_path) -> Path:
    """A Stable Diffusion pipeline to change."""
    return shutil.copytree(written["sd"], tmp_path / "model")


UNSERVED = {
    "LCM": ({"time_cond_proj_dim": 8}, "takes the guidance scale as an input (LCM)"),
    "inpainting": ({"in_channels": 9}, "takes 9 channels and gives 4, as for inpainting"),
    "instructions": ({"in_channels": 8}, "takes 8 channels and gives 4"),
    "variances": ({"out_channels": 8}, "takes 4 channels and gives 8"),
    "labels": ({"num_class_embeds": 10}, "wants class labels"),
    "projected labels": (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8},
        "wants class labels",
    ),
    "image prompts": ({"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 8}, "wants image prompts"),
    "SDXL's inputs": (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
        },
        "has 'text_time' as addition_embed_type",
    ),
    "another text": ({"cross_attention_dim": 2 * tiny.WIDTH}, "text encoders give 16"),
    "other latents": ({"in_channels": 16, "out_channels": 16}, "its vae has 4 latent_channels"),
}


@pytest.mark.parametrize("kind", UNSERVED)
def test_what_is_not_served_is_refused_when_the_config_is_read(kind, tmp_path):
    """From a folder, whatever the command, and from a pipeline that is loaded."""
    changes, reason = UNSERVED[kind]
    folder = tiny.write_sd(tmp_path / "model", **changes)
    with pytest.raises(UserError) as refused:
        load_adapter(str(folder))
    assert_one_line(str(refused.value), "model.path", reason)
    if kind not in ("another text", "other latents"):  # stock diffusers refuses those itself
        with pytest.raises(UserError) as refused:
            GuidedSampler.from_pipeline(StableDiffusionPipeline.from_pretrained(folder))
        assert_one_line(str(refused.value), "pipe: its unet", reason)


@pytest.mark.parametrize("kind", ["LCM", "inpainting"])
def test_every_command_refuses_before_it_writes(model, kind, tmp_path):
    """The latents of a data set would be stored in another shape, and block the right model."""
    changes, reason = UNSERVED[kind]
    tiny.edit(model / "unet" / "config.json", **changes)
    (tmp_path / "data").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "a.txt").write_text("a cat")
    output = ["--output", str(tmp_path / "output")]
    named = ["--config", str(train.DEFAULT_CONFIG), "--model.path", str(model)]
    data = ["--rollout.start", "data", "--data.source", str(tmp_path / "data")]
    assert_refused(*call(train.main, [*named, *output]), reason)
    assert_refused(*call(train.main, [*named, *data, *output]), reason)
    assert_refused(*call(cli.main, ["doctor", *named]), reason)
    assert_refused(*call(cli.main, ["sample", "--model", str(model), "--prompt", "a", *output]), reason)
    assert_refused(*call(cli.main, ["evaluate", "--model", str(model), *output]), reason)
    assert not (tmp_path / "output").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "model"]


def test_the_refiner_is_refused(written, tmp_path):
    """It takes five numbers for sizes and an aesthetic score, and one text encoder."""
    shutil.copytree(written["sdxl"], tmp_path / "model")
    tiny.edit(tmp_path / "model" / "unet" / "config.json", projection_class_embeddings_input_dim=tiny.WIDTH + 5 * 8)
    with pytest.raises(UserError, match=r"takes 56 added features .* refiner") as refused:
        load_adapter(str(tmp_path / "model"))
    assert_one_line(str(refused.value))
    tiny.edit(tmp_path / "model" / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(UserError, match="has no text_encoder"):
        load_adapter(str(tmp_path / "model"))


def stock_pictures(pipe, **size) -> torch.Tensor:
    """What the stock pipeline draws, from the noise of seed 3."""
    out = pipe("a cat", num_inference_steps=2, guidance_scale=2.0, output_type="pt", **size)
    return out.images


def noise_of(shape: tuple[int, ...]) -> torch.Tensor:
    from selfnpo_fast.guidance.sampler import start_noise

    return start_noise([3], shape, CPU)


@pytest.mark.parametrize("size", [[8, 8], [8, 16]])
def test_a_size_that_is_a_list_is_drawn(model, size):
    tiny.edit(model / "unet" / "config.json", sample_size=size)
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    expected = stock_pictures(pipe, latents=noise_of((4, *size)))
    assert expected.shape[2:] == (8 * size[0], 8 * size[1])
    sampler = GuidedSampler.from_pipeline(pipe)
    found = sampler("a cat", seeds=3, steps=2, guidance_scale=2.0, output="pt").images
    assert (found / 2 + 0.5 - expected).abs().max() < 1e-5
    adapter = load_adapter(str(model))
    assert adapter.latent_shape == (4, *size)
    if size[0] == size[1]:
        assert adapter.resolution == 64
    else:
        with pytest.raises(UserError, match=r"64 x 128 pixels, and square ones"):
            adapter.resolution  # noqa: B018


def test_without_a_size_one_has_to_be_given(model, written, tmp_path):
    tiny.edit(model / "unet" / "config.json", sample_size=None)
    with pytest.raises(UserError, match=r"sample_size is None\); give a resolution"):
        load_adapter(str(model))
    assert load_adapter(str(model), resolution=64).latent_shape == (4, 8, 8)
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    expected = stock_pictures(pipe, height=64, width=128, latents=noise_of((4, 8, 16)))
    sampler = GuidedSampler.from_pipeline(pipe)
    call = {"seeds": 3, "steps": 2, "guidance_scale": 2.0, "output": "pt"}
    found = sampler("a cat", height=64, width=128, **call).images
    assert (found / 2 + 0.5 - expected).abs().max() < 1e-5
    with pytest.raises(UserError, match="give a resolution"):
        sampler("a cat", **call)
    # SDXL is told the size beside the prompt.
    shutil.copytree(written["sdxl"], tmp_path / "sdxl")
    tiny.edit(tmp_path / "sdxl" / "unet" / "config.json", sample_size=None)
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "sdxl", add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    expected = stock_pictures(pipe, height=64, width=128, latents=noise_of((4, 8, 16)))
    found = GuidedSampler.from_pipeline(pipe)("a cat", height=64, width=128, **call).images
    assert (found / 2 + 0.5 - expected).abs().max() < 1e-5


# Latents that are normalised


STATISTICS = {"latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299]}
"""Those of Playground v2.5."""


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    """SDXL whose autoencoder has statistics, and gives a posterior without a deviation."""
    folder = tiny.write_sdxl(tmp_path_factory.mktemp("playground"))
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", scaling_factor=0.5, **STATISTICS)
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -1e9
    vae.save_pretrained(folder / "vae")
    return folder


def test_latents_are_decoded_with_the_autoencoder_s_statistics(playground):
    pipe = StableDiffusionXLPipeline.from_pretrained(playground, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "num_inference_steps": 1, "latents": noise_of((4, 8, 8))}
    latents = pipe(output_type="latent", **call).images
    expected = pipe(output_type="pt", **call).images
    for adapter in (load_adapter(str(playground)), adapter_of(pipe)):
        assert (adapter.decode(latents) / 2 + 0.5 - expected).abs().max() < 1e-6


def test_pictures_are_encoded_with_the_autoencoder_s_statistics(playground):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(playground, add_watermarker=False)
    expected = pipe.prepare_latents(images, None, 2, 1, torch.float32, CPU, torch.Generator(), add_noise=False)
    found = load_adapter(str(playground)).encode(images, torch.arange(2), seed=0)
    assert (found - expected).abs().max() < 1e-5


def test_stable_diffusion_knows_no_statistics(model):
    """Its stock pipeline divides by the scaling factor alone."""
    tiny.edit(model / "vae" / "config.json", **STATISTICS)
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "num_inference_steps": 1, "latents": noise_of((4, 8, 8))}
    latents, expected = (pipe(output_type=kind, **call).images for kind in ("latent", "pt"))
    assert (adapter_of(pipe).decode(latents) / 2 + 0.5 - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    "change",
    [
        {"scaling_factor": 0},
        {"scaling_factor": None},
        {"scaling_factor": "0.18215"},
        {"scaling_factor": float("nan")},
        {"shift_factor": "x"},
        {"latents_mean": [0, 0, 0], "latents_std": [1, 1, 1]},
        {"latents_std": [1, 1, 1, 0], "latents_mean": [0, 0, 0, 0]},
        {"latents_mean": 0.5},
        {"block_out_channels": []},
        {"block_out_channels": [4] * 200},
    ],
)
def test_an_autoencoder_s_numbers_have_to_be_possible(model, change):
    tiny.edit(model / "vae" / "config.json", **change)
    with pytest.raises(UserError) as refused:
        load_adapter(str(model))
    assert_one_line(str(refused.value), "vae/config.json", str(model), next(iter(change)))


# Sizes


HUGE = [
    ("unet", {"layers_per_block": 10**7}),
    ("unet", {"layers_per_block": [1, 10**7]}),
    ("unet", {"layers_per_block": 5_000}),
    ("unet", {"block_out_channels": [8, 10**9]}),
    ("unet", {"block_out_channels": [8] * 5_000}),
    ("unet", {"transformer_layers_per_block": [[1, 10**6]]}),
    ("unet", {"cross_attention_dim": 10**12}),
    ("unet", {"sample_size": 10**9}),
    ("vae", {"layers_per_block": 10**7}),
    ("vae", {"latent_channels": 10**7}),
    ("text_encoder", {"num_hidden_layers": 10**7}),
    ("text_encoder", {"vocab_size": 10**12}),
    ("text_encoder", {"max_position_embeddings": 10**9}),
    ("unet", {"attention_head_dim": -1}),
    ("unet", {"downsample_padding": [0, 0]}),
    ("unet", {"downsample_padding": ["x", "y"]}),
    ("unet", {"downsample_padding": [10**5, 10**5]}),
    ("unet", {"dropout": float("nan")}),
    ("scheduler", {"num_train_timesteps": 10**10}),
]
FILES = {"scheduler": "scheduler_config.json"}


@pytest.mark.parametrize(("part", "change"), HUGE, ids=lambda value: str(value)[:60])
def test_sizes_are_checked_before_a_network_is_built(model, part, change):
    tiny.edit(model / part / FILES.get(part, "config.json"), **change)
    with pytest.raises(UserError) as refused:
        load_adapter(str(model))
    assert_one_line(str(refused.value), "model.path", str(model))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", {"block_out_channels": [8, 65_536]}),
        ("text_encoder", {"intermediate_size": 10**6}),
        ("vae", {"block_out_channels": [4, 4, 8, 65_536]}),
    ],
)
def test_a_network_far_larger_than_its_files_is_not_built(model, part, change):
    """Its missing weights would be made from random numbers first: up to 100 GB here."""
    tiny.edit(model / part / "config.json", **change)
    adapter = load_adapter(str(model))
    read = {
        "unet": lambda: adapter.load_denoiser(torch.float32),
        "vae": lambda: adapter.vae,
        "text_encoder": lambda: adapter.encode_prompts(["a"], CPU),
    }
    with pytest.raises(UserError, match="they do not fit"):
        read[part]()


def test_a_merge_builds_no_endless_network(model, written, tmp_path):
    """The network of a config is built in one place, whoever asks."""
    tiny.edit(model / "unet" / "config.json", layers_per_block=10**7)
    words = ["merge", "--base", str(model), "--negative", str(written["sd"]), "--output", str(tmp_path / "merged")]
    assert_refused(*call(cli.main, words), "layers_per_block")


def test_tensors_of_a_file_are_bounded(model):
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    for header in (
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(60_000)},
        {"t" * 600: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
    ):
        content = json.dumps(header).encode()
        path.write_bytes(len(content).to_bytes(8, "little") + content)
        with pytest.raises(UserError, match=r"it has 60,000 tensors; expected|characters; expected at most 512"):
            load_adapter(str(model))


def test_deep_json_is_refused(model):
    for name in ("model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"):
        content = (model / name).read_bytes()
        (model / name).write_bytes(b"[" * 10**6)
        with pytest.raises(UserError) as refused:
            load_adapter(str(model))
        assert_one_line(str(refused.value), name.rpartition("/")[2])
        (model / name).write_bytes(content)
    load_adapter(str(model))


@pytest.mark.parametrize(
    "change",
    [
        {"steps_offset": None},
        {"steps_offset": 0.5},
        {"timestep_spacing": "x"},
        {"timestep_spacing": None},
        {"clip_sample": "no"},
        {"beta_end": "0.012"},
        {"beta_start": float("nan")},
        {"beta_schedule": "x"},
        {"trained_betas": "x"},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": -1000},
    ],
)
def test_a_scheduler_s_options_are_checked_before_work(model, change):
    """DDIM looks at some of them for the first time when it draws."""
    tiny.edit(model / "scheduler" / "scheduler_config.json", **change)
    with pytest.raises(UserError) as refused:
        load_adapter(str(model))
    assert_one_line(str(refused.value), "model.path", "scheduler", str(model))


def test_the_index_names_the_scheduler(model):
    """As in diffusers, where the class of the config may be another."""
    tiny.edit(model / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    pipe = StableDiffusionPipeline.from_pretrained(model)
    assert load_adapter(str(model)).scheduler_config["_class_name"] == type(pipe.scheduler).__name__
