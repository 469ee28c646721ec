"""Negatives of a pipeline with two experts: attached, in the sampler, merged, and what names which."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import stock
import tiny_transformers
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from selfnpo_fast import GuidedSampler, attach_negative
from selfnpo_fast.cli import main
from selfnpo_fast.guidance.sampler import start_noise
from selfnpo_fast.models import Size, adapter_of, load_adapter
from selfnpo_fast.models.experts import Experts
from selfnpo_fast.negatives.fingerprint import base_record
from selfnpo_fast.negatives.load import as_network, load_negative
from selfnpo_fast.negatives.weights import module_weights
from selfnpo_fast.runtime import console
from selfnpo_fast.runtime.errors import UserError

PROMPTS, SEEDS, STEPS = ["a cat", "two birds"], [5, 9], 8
NAMES = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_transformers.write_wan(tmp_path_factory.mktemp("wan"), experts=2)


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def deltas(pipe):
    """Low-rank updates of each expert; not those of the other."""
    return {name: stock.low_rank(getattr(pipe, name), seed=seed) for seed, name in enumerate(NAMES)}


def write(root: Path, pipe, deltas, kinds: dict[str, str]) -> Path:
    """A run's `negative/` with a sub-folder of each expert in `kinds`, whose values are full or lora."""
    for name, kind in kinds.items():
        part = root / "negative" / name
        if kind == "full":
            stock.merged(getattr(pipe, name), deltas[name]).save_pretrained(part)
            continue
        part.mkdir(parents=True)
        state = {}
        for path, delta in deltas[name].items():
            state[f"transformer.{path}.lora_A.weight"] = delta.down.contiguous()
            state[f"transformer.{path}.lora_B.weight"] = (delta.up * delta.scale).contiguous()
        record = base_record("the base", None, module_weights(getattr(pipe, name), "the base")) | {"denoiser": name}
        save_file(state, part / "pytorch_lora_weights.safetensors", {"selfnpo_base": json.dumps(record)})
    return root


def drawn(pipe, scale: float = 4.0, second: float | None = 2.0) -> torch.Tensor:
    shape = adapter_of(pipe).latent_shape_of(Size(32, 48, 81))
    noise = start_noise(SEEDS, shape, torch.device("cpu"))
    return pipe(
        PROMPTS, height=32, width=48, num_frames=81, num_inference_steps=STEPS, guidance_scale=scale,
        guidance_scale_2=second, latents=noise, output_type="latent",
    ).frames  # fmt: skip


def scales(pipe) -> list[float]:
    """The scale of each step of `drawn`, by the pipeline's own rule."""
    pipe.scheduler.set_timesteps(STEPS)
    out = [4.0 if t >= pipe.config.boundary_ratio * 1000 else 2.0 for t in pipe.scheduler.timesteps]
    assert len({*out}) == 2
    return out


KINDS = {
    "lora": {"transformer": "lora", "transformer_2": "lora"},
    "full": {"transformer": "full", "transformer_2": "full"},
    "lora and full": {"transformer": "lora", "transformer_2": "full"},
    "low alone": {"transformer_2": "lora"},
    "high alone": {"transformer": "full"},
}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_the_sampler_draws_what_the_stock_pipeline_draws(kinds, pipe, deltas, tmp_path):
    """Both scales, and each expert's negative: against the pipeline with the negatives attached, which
    is held against two plain networks elsewhere."""
    source = write(tmp_path / "run", pipe, deltas, kinds)
    plain = drawn(pipe)
    with attach_negative(pipe, source):
        expected = drawn(pipe)
    assert (expected - plain).abs().max() > 0.01
    mapping = {name: source / "negative" / name for name in kinds}
    for negative in (source, mapping):
        sampler = GuidedSampler.from_pipeline(pipe, negative)
        found = sampler(
            PROMPTS, seeds=SEEDS, steps=STEPS, guidance_scale=scales(pipe), height=32, width=48, output="latent"
        ).images
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 * expected.abs().max().item())
    without = GuidedSampler.from_pipeline(pipe)(
        PROMPTS, seeds=SEEDS, steps=STEPS, guidance_scale=scales(pipe), height=32, width=48, output="latent"
    ).images
    torch.testing.assert_close(without, plain, rtol=0, atol=3e-6 * plain.abs().max().item())


def test_a_folder_that_lacks_an_expert_says_so(pipe, deltas, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(console, "_said", set())
    source = write(tmp_path / "run", pipe, deltas, {"transformer_2": "lora"})
    with caplog.at_level(logging.INFO, logger="selfnpo"):
        with attach_negative(pipe, source):
            pass
        GuidedSampler.from_pipeline(pipe, source)
    said = [record.getMessage() for record in caplog.records]
    assert any("on WanPipeline (transformer_2): LoRA on" in line for line in said)
    assert any(line.endswith("holds nothing for transformer, which guides as in the stock pipeline") for line in said)


def test_one_file_says_whose_it_is_or_is_asked(pipe, deltas, tmp_path):
    lora, full = ({"transformer_2": kind} for kind in ("lora", "full"))
    file = write(tmp_path / "lora", pipe, deltas, lora) / "negative/transformer_2/pytorch_lora_weights.safetensors"
    folder = write(tmp_path / "full", pipe, deltas, full) / "negative/transformer_2"
    for source in (file, folder, folder / "diffusion_pytorch_model.safetensors"):
        with attach_negative(pipe, source):
            assert not pipe.transformer._forward_pre_hooks
            assert pipe.transformer_2._forward_pre_hooks
    nameless = tmp_path / "negative.safetensors"
    save_file(load_file(file), nameless)
    expected = r"^negative: the pipeline has transformer and transformer_2; say which one .*'transformer_2': \.\.\.}$"
    for take in (attach_negative, GuidedSampler.from_pipeline):
        with pytest.raises(UserError, match=expected):
            take(pipe, nameless)
        with pytest.raises(UserError, match=r"^negative: 'unet' is no denoiser of the pipeline; it has tr"):
            take(pipe, {"unet": nameless})
    with attach_negative(pipe, {"transformer": nameless}):
        assert pipe.transformer._forward_pre_hooks


@pytest.mark.parametrize("kinds", [KINDS["lora and full"], KINDS["low alone"]], ids=str)
def test_a_mixture_is_that_of_each_expert(kinds, folder, pipe, deltas, tmp_path):
    """`merge`, and mixing while loading, against Eq. 7 on each expert's tensors."""
    source = write(tmp_path / "run", pipe, deltas, kinds)
    words = ["--base", str(folder), "--negative", str(source), "--beta", "0.5", "--output", str(tmp_path / "merged")]
    assert main(["merge", *words]) == 0
    assert sorted(path.name for path in (tmp_path / "merged").iterdir() if path.is_dir()) == sorted(kinds)
    denoiser = load_adapter(str(folder)).load_denoiser(torch.float32)
    loaded = as_network(denoiser, load_negative(denoiser, tmp_path / "merged"))
    halved = as_network(denoiser, load_negative(denoiser, source, beta=0.5, base=folder))
    assert isinstance(loaded, Experts)
    for name in NAMES:
        base = getattr(pipe, name).state_dict()
        trained = stock.merged(getattr(pipe, name), deltas[name]).state_dict() if name in kinds else base
        for key, value in base.items():
            expected = value + 0.5 * (trained[key] - value)
            for network in (loaded, halved):
                found = network.get_submodule(name).state_dict()[key]
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    record = json.loads((tmp_path / "merged" / next(iter(kinds)) / "selfnpo.json").read_text())
    assert record["denoiser"] == next(iter(kinds))


def test_a_base_without_one_of_the_experts_is_one_line(folder, pipe, deltas, tmp_path):
    source = write(tmp_path / "run", pipe, deltas, KINDS["full"])
    expected = "^base: .* holds nothing for transformer_2; give a model with it$"
    for take in (attach_negative, GuidedSampler.from_pipeline):
        with pytest.raises(UserError, match=expected):
            take(pipe, source, alpha=0.5, base=folder / "transformer")
    assert not pipe.transformer._forward_pre_hooks
