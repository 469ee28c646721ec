"""What adapters of video models share: clips, their frames, and autoencoders of clips.

Shape letters: B clips, F frames, C latent channels, H W height and width in pixels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from selfnpo_fast.models import autoencoder, parts, text
from selfnpo_fast.models.base import Adapter, Conditioning
from selfnpo_fast.models.folder import loading
from selfnpo_fast.models.size import Size, side_field
from selfnpo_fast.runtime.errors import UserError

MAX_PATCHES = 2**10
"""Patches along a side of a frame."""
MAX_FRAMES = 2**12
"""Frames of a clip."""
LEAST_SIDE = 192
"""Pixels of a side of a frame below which no smaller one is proposed."""


class VideoAdapter(Adapter):
    """Latents of clips, and clips (B, F, 3, H, W) in [-1, 1]; one T5 encoder without a limit of its
    own.

    A frame is the first of a clip or one of a group, and a group has one latent frame.
    """

    frame_step = 4
    """The number of frames of a clip is 1 and a multiple of this."""
    t5_class = "T5EncoderModel"

    @classmethod
    def from_pipeline(cls, pipe: Any) -> Adapter:
        """As in the base; the autoencoder is the pipeline's own."""
        adapter = super().from_pipeline(pipe)
        adapter.vae = pipe.vae
        adapter._vae_config = dict(pipe.vae.config)
        return adapter

    # Sizes

    @property
    def patch(self) -> int:
        """Latent cells along one side of a patch."""
        raise NotImplementedError

    @property
    def vae_scale(self) -> int:
        """Pixels per latent cell along one axis."""
        raise NotImplementedError

    @property
    def most(self) -> tuple[int, int]:
        """How many patches a side of a frame may have, and how many frames a clip."""
        return MAX_PATCHES, MAX_FRAMES

    def latent_sizes(self, size: Size, field: str = "") -> tuple[int, int, int]:
        """Frames, height and width of the latent of a clip.

        Raises UserError for a size that the model cannot draw, naming `side_field(field, side)`.
        """
        cell, step, frames = self.vae_scale * self.patch, self.frame_step, size.frames
        most_cells, most_frames = self.most
        size.check_sides(cell, cell * most_cells, field)
        asked = side_field(field, "frames")
        if isinstance(frames, int) and frames > most_frames:
            raise UserError(f"{asked}: {frames:,} is not possible; expected at most {most_frames:,}")
        if isinstance(frames, bool) or not isinstance(frames, int) or frames % step != 1 or frames < 1:
            following = max(1, -(-(int(frames) - 1) // step) * step + 1)
            raise UserError(
                f"{asked}: {frames} is not possible; expected 1 and a multiple of {step}; the next is {following}"
            )
        return (frames - 1) // self._frames_per_latent + 1, size.height // self.vae_scale, size.width // self.vae_scale

    def smaller_sizes(self, size: Size) -> list[Size]:
        """Half of the frames, and half of each side, as the model allows; no clip of one frame, and no
        side below LEAST_SIDE."""
        cell, groups = self.vae_scale * self.patch, (size.frames - 1) // self.frame_step
        sizes = [Size(size.height, size.width, groups // 2 * self.frame_step + 1)] if groups > 1 else []
        height, width = (pixels // 2 // cell * cell for _, pixels in size.sides)
        return sizes + [Size(height, width, size.frames)] * (min(height, width) >= LEAST_SIDE)

    def call(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning, fixed: dict) -> tuple[tuple, dict]:
        """As in the base, with the time by its name."""
        return (x,), {"timestep": t, **self.arguments(cond), **fixed}

    # Text

    @property
    def prompt_tokens(self) -> int:
        """How many tokens of a prompt the pipeline takes."""
        raise NotImplementedError

    @property
    def text_tokens(self) -> dict[str, int]:
        """T5 has no limit of its own."""
        return {"tokenizer": self.prompt_tokens}

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """`encoder_hidden_states` (L, D)."""
        config = text.read_text_config(self.folder, "text_encoder", self.t5_class)
        return {"encoder_hidden_states": (self.prompt_tokens, config.d_model)}

    def encode_batch(self, pipe: Any, prompts: list[str], device: torch.device) -> Conditioning:
        """`encoder_hidden_states` (N, L, D) of N prompts."""
        embeds, _ = pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.prompt_tokens, device=device
        )
        return {"encoder_hidden_states": embeds}

    def _why_unfit(self, channels: int, text_option: str) -> str | None:
        """Why an autoencoder of so many latent channels, or the text encoder, does not fit the
        denoiser; None where both do."""
        width, taken = self.conditioning_shapes["encoder_hidden_states"][1], self.denoiser_config[text_option]
        if width != taken:
            return (
                f"its {self.denoiser_name} takes text of width {taken} ({text_option}) and its text encoder gives "
                f"{width}; give parts of one model"
            )
        taken = self.denoiser_config["in_channels"]
        if channels != taken:
            return (
                f"its vae has {channels} latent channels and its {self.denoiser_name} takes {taken}; give parts of one "
                "model"
            )
        return None

    # Clips

    @property
    def _frames_per_latent(self) -> int:
        """Frames of a group."""
        raise NotImplementedError

    def _check_vae(self, config: dict) -> None:
        """ValueError where the autoencoder's config has no numbers that latents can be scaled by."""
        raise NotImplementedError

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """What the autoencoder decodes, (B, C, frames, height, width), from the model's latents."""
        raise NotImplementedError

    def _scaled(self, sample: torch.Tensor) -> torch.Tensor:
        """The model's latents from the autoencoder's (B, C, frames, height, width)."""
        raise NotImplementedError

    @functools.cached_property
    def _vae_class(self) -> Any:
        return self.family.load_class(self.family.part_classes["vae"][0])

    @functools.cached_property
    def _vae_config(self) -> dict:
        """The autoencoder's config.json."""
        config = self.folder.json("vae/config.json")
        with loading(self.path, "vae/config.json"):
            config = parts.full_config(self._vae_class, config, self.family.part_classes["vae"])
            self._check_vae(config)
            return config

    @functools.cached_property
    def vae(self) -> nn.Module:
        """The autoencoder, float32."""
        with loading(self.path, "vae"):
            vae = parts.load_network(self._vae_class, self.folder, "vae", self._variant, torch.float32)
        return vae.requires_grad_(False)

    @functools.cached_property
    def vae_sha256(self) -> str:
        """A hash of the autoencoder's weights and config, 64 hex digits: equal ones give equal
        latents."""
        return autoencoder.sha256_of(self.vae, self.pieces)

    def bare_autoencoder(self) -> nn.Module:
        """As in the base."""
        with torch.device("meta"):
            return self._vae_class.from_config(self._vae_config)

    def check_pictures(self) -> None:
        """UserError where the autoencoder's shapes do not take a clip to latents and back."""
        latent, config, size = self.latent_shape, self._vae_config, self.size
        clip = (1, 3, size.frames, size.height, size.width)

        def run(vae: nn.Module) -> torch.Tensor:
            mean = vae.encode(torch.empty(clip, device="meta")).latent_dist.mean
            found = (1, mean.shape[1], *self.latent_sizes(size))
            if tuple(mean.shape) != found:
                raise ValueError(f"it makes {tuple(mean.shape[1:])} of a clip, and {found[1:]} is expected")
            return vae.decode(mean).sample

        with loading(self.path, "vae"):
            parts.try_forward(lambda: self._vae_class.from_config(config), run, clip, repr((config, latent)))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Clips (B, F, 3, H, W) float32 in [-1, 1] from latents (B, ...); one clip at a time."""
        vae = self.vae.to(latents.device)
        # Each is made row-major: the autoencoder may give channels_last, which cat would keep.
        with self.pieces.of(vae):
            clips = [vae.decode(self._unscaled(one).to(vae.dtype)).sample.float() for one in latents.float().split(1)]
        self.pieces.check_shape(clips[0], *(side * self.vae_scale for side in latents.shape[-2:]))
        return autoencoder.clamped(torch.cat(clips).transpose(1, 2).contiguous())

    @torch.no_grad()
    def encode(self, images: torch.Tensor, ids: torch.Tensor, seed: int) -> torch.Tensor:
        """Latents (B, ...) float32 from clips (B, F, 3, H, W) in [-1, 1], on their device.

        Sampled from the autoencoder's posterior: a clip's noise depends on the seed and its own id
        in ids (B,) int64 only. One clip at a time.
        """
        vae = self.vae.to(images.device)
        latents = []
        with self.pieces.of(vae):
            for clip, key in zip(images.split(1), ids.split(1), strict=True):
                posterior = vae.encode(clip.transpose(1, 2).to(vae.dtype).contiguous()).latent_dist
                latents.append(self._scaled(autoencoder.sampled(posterior, key, seed).float()).contiguous())
        self.pieces.check_shape(latents[0], *(side // self.vae_scale for side in images.shape[-2:]))
        return torch.cat(latents)
