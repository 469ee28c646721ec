"""Stable Diffusion XL: two text encoders, pooled text embeddings and size conditioning."""

from __future__ import annotations

from typing import Any

import torch

from selfnpo_fast.models.base import Conditioning
from selfnpo_fast.models.sd import StableDiffusion, StableDiffusionAdapter
from selfnpo_fast.models.size import Size
from selfnpo_fast.models.unet import UNetFamily, guided_pipelines


class StableDiffusionXLAdapter(StableDiffusionAdapter):
    """Adds `text_embeds` (N, P) and `time_ids` (N, 6) to the conditioning rows."""

    upcasts = True  # its autoencoder overflows in float16

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one prompt's row by name: both encoders' states side by side, and what SDXL
        adds."""
        first, second = self._text_config("text_encoder"), self._text_config("text_encoder_2")
        return {
            "encoder_hidden_states": (self._tokens("tokenizer"), first.hidden_size + second.hidden_size),
            "text_embeds": (second.projection_dim,),
            "time_ids": (6,),
        }

    def why_unfit(self) -> str | None:
        """As in the base; and pooled text, sizes and the two tokenizers."""
        first, second = self._tokens("tokenizer"), self._tokens("tokenizer_2")
        if first != second:
            return f"its tokenizers take {first} and {second} tokens (model_max_length); both have to take as many"
        config = self.denoiser_config
        taken = config.get("projection_class_embeddings_input_dim")
        pooled, sizes = self.conditioning_shapes["text_embeds"][0], 6 * (config.get("addition_time_embed_dim") or 0)
        if taken != pooled + sizes:
            return (
                f"its {self.denoiser_name} takes {taken} added features (projection_class_embeddings_input_dim) and is "
                f"given {pooled} of pooled text and {sizes} of sizes; SDXL's refiner and other kin are not served"
            )
        return super().why_unfit()

    def encode_batch(self, pipe: Any, prompts: list[str], device: torch.device) -> Conditioning:
        """`encoder_hidden_states` (N, L, D), `text_embeds` (N, P) and `time_ids` (N, 6)."""
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        # Where the config names no size, `sized` fills in that of the call.
        known = self._asked.has_sides or self.denoiser_config.get("sample_size") is not None
        time_ids = self._time_ids(len(prompts), embeds, self.size if known else Size(0, 0))
        return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": time_ids}

    def sized(self, cond: Conditioning, size: Size) -> Conditioning:
        """The rows with other `time_ids`."""
        rows = cond["time_ids"]
        return cond | {"time_ids": self._time_ids(len(rows), rows, size)}

    @staticmethod
    def _time_ids(rows: int, like: torch.Tensor, size: Size) -> torch.Tensor:
        """Original size, crop corner and target size: an uncropped picture of this size."""
        sides = size.height, size.width
        return torch.tensor([[*sides, 0, 0, *sides]], device=like.device, dtype=torch.float32).expand(rows, 6)

    def unconditional(self, row: Conditioning) -> Conditioning:
        """Zeros for both text embeddings where the pipeline forces them (SDXL base does), size
        conditioning kept."""
        if self._force_zeros:
            row = {name: torch.zeros_like(value) if name != "time_ids" else value for name, value in row.items()}
        return row

    @property
    def _force_zeros(self) -> bool:
        if self._loaded is not None:
            return bool(self._loaded.config.force_zeros_for_empty_prompt)
        return bool(self.index.get("force_zeros_for_empty_prompt", True))

    def _latent_statistics(self, device: torch.device) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """The autoencoder's latents_mean and latents_std where it has both, as Playground v2.5's
        has."""
        mean, std = (getattr(self.vae.config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return super()._latent_statistics(device)
        return torch.tensor(mean, device=device).view(1, -1, 1, 1), torch.tensor(std, device=device).view(1, -1, 1, 1)

    def arguments(self, cond: Conditioning) -> dict:
        """Pooled embeddings and sizes go into `added_cond_kwargs`."""
        added = {name: cond[name] for name in ("text_embeds", "time_ids")}
        return {"encoder_hidden_states": cond["encoder_hidden_states"], "added_cond_kwargs": added}


class StableDiffusionXL(UNetFamily):
    """Stable Diffusion XL."""

    adapter = StableDiffusionXLAdapter
    pipeline_class = "StableDiffusionXLPipeline"
    added_embedding = "text_time"
    part_classes = StableDiffusion.part_classes | {
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": StableDiffusion.part_classes["tokenizer"],
    }
    guided_pipelines = guided_pipelines("StableDiffusionXL")


StableDiffusionXLAdapter.family = StableDiffusionXL()
