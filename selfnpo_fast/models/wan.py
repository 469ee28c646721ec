"""Wan 2.1 and 2.2, text to video: clips of 1 and a multiple of 4 frames, UMT5, one or two experts.

Shape letters: B clips, C latent channels, F H W latent frames, height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from selfnpo_fast.models import autoencoder
from selfnpo_fast.models.base import Adapter
from selfnpo_fast.models.call_rules import TwoCalls
from selfnpo_fast.models.conditioning import Row
from selfnpo_fast.models.family import Family
from selfnpo_fast.models.size import Size
from selfnpo_fast.models.video import VideoAdapter
from selfnpo_fast.runtime.errors import UserError, shortened

DEFAULT_SIZE = Size(480, 832, 81)
"""What the pipeline's call draws."""
TOKENS = 512
"""Tokens of a prompt: `max_sequence_length` of the pipeline's call."""


class WanAdapter(VideoAdapter):
    """Latents (C, F, H, W); rows `encoder_hidden_states` (L, D), zeros behind a prompt's last token.

    A model of two experts is one network (`experts.Experts`).
    """

    t5_class = "UMT5EncoderModel"

    @classmethod
    def from_pipeline(cls, pipe: Any) -> Adapter:
        """As in the base."""
        adapter = super().from_pipeline(pipe)
        adapter._check_index("pipe")
        return adapter

    # Experts

    @property
    def boundary(self) -> float | None:
        """As in the base, from the pipeline's boundary_ratio."""
        ratio = self.index.get("boundary_ratio")
        return None if ratio is None else ratio * self.scheduler_config["num_train_timesteps"]

    def _check_index(self, where: str) -> None:
        """UserError that begins with `where` for a model that is not served."""
        ratio, count = self.index.get("boundary_ratio"), len(self.denoiser_names)
        if self.index.get("expand_timesteps"):
            raise UserError(
                f"{where}: it has a timestep for each token (expand_timesteps), as Wan2.2-TI2V-5B has, which is not "
                "served; give a text-to-video model of Wan 2.1 or 2.2"
            )
        if (count > 1) != (ratio is not None):
            raise UserError(
                f"{where}: its boundary_ratio is {shortened(ratio)} and it has {count} transformers; two of them need "
                "a boundary, and one has none"
            )
        if ratio is not None and not (autoencoder.are_numbers([ratio]) and 0 < ratio < 1):
            raise UserError(f"{where}: its boundary_ratio is {shortened(ratio)}; expected a number between 0 and 1")

    def check(self, *, configs_only: bool = False) -> None:
        """As in the base; and that there is a boundary where there are two experts."""
        self._check_index(f"model.path: {self.path}")
        super().check(configs_only=configs_only)

    # Sizes

    @property
    def default_size(self) -> Size:
        """The clips that the pipeline draws by default."""
        return DEFAULT_SIZE

    @property
    def patch(self) -> int:
        """Latent cells along one side of a patch."""
        return int(self.denoiser_config["patch_size"][1])

    @property
    def most(self) -> tuple[int, int]:
        """As many patches and latent frames as the network has rotary positions for."""
        positions = int(self.denoiser_config["rope_max_seq_len"])
        return positions, (positions - 1) * self._frames_per_latent + 1

    def checked_config(self, config: dict) -> dict:
        """With a patch of one frame that is a square."""
        patch = config["patch_size"]
        if not (autoencoder.are_numbers(patch) and len(patch) == 3 and patch[0] == 1 and patch[1] == patch[2] >= 1):
            raise ValueError(f"its patch_size is {shortened(patch)}; expected (1, p, p)")
        return config

    @property
    def vae_scale(self) -> int:
        """Pixels per latent cell along one axis."""
        return int(self._vae_config["scale_factor_spatial"])

    @property
    def _frames_per_latent(self) -> int:
        return int(self._vae_config["scale_factor_temporal"])

    @property
    def frame_step(self) -> int:
        """The frames of a group."""
        return self._frames_per_latent

    def latent_shape_of(self, size: Size, field: str = "") -> tuple[int, int, int, int]:
        """As in the base: (C, F, H, W)."""
        return (self.denoiser_config["in_channels"], *self.latent_sizes(size, field))

    @property
    def prompt_tokens(self) -> int:
        """How many tokens of a prompt the pipeline takes."""
        return TOKENS

    @property
    def conditioning_rows(self) -> dict[str, Row]:
        """The tokens that a prompt has; the network, which takes no mask, is given zeros behind them."""
        shape = (self.prompt_tokens, self.denoiser_config["text_dim"])
        return {"encoder_hidden_states": Row(shape=shape, ragged=0, whole=True)}

    def encode_batch(self, pipe: Any, prompts: list[str], device: torch.device) -> dict:
        """As in the base, without the zeros that the pipeline puts behind a prompt's last token."""
        rows = super().encode_batch(pipe, prompts, device)
        return {name: [row[: _tokens(row)] for row in value] for name, value in rows.items()}

    def why_unfit(self) -> str | None:
        """Widths of text and latents that differ between the parts."""
        return self._why_unfit(self._vae_config["z_dim"], "text_dim")

    def _check_vae(self, config: dict) -> None:
        for name in ("scale_factor_spatial", "scale_factor_temporal"):
            if not (autoencoder.are_numbers([config[name]]) and 1 <= config[name] <= 128):
                raise ValueError(f"its {name} is {shortened(config[name])}; expected 1 to 128")
        for name in ("latents_mean", "latents_std"):
            if config[name] is None:
                raise ValueError(f"its {name} is missing; a Wan autoencoder has one number for each channel")
        autoencoder.check_scaling(config, config["z_dim"])

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of each latent channel, (1, C, 1, 1, 1)."""
        mean, std = (torch.tensor(values) for values in (self.vae.config.latents_mean, self.vae.config.latents_std))
        return mean.view(1, -1, 1, 1, 1).to(like), std.view(1, -1, 1, 1, 1).to(like)

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._statistics(latents)
        return latents / (1.0 / std) + mean  # as the pipeline rounds it

    def _scaled(self, sample: torch.Tensor) -> torch.Tensor:
        mean, std = self._statistics(sample)
        return (sample - mean) * (1.0 / std)


def _tokens(row: torch.Tensor) -> int:
    """The number of rows (L, D) up to the last one that is not zero."""
    return int(row.ne(0).any(dim=-1).nonzero().max()) + 1


class Wan(Family):
    """Wan 2.1 and 2.2, text to video."""

    adapter = WanAdapter
    pipeline_class = "WanPipeline"
    denoiser_class = "WanTransformer3DModel"
    denoiser_name = "transformer"
    part_classes: Mapping[str, tuple[str, ...]] = {
        "vae": ("AutoencoderKLWan",),
        "text_encoder": ("UMT5EncoderModel",),
        "tokenizer": ("T5TokenizerFast", "T5Tokenizer"),
    }
    repeated_blocks = ("WanTransformerBlock",)
    experts = ("transformer_2",)  # the low-noise expert of Wan 2.2
    guided_pipelines = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline")
    call_rule = TwoCalls()
    row_names = frozenset({"timestep", "encoder_hidden_states", "encoder_hidden_states_image"})
    time_dtype = torch.float32
    draws_videos = True
    frame_rate = 16
    lora_targets = (*Family.lora_targets, "ffn.net.0.proj", "ffn.net.2")

    def why_unserved(self, config: dict) -> str | None:
        """Networks that take more than a latent."""
        into, out = config.get("in_channels"), config.get("out_channels")
        if into != out or config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
            return f"takes {into} channels and gives {out}, or a picture: give the text-to-video model"
        return None


WanAdapter.family = Wan()
