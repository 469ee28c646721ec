"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, an autoencoder of 8 pixels a cell.

Shape letters: B samples, C H W latent channels, height and width.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from selfnpo_fast.models import autoencoder, parts, text
from selfnpo_fast.models.base import Adapter, Conditioning
from selfnpo_fast.models.folder import loading
from selfnpo_fast.models.unet import UNetAdapter, UNetFamily, guided_pipelines
from selfnpo_fast.runtime.errors import shortened

MAX_BLOCKS = 8
"""Resolutions of an autoencoder: a latent cell of more than 128 pixels is none."""


class StableDiffusionAdapter(UNetAdapter):
    """Loads the parts of a Stable Diffusion pipeline one by one and calls its denoiser."""

    upcasts = False
    """Whether the stock pipeline decodes in float32 where a float16 autoencoder's config says
    force_upcast, which is diffusers' default."""

    @classmethod
    def from_pipeline(cls, pipe: Any) -> Adapter:
        """As in the base; the autoencoder is the pipeline's own."""
        adapter = super().from_pipeline(pipe)
        adapter.vae = pipe.vae
        adapter._vae_config = dict(pipe.vae.config)
        return adapter

    def why_unfit(self) -> str | None:
        """Widths of text and latents that differ between text encoders, denoiser and autoencoder."""
        latent, taken = self._vae_config["latent_channels"], self.denoiser_config["in_channels"]
        if latent != taken:
            return (
                f"its vae has {latent} latent_channels and its {self.denoiser_name} takes {taken}; give parts of one "
                "model"
            )
        expected = self.denoiser_config.get("encoder_hid_dim") or self.denoiser_config.get("cross_attention_dim")
        width = self.conditioning_shapes["encoder_hidden_states"][1]
        for taken in expected if isinstance(expected, list | tuple) else (expected,):
            if taken != width:
                return (
                    f"its {self.denoiser_name} takes text of width {taken} (cross_attention_dim) and its text encoders "
                    f"give {width}; give parts of one model"
                )
        return None

    def check_pictures(self) -> None:
        """UserError where the autoencoder's shapes do not take a picture to latents and back."""
        from diffusers import AutoencoderKL

        latent, config = self.latent_shape, self._vae_config
        picture = (1, 3, *(side * self.vae_scale for side in latent[1:]))

        def run(vae: AutoencoderKL) -> torch.Tensor:
            mean = vae.encode(torch.empty(picture, device="meta")).latent_dist.mean
            if tuple(mean.shape) != (1, *latent):
                raise ValueError(f"it makes {tuple(mean.shape[1:])} of a picture, and {latent} is expected")
            return vae.decode(mean).sample

        with loading(self.path, "vae"):
            parts.try_forward(lambda: AutoencoderKL.from_config(config), run, picture, repr(config))

    # Text

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one prompt's row by name, as `encode_prompts` makes it, read from the
        encoder's config.json."""
        return {"encoder_hidden_states": (self._tokens("tokenizer"), self._text_config("text_encoder").hidden_size)}

    def _text_config(self, part: str) -> Any:
        """The config of a text encoder."""
        return text.read_text_config(self.folder, part, "CLIPTextModel")

    def _tokens(self, part: str) -> int:
        """How many tokens of a prompt a tokenizer and its encoder take."""
        positions = self._text_config(text.encoder_of(part)).max_position_embeddings
        name = f"{part}/tokenizer_config.json"
        if name not in self.folder.files:
            return positions
        stated = self.folder.json(name).get("model_max_length")
        with loading(self.path, name):
            return text.token_limit(stated, positions, self.path)

    def encode_batch(self, pipe: Any, prompts: list[str], device: torch.device) -> Conditioning:
        """`encoder_hidden_states` (N, L, D): the last hidden states of L tokens."""
        embeds, _ = pipe.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds}

    # Pictures

    @functools.cached_property
    def vae_scale(self) -> int:
        """Pixels per latent cell along one axis."""
        return 2 ** (len(self._vae_config["block_out_channels"]) - 1)

    @functools.cached_property
    def _vae_config(self) -> dict:
        """The autoencoder's config.json."""
        from diffusers import AutoencoderKL

        config = self.folder.json("vae/config.json")
        with loading(self.path, "vae/config.json"):
            config = parts.full_config(AutoencoderKL, config, self.family.part_classes["vae"])
            _check_vae(config)
            return config

    @functools.cached_property
    def vae(self) -> nn.Module:
        """The autoencoder, float32."""
        from diffusers import AutoencoderKL

        with loading(self.path, "vae"):
            vae = parts.load_network(AutoencoderKL, self.folder, "vae", self._variant, torch.float32)
        return vae.requires_grad_(False)

    @functools.cached_property
    def vae_sha256(self) -> str:
        """A hash of the autoencoder's weights and config, 64 hex digits: equal ones give equal
        latents."""
        return autoencoder.sha256_of(self.vae, self.pieces)

    def bare_autoencoder(self) -> nn.Module:
        """As in the base."""
        from diffusers import AutoencoderKL

        with torch.device("meta"):
            return AutoencoderKL.from_config(self._vae_config)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, height, width) float32 in [-1, 1] from scaled latents (B, C, H, W).

        About a million pixels at a time: four pictures of 512x512, one of 1024x1024.
        """
        pixels = latents[0, 0].numel() * self.vae_scale**2
        batch_size = max(1, 2**20 // pixels)
        vae = self.vae.to(latents.device)
        upcast = self.upcasts and vae.dtype == torch.float16 and vae.config.force_upcast
        mean, std = self._latent_statistics(latents.device)
        scaled = latents.float() * std / vae.config.scaling_factor + mean
        try:
            if upcast:
                vae.to(torch.float32)
            with self.pieces.of(vae):
                decoded = [vae.decode(part.to(vae.dtype)).sample.float() for part in scaled.split(batch_size)]
        finally:  # also where memory does not suffice: the autoencoder may be a pipeline's
            if upcast:
                vae.to(torch.float16)
        self.pieces.check_shape(decoded[0], *(side * self.vae_scale for side in latents.shape[-2:]))
        return torch.cat([autoencoder.clamped(pictures) for pictures in decoded])

    @torch.no_grad()
    def encode(self, images: torch.Tensor, ids: torch.Tensor, seed: int) -> torch.Tensor:
        """Scaled latents (B, C, H, W) float32 from pictures (B, 3, height, width) in [-1, 1], on
        their device.

        Sampled from the autoencoder's posterior: a picture's noise depends on the seed and its own
        id in ids (B,) int64 only, so that batches may be cut in any way. About a million pixels at
        a time, as in `decode`.
        """
        vae = self.vae.to(images.device)
        size = max(1, 2**20 // images[0, 0].numel())
        latents = []
        with self.pieces.of(vae):
            for part, key_ids in zip(images.float().split(size), ids.split(size), strict=True):
                sample = autoencoder.sampled(vae.encode(part).latent_dist, key_ids, seed)
                mean, std = self._latent_statistics(sample.device)
                latents.append((sample - mean) * vae.config.scaling_factor / std)
        self.pieces.check_shape(latents[0], *(side // self.vae_scale for side in images.shape[-2:]))
        return torch.cat(latents)

    def _latent_statistics(self, device: torch.device) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Mean and deviation of the autoencoder's latents, (1, C, 1, 1) or numbers, by which they
        are normalised beside the scaling factor."""
        return self.vae.config.shift_factor or 0.0, 1.0


def _check_vae(config: dict) -> None:
    """ValueError where an autoencoder's config has no list of blocks, or numbers that latents can
    not be divided by or multiplied with."""
    channels, blocks = config["latent_channels"], config["block_out_channels"]
    if not isinstance(blocks, list | tuple) or not 1 <= len(blocks) <= MAX_BLOCKS:
        raise ValueError(f"its block_out_channels is {shortened(blocks)}; expected a list of 1 to {MAX_BLOCKS} numbers")
    autoencoder.check_scaling(config, channels)


class StableDiffusion(UNetFamily):
    """Stable Diffusion 1.x and 2.x."""

    adapter = StableDiffusionAdapter
    pipeline_class = "StableDiffusionPipeline"
    part_classes: Mapping[str, tuple[str, ...]] = {
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    }
    guided_pipelines = guided_pipelines("StableDiffusion")


StableDiffusionAdapter.family = StableDiffusion()
