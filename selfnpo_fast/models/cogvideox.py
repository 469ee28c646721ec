"""CogVideoX 2B and 5B: clips of 1 and a multiple of 8 frames, T5, positions that are rotary in 5B.

Shape letters: B clips, F latent frames, C H W latent channels, height and width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from selfnpo_fast.models import autoencoder
from selfnpo_fast.models.base import Conditioning
from selfnpo_fast.models.family import Family
from selfnpo_fast.models.sd import MAX_BLOCKS
from selfnpo_fast.models.video import VideoAdapter
from selfnpo_fast.runtime.errors import shortened


class CogVideoXAdapter(VideoAdapter):
    """Latents (F, C, H, W); rows `encoder_hidden_states` (L, D)."""

    def __init__(self, path: str, **more) -> None:
        """As in the base."""
        super().__init__(path, **more)
        self._tables: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the frames that the model was made for, in pixels."""
        config = self.denoiser_config
        return config["sample_height"] * self.vae_scale, config["sample_width"] * self.vae_scale

    @property
    def default_frames(self) -> int:
        """Frames of the clips that the model was made for."""
        return self.denoiser_config["sample_frames"]

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

    def latent_shape_of(self, height: int, width: int, field: str = "") -> tuple[int, int, int, int]:
        """(F, C, H, W) of the latent of a clip of frames in pixels; errors name `field`, or else
        the side."""
        frames, rows, columns = self.latent_sizes(height, width, field)
        return (frames, self.denoiser_config["in_channels"], rows, columns)

    @property
    def tokens(self) -> int:
        """How many tokens of a prompt the transformer takes."""
        return self.denoiser_config["max_text_seq_length"]

    def why_unfit(self) -> str | None:
        """Widths of text and latents that differ between the parts."""
        ours, theirs = self.denoiser_config["temporal_compression_ratio"], self._frames_per_latent
        if ours != theirs:
            return f"its transformer counts on {ours} frames for a latent frame and its vae makes one of {theirs}"
        return self._why_unfit(self._vae_config["latent_channels"], "text_embed_dim")

    def call(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> tuple[tuple, dict]:
        """As in the base; a network with rotary positions is given their tables."""
        args, kwargs = super().call(x, t, cond)
        return args, kwargs | self._positions(x)

    def _positions(self, x: torch.Tensor) -> dict:
        """`image_rotary_emb`, cosines and sines (F * H * W / patch^2, D) float32, for a network that
        has rotary positions; made by diffusers' own functions as its pipeline does."""
        config = self.denoiser_config
        if not config["use_rotary_positional_embeddings"]:
            return {}
        key = (x.shape[1], *x.shape[3:], x.device)
        if key not in self._tables:
            tables = self._rotary(x)
            if type(tables[0]) is not torch.Tensor:  # of a trace: another forward cannot use it
                return {"image_rotary_emb": tables}
            self._tables[key] = tables
        return {"image_rotary_emb": self._tables[key]}

    def _rotary(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tables for a state (B, F, C, H, W)."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        config, patch = self.denoiser_config, self.patch
        grid = (x.shape[3] // patch, x.shape[4] // patch)
        crop = get_resize_crop_region_for_grid(grid, config["sample_width"] // patch, config["sample_height"] // patch)
        return get_3d_rotary_pos_embed(
            embed_dim=config["attention_head_dim"],
            crops_coords=crop,
            grid_size=grid,
            temporal_size=x.shape[1],
            device=x.device,
        )

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
    row_names = frozenset({"timestep", "encoder_hidden_states", "timestep_cond"})
    not_rows = frozenset({"image_rotary_emb", "ofs"})

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
