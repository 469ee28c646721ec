"""CogVideoX 2B and 5B: clips of 1 and a multiple of 8 frames, T5, positions that are rotary in 5B.

Shape letters: B clips, F latent frames, C H W latent channels, height and width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from selfnpo_fast.models import autoencoder
from selfnpo_fast.models.call_rules import OneCall
from selfnpo_fast.models.family import Family
from selfnpo_fast.models.sd import MAX_BLOCKS
from selfnpo_fast.models.size import Size
from selfnpo_fast.models.video import VideoAdapter
from selfnpo_fast.runtime.errors import shortened


class CogVideoXAdapter(VideoAdapter):
    """Latents (F, C, H, W); rows `encoder_hidden_states` (L, D)."""

    @property
    def default_size(self) -> Size:
        """The clips that the model was made for."""
        config = self.denoiser_config
        height, width = config["sample_height"] * self.vae_scale, config["sample_width"] * self.vae_scale
        return Size(height, width, config["sample_frames"])

    @property
    def patch(self) -> int:
        """Latent cells along one side of a patch."""
        return self.denoiser_config["patch_size"]

    @property
    def vae_scale(self) -> int:
        """Pixels per latent cell along one axis."""
        return 2 ** (len(self._vae_config["block_out_channels"]) - 1)

    @property
    def _frames_per_latent(self) -> int:
        return int(self._vae_config["temporal_compression_ratio"])

    @property
    def frame_step(self) -> int:
        """Twice the frames of a group: the autoencoder decodes an even number of latent frames to
        more frames than it encoded."""
        return 2 * self._frames_per_latent

    def latent_shape_of(self, size: Size, field: str = "") -> tuple[int, int, int, int]:
        """As in the base: (F, C, H, W)."""
        frames, rows, columns = self.latent_sizes(size, field)
        return (frames, self.denoiser_config["in_channels"], rows, columns)

    @property
    def prompt_tokens(self) -> int:
        """How many tokens of a prompt the transformer takes."""
        return self.denoiser_config["max_text_seq_length"]

    def why_unfit(self) -> str | None:
        """Widths of text and latents that differ between the parts."""
        ours, theirs = self.denoiser_config["temporal_compression_ratio"], self._frames_per_latent
        if ours != theirs:
            return f"its transformer counts on {ours} frames for a latent frame and its vae makes one of {theirs}"
        return self._why_unfit(self._vae_config["latent_channels"], "text_embed_dim")

    def fixed_arguments(self, size: Size, device: torch.device, dtype: torch.dtype) -> dict:
        """`image_rotary_emb`, cosines and sines (F * H * W / patch^2, D) float32, for a network that
        has rotary positions; made by diffusers' own functions as its pipeline does."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        config, patch = self.denoiser_config, self.patch
        if not config["use_rotary_positional_embeddings"]:
            return {}
        frames, rows, columns = self.latent_sizes(size)
        grid = (rows // patch, columns // patch)
        crop = get_resize_crop_region_for_grid(grid, config["sample_width"] // patch, config["sample_height"] // patch)
        tables = get_3d_rotary_pos_embed(
            embed_dim=config["attention_head_dim"],
            crops_coords=crop,
            grid_size=grid,
            temporal_size=frames,
            device=device,
        )
        return {"image_rotary_emb": tables}

    def _check_vae(self, config: dict) -> None:
        blocks = config["block_out_channels"]
        if not isinstance(blocks, list | tuple) or not 1 <= len(blocks) <= MAX_BLOCKS:
            raise ValueError(f"its block_out_channels is {shortened(blocks)}; expected 1 to {MAX_BLOCKS} numbers")
        autoencoder.check_scaling(config, config["latent_channels"])

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        return 1 / self.vae.config.scaling_factor * latents.transpose(1, 2)

    def _scaled(self, sample: torch.Tensor) -> torch.Tensor:
        return self.vae.config.scaling_factor * sample.transpose(1, 2)


class CogVideoX(Family):
    """CogVideoX."""

    adapter = CogVideoXAdapter
    pipeline_class = "CogVideoXPipeline"
    denoiser_class = "CogVideoXTransformer3DModel"
    denoiser_name = "transformer"
    part_classes: Mapping[str, tuple[str, ...]] = {
        "vae": ("AutoencoderKLCogVideoX",),
        "text_encoder": ("T5EncoderModel",),
        "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
    }
    repeated_blocks = ("CogVideoXBlock",)
    guided_pipelines = ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline", "CogVideoXVideoToVideoPipeline")
    # The scale that the pipeline keeps changes from step to step (use_dynamic_cfg).
    call_rule = OneCall(guided_local="do_classifier_free_guidance")
    row_names = frozenset({"timestep", "encoder_hidden_states", "timestep_cond", "ofs"})
    flat_layers = ("ofs_embedding",)  # given one row for all samples
    not_rows = frozenset({"image_rotary_emb"})  # one row for each token
    draws_videos = True
    frame_rate = 8
    lora_rate = 5e-5  # that of finetrainers
    lora_targets = (*Family.lora_targets, "ff.net.0.proj", "ff.net.2")

    def why_unserved(self, config: dict) -> str | None:
        """Networks that take more than a latent, and CogVideoX 1.5, whose latents are padded."""
        into, out = config.get("in_channels"), config.get("out_channels")
        if into != out:
            return f"takes {into} channels and gives {out}: it wants a picture, too; give the text-to-video model"
        if config.get("patch_size_t") is not None or config.get("ofs_embed_dim") is not None:
            return "is CogVideoX 1.5's (patch_size_t), whose padded latents are not served; give CogVideoX-2b or -5b"
        if config.get("use_learned_positional_embeddings"):
            return "has learned positions, which hold for one size and a picture as input; give CogVideoX-2b or -5b"
        return None


CogVideoXAdapter.family = CogVideoX()
