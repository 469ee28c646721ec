"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, an autoencoder of 8 pixels a cell.

Shape letters: B samples, C H W latent channels, height and width.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

import torch
from torch import nn

from selfnpo_fast.models.base import Adapter, Conditioning, loading, refuse_nan, refuse_pickles
from selfnpo_fast.models.unet import UNetAdapter, UNetFamily, guided_pipelines
from selfnpo_kernels import Draw, NoiseKey, draw_id, normal


class StableDiffusionAdapter(UNetAdapter):
    """Loads the parts of a Stable Diffusion pipeline one by one and calls its denoiser."""

    @classmethod
    def from_pipeline(cls, pipe: Any) -> Adapter:
        """As in the base; the autoencoder is the pipeline's own."""
        adapter = super().from_pipeline(pipe)
        adapter.vae = pipe.vae
        adapter._vae_config = {"block_out_channels": list(pipe.vae.config.block_out_channels)}
        return adapter

    # Text

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one prompt's row by name, as `encode_prompts` makes it, read from the
        encoder's config.json."""
        text = self._text_config("text_encoder")
        return {"encoder_hidden_states": (text.max_position_embeddings, text.hidden_size)}

    def _text_config(self, part: str):
        from transformers import CLIPTextConfig

        with loading(self.path, f"{part}/config.json"):
            return CLIPTextConfig.from_pretrained(self.path, subfolder=part, revision=self._revision)

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
        from diffusers import AutoencoderKL

        with loading(self.path, "vae/config.json"):
            config = AutoencoderKL.load_config(self.path, subfolder="vae", revision=self._revision)
            return {"block_out_channels": list(config["block_out_channels"])}

    @functools.cached_property
    def vae(self) -> nn.Module:
        """The autoencoder, float32."""
        from diffusers import AutoencoderKL

        with loading(self.path, "vae"):
            refuse_pickles(self.path, "vae")
            vae = AutoencoderKL.from_pretrained(self.path, subfolder="vae", use_safetensors=True, **self._hub)
            refuse_nan(vae)
        return vae.eval().requires_grad_(False)

    @functools.cached_property
    def vae_sha256(self) -> str:
        """A hash of the autoencoder's weights and config, 64 hex digits: equal ones give equal
        latents."""
        config = {key: value for key, value in self.vae.config.items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, value in self.vae.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, height, width) float32 in [-1, 1] from scaled latents (B, C, H, W).

        About a million pixels at a time: four pictures of 512x512, one of 1024x1024.
        """
        pixels = latents[0, 0].numel() * self.vae_scale**2
        batch_size = max(1, 2**20 // pixels)
        vae = self.vae.to(latents.device)
        upcast = vae.dtype == torch.float16 and vae.config.force_upcast  # SDXL's overflows in float16
        if upcast:
            vae.to(torch.float32)
        scaled = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        pictures = [_clamped(vae.decode(part.to(vae.dtype)).sample.float()) for part in scaled.split(batch_size)]
        if upcast:
            vae.to(torch.float16)
        return torch.cat(pictures)

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
        for part, key_ids in zip(images.float().split(size), ids.split(size), strict=True):
            posterior = vae.encode(part).latent_dist
            noise = normal(NoiseKey(seed, key_ids, draw_id(Draw.POSTERIOR)), posterior.mean.shape[1:])
            # The posterior has a deviation for each element, which no fused op knows: each picture
            # meets this once.
            sample = torch.addcmul(posterior.mean, posterior.std, noise)
            latents.append((sample - (vae.config.shift_factor or 0)) * vae.config.scaling_factor)
        return torch.cat(latents)


def _clamped(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1]; what is infinite becomes NaN, so that it is not taken for white."""
    return pictures.clamp(-1, 1).masked_fill_(pictures.isinf(), torch.nan)


class StableDiffusion(UNetFamily):
    """Stable Diffusion 1.x and 2.x."""

    adapter = StableDiffusionAdapter
    pipeline_class = "StableDiffusionPipeline"
    guided_pipelines = guided_pipelines("StableDiffusion")


StableDiffusionAdapter.family = StableDiffusion()
