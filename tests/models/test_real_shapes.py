"""Published models without weights: their sizes, shapes, noise levels and names of LoRA layers.

Everything runs on the meta device, so nothing is as large as it says it is.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

from selfnpo_fast.config import LoraConfig as LoraChoices
from selfnpo_fast.models.cogvideox import CogVideoXAdapter
from selfnpo_fast.models.folder import open_folder
from selfnpo_fast.models.sd import StableDiffusionAdapter
from selfnpo_fast.models.sd3 import StableDiffusion3Adapter
from selfnpo_fast.models.sdxl import StableDiffusionXLAdapter
from selfnpo_fast.models.size import AskedSize, Size
from selfnpo_fast.models.wan import WanAdapter

ROOT = Path(__file__).resolve().parents[2]
HERE, BENCHMARKS = ROOT / "tests" / "data" / "shapes", ROOT / "benchmarks" / "configs"


@dataclass(frozen=True)
class Published:
    """What is known of a model from elsewhere."""

    folder: Path
    adapter: type
    parameters: int
    """Of one denoiser: the size that its authors state, to the last weight of the files' shapes."""
    latent: tuple[int, ...]
    text: dict[str, tuple[int, ...]]
    lora_layers: int
    """Layers that the default targets hit."""
    keys: dict[str, tuple[int, ...]]
    """Some tensors of the weights."""


MODELS = {
    "sd15": Published(
        BENCHMARKS / "sd15", StableDiffusionAdapter, 859_520_964, (4, 64, 64),
        {"encoder_hidden_states": (77, 768)}, 128,
        {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 768)},
    ),
    "sdxl": Published(
        BENCHMARKS / "sdxl", StableDiffusionXLAdapter, 2_567_463_684, (4, 128, 128),
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)}, 560,
        {"mid_block.attentions.0.transformer_blocks.9.attn2.to_v.weight": (1280, 2048)},
    ),
    "sd35_medium": Published(
        BENCHMARKS / "sd35_medium", StableDiffusion3Adapter, 2_243_171_520, (16, 128, 128),
        {"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)}, 148,
        {
            "transformer_blocks.12.attn2.to_out.0.weight": (1536, 1536),  # the last second attention
            "transformer_blocks.22.attn.add_k_proj.weight": (1536, 1536),
            "pos_embed.pos_embed": (1, 384 * 384, 1536),
            "context_embedder.weight": (1536, 4096),
        },
    ),
    "cogvideox_2b": Published(
        HERE / "cogvideox_2b", CogVideoXAdapter, 1_693_783_872, (13, 16, 60, 90),
        {"encoder_hidden_states": (226, 4096)}, 120,
        {"transformer_blocks.29.attn1.to_q.weight": (1920, 1920), "patch_embed.proj.weight": (1920, 16, 2, 2)},
    ),
    "cogvideox_5b": Published(
        BENCHMARKS / "cogvideox_5b", CogVideoXAdapter, 5_570_283_072, (13, 16, 60, 90),
        {"encoder_hidden_states": (226, 4096)}, 168,
        {"transformer_blocks.41.attn1.to_out.0.weight": (3072, 3072), "patch_embed.text_proj.weight": (3072, 4096)},
    ),
    "wan21_1_3b": Published(
        BENCHMARKS / "wan21_1_3b", WanAdapter, 1_418_996_800, (16, 21, 60, 104),
        {"encoder_hidden_states": (512, 4096)}, 240,
        {"blocks.29.attn2.to_k.weight": (1536, 1536), "blocks.0.ffn.net.0.proj.weight": (8960, 1536)},
    ),
    "wan21_14b": Published(
        HERE / "wan21_14b", WanAdapter, 14_288_491_584, (16, 21, 60, 104),
        {"encoder_hidden_states": (512, 4096)}, 320,
        {"blocks.39.attn1.to_out.0.weight": (5120, 5120), "blocks.0.ffn.net.0.proj.weight": (13824, 5120)},
    ),
    "wan22_a14b": Published(
        HERE / "wan22_a14b", WanAdapter, 14_288_491_584, (16, 21, 60, 104),
        {"encoder_hidden_states": (512, 4096)}, 320,
        {"scale_shift_table": (1, 2, 5120), "condition_embedder.text_embedder.linear_1.weight": (5120, 4096)},
    ),
}  # fmt: skip
NEW = [name for name, model in MODELS.items() if model.folder.parent == HERE]


def adapter_of(name: str, expert: str | None = None, **size: int):
    model = MODELS[name]
    index = json.loads((model.folder / "model_index.json").read_text())
    folder = open_folder(str(model.folder), name)
    return model.adapter(name, folder=folder, index=index, expert=expert, asked=AskedSize(**size))


@functools.cache
def denoiser_of(name: str) -> torch.nn.Module:
    if name == "wan22_a14b":
        return denoiser_of("wan21_14b")
    with torch.device("meta"):
        return adapter_of(name).new_denoiser(torch.bfloat16)


@pytest.mark.parametrize("name", MODELS)
def test_it_has_the_published_number_of_parameters(name):
    denoiser = denoiser_of(name)
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == MODELS[name].parameters
    state = denoiser.state_dict()
    assert {key: tuple(state[key].shape) for key in MODELS[name].keys} == MODELS[name].keys


@pytest.mark.parametrize("name", MODELS)
def test_its_parts_fit_and_a_forward_has_the_shape_of_its_latent(name):
    adapter = adapter_of(name)
    assert adapter.why_unfit() is None
    assert adapter.latent_shape == MODELS[name].latent
    assert adapter.conditioning_shapes == MODELS[name].text
    x = torch.empty(2, *adapter.latent_shape, device="meta", dtype=torch.bfloat16)
    rows = {key: torch.empty(2, *row, device="meta") for key, row in adapter.conditioning_shapes.items()}
    out = adapter.predict(denoiser_of(name), x, torch.zeros(2, device="meta"), rows)
    assert (out.shape, out.dtype) == (x.shape, torch.bfloat16)


@pytest.mark.parametrize("name", ["sd35_medium", "cogvideox_2b", "wan21_1_3b"])
def test_its_autoencoder_takes_a_picture_or_clip_to_that_latent_and_back(name):
    choices = {} if name == "sd35_medium" else {"frames": 17}
    adapter_of(name, **choices).check_pictures()


def test_another_size_and_number_of_frames_pass_through():
    name = "cogvideox_5b"
    adapter = adapter_of(name, frames=25)
    x = torch.empty(1, *adapter.latent_shape_of(Size(320, 512, 25)), device="meta")
    assert x.shape == (1, 7, 16, 40, 64)
    rows = {"encoder_hidden_states": torch.empty(1, 226, 4096, device="meta")}
    assert (
        adapter.predict(denoiser_of(name), x, torch.zeros(1, device="meta"), rows, Size(320, 512, 25)).shape == x.shape
    )


@pytest.mark.parametrize("name", MODELS)
def test_lora_layers_are_named_as_diffusers_reads_them(name):
    adapter, denoiser = adapter_of(name), denoiser_of(name)
    with torch.device("meta"):
        denoiser.add_adapter(LoraConfig(r=4, target_modules=list(LoraChoices().targets)))
    prefix = adapter.family.denoiser_name
    state = {f"{prefix}.{key}": value for key, value in get_peft_model_state_dict(denoiser).items()}
    denoiser.unload_lora()
    assert len(state) == 2 * MODELS[name].lora_layers
    read = getattr(diffusers, adapter.family.pipeline_class).lora_state_dict(dict(state))
    found = read[0] if isinstance(read, tuple) else read  # with kohya's alphas of a UNet
    assert found.keys() == state.keys()
    assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in found)


def scheduler_of(name: str):
    adapter = adapter_of(name)
    return adapter.scheduler


@pytest.mark.parametrize(("name", "shift", "first"), [("cogvideox_2b", 3.0, 0.050), ("cogvideox_5b", 1.0, 0.029)])
def test_cogvideox_ends_without_any_signal(name, shift, first):
    scheduler = scheduler_of(name)
    assert scheduler.config.prediction_type == "v_prediction"
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2)
    root = np.sqrt(alphas / (shift + (1 - shift) * alphas))
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    np.testing.assert_allclose(scheduler.alphas_cumprod.double().numpy(), expected, rtol=0, atol=2e-7)
    assert scheduler.alphas_cumprod[-1] == 0
    assert float((1 - scheduler.alphas_cumprod[0]).sqrt()) == pytest.approx(first, abs=5e-4)


def test_sd35_shifts_its_levels_by_three():
    scheduler = scheduler_of("sd35_medium")
    expected = 3 * np.arange(1, 1001) / 1000 / (1 + 2 * np.arange(1, 1001) / 1000)
    np.testing.assert_allclose(scheduler.sigmas.numpy()[::-1], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), 1000 * scheduler.sigmas.numpy(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["wan21_1_3b", "wan21_14b", "wan22_a14b"])
def test_wan_solves_its_shifted_flow_by_unipc_of_order_2(name):
    scheduler = scheduler_of(name)
    config = scheduler.config
    assert (config.prediction_type, config.solver_order, config.solver_type) == ("flow_prediction", 2, "bh2")
    scheduler.set_timesteps(10)
    line = np.linspace(1, 0.001, 11)[:-1]
    expected = 3 * line / (1 + 2 * line)
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [*expected, 0], rtol=0, atol=2e-6)
    assert scheduler.timesteps.tolist() == np.floor(1000 * scheduler.sigmas.numpy()[:-1]).astype(int).tolist()


def test_wan_22_has_two_experts_with_a_boundary():
    adapter = adapter_of("wan22_a14b")
    assert (adapter.denoiser_names, adapter.boundary) == (("transformer", "transformer_2"), 875.0)
    levels = torch.arange(1000)
    assert torch.equal(adapter.expert(levels), (adapter.schedule.time.float() < 875).long())
    trained = {name: adapter_of("wan22_a14b", expert=name) for name in ("high", "low", "both")}
    assert trained["both"].trained_denoisers == adapter.trained_denoisers == adapter.denoiser_names
    assert trained["both"].trained_levels == adapter.trained_levels == range(1000)
    high, low = trained["high"], trained["low"]
    assert (high.trained_denoisers, low.trained_denoisers) == (("transformer",), ("transformer_2",))
    # sigma = 3u / (1 + 2u) is .875 at u = .7.
    assert (low.trained_levels.start, high.trained_levels.stop) == (0, 1000)
    assert low.trained_levels.stop == high.trained_levels.start and abs(high.trained_levels.start - 700) <= 2
    plain = adapter_of("wan21_14b")
    assert (plain.denoiser_names, plain.boundary) == (("transformer",), None)
    assert not plain.expert(levels).any()


def test_every_shape_has_its_test():
    assert sorted(NEW) == sorted(path.name for path in HERE.iterdir() if path.is_dir())
