"""Stable Diffusion 3 and 3.5: two CLIP encoders and T5, a transformer over patches of latents.

Shape letters: N prompts, L tokens, C H W latent channels, height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from selfnpo_fast.models import text
from selfnpo_fast.models.base import Conditioning
from selfnpo_fast.models.call_rules import OneCall
from selfnpo_fast.models.family import Family
from selfnpo_fast.models.sd import StableDiffusion, StableDiffusionAdapter
from selfnpo_fast.models.size import Size

T5_TOKENS = 256
"""Tokens of a prompt that T5 is given: `max_sequence_length` of the pipeline's call."""


class StableDiffusion3Adapter(StableDiffusionAdapter):
    """Latents (C, H, W), of which the transformer takes patches; rows `encoder_hidden_states`
    (L, D) and `pooled_projections` (P)."""

    @property
    def patch(self) -> int:
        """Latent cells along one side of a patch."""
        return int(self.denoiser_config["patch_size"])

    def latent_shape_of(self, size: Size, field: str = "") -> tuple[int, int, int]:
        """As in the base: (C, H, W)."""
        size.refuse_frames(field, self.path)
        cell = self.vae_scale * self.patch
        most = cell * int(self.denoiser_config["pos_embed_max_size"])
        size.check_sides(cell, most, field)
        return super().latent_shape_of(size, field)

    def tokens(self, size: Size | None = None) -> int:
        """The patches of a latent."""
        _, rows, columns = self.latent_shape if size is None else self.latent_shape_of(size)
        return (rows // self.patch) * (columns // self.patch)

    def call(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning, fixed: dict) -> tuple[tuple, dict]:
        """As in the base, with the time by its name."""
        return (x,), {"timestep": t, **self.arguments(cond), **fixed}

    # Text

    @property
    def text_tokens(self) -> dict[str, int]:
        """T5 has no limit of its own."""
        return {"tokenizer_3": T5_TOKENS}

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one prompt's row by name: CLIP's tokens, then T5's, and both CLIPs' pooled
        states."""
        first, second = (self._text_config(part) for part in ("text_encoder", "text_encoder_2"))
        return {
            "encoder_hidden_states": (self._tokens("tokenizer") + T5_TOKENS, self._t5_config().d_model),
            "pooled_projections": (first.projection_dim + second.projection_dim,),
        }

    def _t5_config(self) -> Any:
        """The config of T5."""
        return text.read_text_config(self.folder, "text_encoder_3", "T5EncoderModel")

    def why_unfit(self) -> str | None:
        """Widths that differ between text encoders, autoencoder and transformer."""
        first, second = self._tokens("tokenizer"), self._tokens("tokenizer_2")
        if first != second:
            return f"its tokenizers take {first} and {second} tokens (model_max_length); both have to take as many"
        clip = sum(self._text_config(part).hidden_size for part in ("text_encoder", "text_encoder_2"))
        rows = self.conditioning_shapes
        width, pooled = rows["encoder_hidden_states"][1], rows["pooled_projections"][0]
        if clip > width:
            return f"its CLIP encoders give text of width {clip} and its T5 of {width}; give parts of one model"
        for what, given, option, place in (
            ("latent_channels", self._vae_config["latent_channels"], "in_channels", "vae has"),
            ("as width of text", width, "joint_attention_dim", "T5 gives"),
            ("pooled features", pooled, "pooled_projection_dim", "CLIP encoders give"),
        ):
            taken = self.denoiser_config[option]
            if given != taken:
                return (
                    f"its {place} {given} {what} and its {self.denoiser_name} takes {taken} ({option}); give parts of "
                    "one model"
                )
        return None

    def encode_batch(self, pipe: Any, prompts: list[str], device: torch.device) -> Conditioning:
        """`encoder_hidden_states` (N, L, D) and `pooled_projections` (N, P)."""
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5."""

    adapter = StableDiffusion3Adapter
    pipeline_class = "StableDiffusion3Pipeline"
    denoiser_class = "SD3Transformer2DModel"
    denoiser_name = "transformer"
    part_classes: Mapping[str, tuple[str, ...]] = {
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "text_encoder_3": ("T5EncoderModel",),
        "tokenizer": StableDiffusion.part_classes["tokenizer"],
        "tokenizer_2": StableDiffusion.part_classes["tokenizer"],
        "tokenizer_3": ("T5TokenizerFast", "T5Tokenizer"),
    }
    repeated_blocks = ("JointTransformerBlock",)
    guided_pipelines = (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
    )
    call_rule = OneCall(positive_argument="skip_layers")  # skip-layer guidance
    row_names = frozenset(
        {
            *("timestep", "encoder_hidden_states", "pooled_projections", "block_controlnet_hidden_states"),
            *("joint_attention_kwargs.ip_adapter_image_embeds", "joint_attention_kwargs.ip_hidden_states"),
            "joint_attention_kwargs.temb",
        }
    )
    time_dtype = torch.float32
    lora_targets = (*Family.lora_targets, "ff.net.0.proj", "ff.net.2")  # of the picture's tokens, not the text's

    def why_unserved(self, config: dict) -> str | None:
        """Networks that take more than a latent."""
        into, out = config.get("in_channels"), config.get("out_channels")
        if into != out:
            return f"takes {into} channels and gives {out}: it wants more than a latent; give the text-to-image model"
        return None


StableDiffusion3Adapter.family = StableDiffusion3()
