"""A model family that the product does not know, defined here by the steps of
docs/adding_a_model.md.

It differs wherever families can: its denoiser is another class at another attribute of the
pipeline, its latents are packed tokens (L, C) instead of a grid of channels, and a prompt has two
conditioning tensors. It trains, resumes, samples, attaches, merges and passes doctor, and not a
line of selfnpo_fast/ knows of it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel

from selfnpo_fast import GuidedSampler, attach_negative, cli, models, train
from selfnpo_fast.models.base import Adapter, Conditioning
from selfnpo_fast.models.family import Family
from selfnpo_fast.models.folder import loading
from selfnpo_fast.models.size import Size, side_field
from selfnpo_fast.negatives.load import as_network, load_negative
from selfnpo_fast.negatives.merge import merge
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.training import checkpoint

TOKENS, CHANNELS, WIDTH, PIXELS = 16, 6, 24, 4  # a picture is a 4 x 4 grid of tokens of 4 x 4 pixels
CPU = torch.device("cpu")


# --- what somebody who adds the family has: a denoiser and a pipeline of their own


class TokenBlock(nn.Module):
    """Attention over tokens and words, with the names that LoRA targets by default."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(words, width), nn.Linear(words, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        out = nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(words), self.to_v(words))
        return x + self.to_out[0](out)


class TokenTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """tokens (B, L, C), t (B,) or (), words (B, n, D), tone (B, D) -> (B, L, C)."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, channels: int = CHANNELS, width: int = WIDTH, words: int = tiny.WIDTH, side: int = 4) -> None:
        super().__init__()
        self.into, self.time = nn.Linear(channels, width), nn.Linear(1, width)
        self.tone = nn.Linear(words, width)
        self.blocks = nn.ModuleList([TokenBlock(width, words) for _ in range(2)])
        self.out = nn.Linear(width, channels)
        self.gradient_checkpointing = False

    def forward(self, hidden_states, timestep, words=None, tone=None, return_dict=True):
        t = timestep.reshape(-1, 1).expand(len(hidden_states), 1).to(hidden_states.dtype) / 1000
        x = self.into(hidden_states) + (self.time(t) + self.tone(tone))[:, None]
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, words)
            else:
                x = block(x, words)
        out = self.out(x)
        return SimpleNamespace(sample=out) if return_dict else (out,)


class TokenPipeline(DiffusionPipeline):
    """The stock pipeline of the family: one call per step, the negative rows first."""

    def __init__(self, text_encoder, tokenizer, transformer, scheduler) -> None:
        super().__init__()
        self.register_modules(
            text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, scheduler=scheduler
        )

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.scale > 1

    def encode(self, prompts: list[str], device) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        words = self.text_encoder(ids.to(device)).last_hidden_state
        return words, words.mean(dim=1)

    @torch.no_grad()
    def __call__(self, prompts: list[str], x: torch.Tensor, steps: int, scale: float) -> torch.Tensor:
        self.scale = scale
        self.scheduler.set_timesteps(steps)
        pairs = zip(self.encode([""] * len(prompts), x.device), self.encode(prompts, x.device), strict=True)
        words, tone = (torch.cat(pair) for pair in pairs)
        if not self.do_classifier_free_guidance:
            words, tone = words[len(x) :], tone[len(x) :]
        for t in self.scheduler.timesteps:
            rows = torch.cat([x, x]) if self.do_classifier_free_guidance else x
            out = self.transformer(rows, t, words=words, tone=tone, return_dict=False)[0]
            if self.do_classifier_free_guidance:
                negative, positive = out.chunk(2)
                out = negative + scale * (positive - negative)
            x = self.scheduler.step(out, t, x).prev_sample
        return x


# --- the two classes that make the family known: steps 1 and 2 of docs/adding_a_model.md


class TokenAdapter(Adapter):
    """Latents (L, C) of L tokens; a token is shown as a patch of its first three channels."""

    @property
    def default_size(self) -> Size:
        return Size(self.denoiser_config["side"] * PIXELS, self.denoiser_config["side"] * PIXELS)

    def latent_shape_of(self, size: Size, field: str = "") -> tuple[int, int]:
        size.refuse_frames(field, self.path)
        for side, pixels in size.sides:
            if pixels % PIXELS:
                raise UserError(f"{side_field(field, side)}: {pixels} is no multiple of {PIXELS}")
        return (size.height * size.width // PIXELS**2, self.denoiser_config["channels"])

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        from transformers import CLIPTextConfig

        with loading(self.path, "text_encoder/config.json"):
            text = CLIPTextConfig.from_pretrained(self.path, subfolder="text_encoder")
        return {"words": (text.max_position_embeddings, text.hidden_size), "tone": (text.hidden_size,)}

    def encode_batch(self, pipe, prompts: list[str], device: torch.device) -> Conditioning:
        words, tone = pipe.encode(prompts, device)
        return {"words": words, "tone": tone}

    @functools.cached_property
    def vae_sha256(self) -> str:
        return "0" * 64  # pixels are latents: no autoencoder

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        side = int(latents.shape[1] ** 0.5)
        pictures = latents[..., :3].transpose(1, 2).reshape(-1, 3, side, side).clamp(-1, 1)
        return pictures.repeat_interleave(PIXELS, 2).repeat_interleave(PIXELS, 3)

    def encode(self, images: torch.Tensor, ids: torch.Tensor, seed: int) -> torch.Tensor:
        tokens = nn.functional.avg_pool2d(images.float(), PIXELS).flatten(2).transpose(1, 2)
        return nn.functional.pad(tokens, (0, CHANNELS - 3))


class Tokens(Family):
    adapter = TokenAdapter
    pipeline_class = "TokenPipeline"
    denoiser_class = "TokenTransformer"
    denoiser_name = "transformer"
    library = __name__
    part_classes: Mapping[str, tuple[str, ...]] = {"text_encoder": ("CLIPTextModel",), "tokenizer": ("CLIPTokenizer",)}
    guided_pipelines = ("TokenPipeline",)
    repeated_blocks = ("TokenBlock",)
    row_names = frozenset({"timestep", "words", "tone"})
    first_method = "encode"


TokenAdapter.family = Tokens()


# --- the proof


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(models, "FAMILIES", dict(models.FAMILIES))
    models.register(TokenAdapter.family)


def save(folder, seed: int = 0):
    torch.manual_seed(seed)
    tokens = tiny.tokenizer()
    text = CLIPTextModel(tiny.text_config(tokens)).eval()
    TokenPipeline(text, tokens, TokenTransformer().eval(), tiny.scheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tokens"))


def words(model, output, *more: str) -> list[str]:
    options = {
        "model.path": model, "output": output, "updates": 4, "prompts.source": "shipped", "prompts.limit": 6,
        "rollout.grid_steps": 5, "rollout.pool": 1, "engine.batch_size": 4, "optimizer.lr": 1e-2, "log.every": 1,
        "log.checkpoint_every": 2, "log.sample_prompts": 2, "log.sample_steps": 3,
    }  # fmt: skip
    return [*(word for key, value in options.items() for word in (f"--{key}", str(value))), *more]


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """A run with full weights and one with a LoRA, by kind."""
    folder = tmp_path_factory.mktemp("runs")
    models.register(TokenAdapter.family)
    for kind, more in (("full", ()), ("lora", ("--lora.rank", "2", "--engine.gradient_checkpointing", "true"))):
        assert train.main(words(model, folder / kind, *more)) == 0
    models.FAMILIES.pop("TokenPipeline")
    return folder


def loss_of(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_product_does_not_know_it():
    models.FAMILIES.pop("TokenPipeline")
    with pytest.raises(UserError, match="TokenTransformer; supported are"):
        models.family_of("TokenTransformer")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_it_trains_and_draws_sample_grids(runs, kind):
    assert len(loss_of(runs / kind)) == 4
    assert all(loss > 0 for loss in loss_of(runs / kind))
    assert (runs / kind / "samples" / "samples-000004.png").is_file()
    stored = "transformer/diffusion_pytorch_model.safetensors" if kind == "full" else "pytorch_lora_weights.safetensors"
    tensors = load_file(runs / kind / "negative" / stored)
    assert kind == "full" or all(key.startswith("transformer.blocks.") for key in tensors)


def test_it_resumes_in_the_same_bits(model, runs, tmp_path):
    output = tmp_path / "run"
    assert train.main([*words(model, output), "--updates", "2"]) == 0
    assert [checkpoint.update_of(path) for path in checkpoint.list_checkpoints(output / "checkpoints")] == [2]
    assert train.main([*words(model, output), "--resume"]) == 0
    assert loss_of(output) == loss_of(runs / "full")
    file = "negative/transformer/diffusion_pytorch_model.safetensors"
    found, expected = load_file(output / file), load_file(runs / "full" / file)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_it_trains_from_data(model, tmp_path):
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 40, 200)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a cat")
    more = ("--rollout.start", "data", "--data.source", str(tmp_path), "--rollout.mode", "lockstep", "--rollout.k", "2")
    assert train.main(words(model, tmp_path / "run", *more, "--rollout.omega", "2")) == 0
    assert len(loss_of(tmp_path / "run")) == 4


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_attached_and_sampled_it_equals_two_networks(model, runs, kind):
    pipe = TokenPipeline.from_pretrained(model)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    negative = as_network(pipe.transformer, load_negative(pipe.transformer, runs / kind))
    prompts, seeds, steps, scale = ["a cat", "two birds"], [3, 5], 4, 3.0
    sampler = GuidedSampler.from_pipeline(pipe, runs / kind)
    drawn = sampler(prompts, seeds=seeds, steps=steps, guidance_scale=scale, output="latent", solver="ddim").images
    start = _start(sampler, seeds)
    expected = _by_hand(pipe, negative, prompts, start, steps, scale)
    # Observed 5e-7 of values up to 66: sums in another order.
    torch.testing.assert_close(drawn, expected, rtol=2e-6, atol=2e-5)
    plain = pipe(prompts, start, steps, scale)
    assert (plain - expected).abs().max() > 1e-3
    with attach_negative(pipe, runs / kind):
        torch.testing.assert_close(pipe(prompts, start, steps, scale), expected, rtol=2e-6, atol=2e-5)
        assert torch.equal(pipe(prompts, start, steps, 1.0), _by_hand(pipe, None, prompts, start, steps, 1.0))
        transformer, pipe.transformer = pipe.transformer, TokenTransformer()
        with pytest.raises(UserError, match=r"^pipe: its transformer was replaced, by a TokenTransformer"):
            pipe(prompts, start, steps, scale)
        pipe.transformer = transformer
    assert torch.equal(pipe(prompts, start, steps, scale), plain)


def _start(sampler: GuidedSampler, seeds: list[int]) -> torch.Tensor:
    from selfnpo_fast.guidance.sampler import start_noise

    return start_noise(seeds, sampler.adapter.latent_shape, CPU)


@torch.no_grad()
def _by_hand(pipe, negative, prompts, x, steps, scale):
    """The pipeline's own steps, each branch by its own network."""
    pipe.scheduler.set_timesteps(steps)
    words, tone = pipe.encode(prompts, CPU)
    empty_words, empty_tone = pipe.encode([""] * len(prompts), CPU)
    for t in pipe.scheduler.timesteps:
        out = pipe.transformer(x, t, words=words, tone=tone, return_dict=False)[0]
        if negative is not None:
            against = negative(x, t, words=empty_words, tone=empty_tone, return_dict=False)[0]
            out = against + scale * (out - against)
        x = pipe.scheduler.step(out, t, x).prev_sample
    return x


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_it_merges(model, runs, tmp_path, kind):
    folder = merge(model, runs / kind, tmp_path / "merged", beta=0.5)
    merged = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    base = TokenPipeline.from_pretrained(model).transformer
    negative = as_network(base, load_negative(base, runs / kind)).state_dict()
    for name, value in base.state_dict().items():
        torch.testing.assert_close(merged[name], value + 0.5 * (negative[name] - value), rtol=0, atol=1e-6)


def test_doctor_knows_what_it_costs(model, capsys, tmp_path):
    command = ["doctor", *words(model, tmp_path / "run")]
    assert cli.main(command) == 0
    parameters = sum(p.numel() for p in TokenTransformer().parameters())
    assert f"{parameters / 1e3:.3g} k parameters" in capsys.readouterr().out
    assert cli.main([*command, "--verify"]) == 0, "the memory model holds for it"


def test_samples_by_the_command(model, runs, tmp_path, capsys):
    command = ["sample", "--model", str(model), "--negative", str(runs / "lora"), "--prompt", "a cat", "--steps", "3"]
    assert cli.main([*command, "--output", str(tmp_path)]) == 0
    assert (tmp_path / "grid.png").is_file()


def test_blocks_are_compiled_by_their_class(model, tmp_path):
    assert train.main(words(model, tmp_path / "run", "--engine.compile", "default", "--updates", "1")) == 0
