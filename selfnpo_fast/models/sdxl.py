"""Stable Diffusion XL: two text encoders, pooled text embeddings and size conditioning."""

from __future__ import annotations

from typing import Any

import torch

from selfnpo_fast.models.base import Conditioning
from selfnpo_fast.models.sd import StableDiffusionAdapter
from selfnpo_fast.models.unet import UNetFamily, guided_pipelines


class StableDiffusionXLAdapter(StableDiffusionAdapter):
    """Adds `text_embeds` (N, P) and `time_ids` (N, 6) to the conditioning rows."""

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one prompt's row by name: both encoders' states side by side, and what SDXL
        adds."""
        first, second = self._text_config("text_encoder"), self._text_config("text_encoder_2")
        return {
            "encoder_hidden_states": (first.max_position_embeddings, first.hidden_size + second.hidden_size),
            "text_embeds": (second.projection_dim,),
            "time_ids": (6,),
        }

    def encode_batch(self, pipe: Any, prompts: list[str], device: torch.device) -> Conditioning:
        """`encoder_hidden_states` (N, L, D), `text_embeds` (N, P) and `time_ids` (N, 6)."""
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        time_ids = self._time_ids(len(prompts), embeds, (self.resolution, self.resolution))
        return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": time_ids}

    def sized(self, cond: Conditioning, height: int, width: int) -> Conditioning:
        """The rows with other `time_ids`."""
        rows = cond["time_ids"]
        return cond | {"time_ids": self._time_ids(len(rows), rows, (height, width))}

    @staticmethod
    def _time_ids(rows: int, like: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Original size, crop corner and target size: an uncropped picture of (height, width)
        pixels."""
        return torch.tensor([[*size, 0, 0, *size]], device=like.device, dtype=torch.float32).expand(rows, 6)

    def encode_empty(self, device: torch.device) -> Conditioning:
        """Zeros for both text embeddings where the pipeline forces them (SDXL base does), size
        conditioning kept."""
        row = self.encode_prompts([""], device)
        if self._force_zeros:
            row = {name: torch.zeros_like(value) if name != "time_ids" else value for name, value in row.items()}
        return row

    @property
    def _force_zeros(self) -> bool:
        from diffusers import DiffusionPipeline

        if self._loaded is not None:
            return bool(self._loaded.config.force_zeros_for_empty_prompt)
        index = DiffusionPipeline.load_config(self.path, revision=self._revision)
        return bool(index.get("force_zeros_for_empty_prompt", True))

    def arguments(self, cond: Conditioning) -> dict:
        """Pooled embeddings and sizes go into `added_cond_kwargs`."""
        added = {name: cond[name] for name in ("text_embeds", "time_ids")}
        return {"encoder_hidden_states": cond["encoder_hidden_states"], "added_cond_kwargs": added}


class StableDiffusionXL(UNetFamily):
    """Stable Diffusion XL."""

    adapter = StableDiffusionXLAdapter
    pipeline_class = "StableDiffusionXLPipeline"
    guided_pipelines = guided_pipelines("StableDiffusionXL")


StableDiffusionXLAdapter.family = StableDiffusionXL()
