"""What the families around diffusers' UNet2DConditionModel share: names, namings, image prompts,
latents of a grid."""

from __future__ import annotations

import torch
from torch import nn

from selfnpo_fast.models.base import Adapter, Family, SharedParts
from selfnpo_fast.runtime.errors import UserError, one_line

MAX_RESOLUTION = 2**14  # pixels

_ORIGINAL = "model.diffusion_model."
"""What the names of a denoiser begin with in checkpoints of the original Stable Diffusion code."""
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
"""What all keys begin with in LoRA files of kohya's scripts."""
_KINDS = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint", "Adapter")

_GLIGEN = ("boxes", "masks", "positive_embeddings", "phrases_masks", "phrases_embeddings", "image_masks")
_GLIGEN += ("image_embeddings",)
_ROW_NAMES = frozenset(
    {
        *("timestep", "encoder_hidden_states", "class_labels", "timestep_cond"),
        *("attention_mask", "encoder_attention_mask"),
        *("down_block_additional_residuals", "mid_block_additional_residual"),  # ControlNets
        "down_intrablock_additional_residuals",  # T2I-Adapters
        *(f"added_cond_kwargs.{name}" for name in ("text_embeds", "time_ids", "image_embeds", "hint")),
        *(f"cross_attention_kwargs.gligen.{name}" for name in _GLIGEN),
    }
)
"""What UNet2DConditionModel.forward takes besides the sample, read from it and GLIGEN's pipelines."""


class UNetFamily(Family):
    """A family whose denoiser is a UNet2DConditionModel."""

    denoiser_class = "UNet2DConditionModel"
    denoiser_name = "unet"
    repeated_blocks = ("BasicTransformerBlock", "ResnetBlock2D")
    input_name = "sample"
    row_names = _ROW_NAMES
    not_rows = frozenset({"cross_attention_kwargs.ip_adapter_masks"})  # they count image prompts
    inert_options = frozenset({"sample_size", "upcast_attention"})
    text_lora_prefixes = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_")

    def why_unguided(self, config: dict) -> str | None:
        """Latent consistency models take the guidance scale as an input."""
        if config.get("time_cond_proj_dim") is not None:
            return "takes the guidance scale as an input (LCM)"
        return None

    def why_unsampled(self, config: dict) -> str | None:
        """The sampler has no way to give image prompts."""
        if config.get("encoder_hid_dim_type") is not None:
            return "wants image prompts (IP-Adapter), which need attach_negative"
        return None

    def shared_parts(self, denoiser: nn.Module, network: nn.Module) -> SharedParts:
        """Image prompts (the IP-Adapter's projections and attention processors), and FreeU."""
        return UNetParts(denoiser, network)

    def from_original_names(self, keys: list[str], config: dict) -> dict[str, str] | None:
        """Checkpoints of the original Stable Diffusion code, by diffusers' converter."""
        if not any(key.startswith(_ORIGINAL) for key in keys):
            return None
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

        try:
            # The converter renames and looks at no value, so that names can stand for the tensors.
            renamed = convert_ldm_unet_checkpoint({key: key for key in keys}, dict(config))
        except Exception as error:  # what a name too few or too many ends in depends on the place
            raise ValueError(f"is an original checkpoint that does not fit the model: {one_line(error)}") from error
        stray = sorted({key for key in keys if key.startswith(_ORIGINAL)} - set(renamed.values()))
        if stray:
            raise ValueError(f"does not fit the model: it has no place for {stray[0]}")
        return {name: key for name, key in renamed.items() if key is not None}

    def from_foreign_lora(
        self, tensors: dict[str, torch.Tensor], denoiser: nn.Module
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]] | None:
        """kohya's keys by diffusers' converters; blocks of SDXL may have their original names."""
        if not all(key.startswith(_KOHYA) for key in tensors):
            return None
        from diffusers.loaders.lora_conversion_utils import (
            _convert_non_diffusers_lora_to_diffusers,
            _maybe_map_sgm_blocks_to_diffusers,
        )
        from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

        before = sum(key.endswith(".lora_down.weight") for key in tensors)
        try:
            renamed = _maybe_map_sgm_blocks_to_diffusers(dict(tensors), getattr(denoiser, "config", None))
            renamed, alphas = _convert_non_diffusers_lora_to_diffusers(renamed)
        except Exception as error:  # an odd name fails wherever the converters first trip over it
            raise ValueError(f"does not fit the model: {type(error).__name__}: {one_line(error, 200)}") from error
        layers = {key.removeprefix("unet."): value for key, value in convert_unet_state_dict_to_peft(renamed).items()}
        if sum(".lora_A." in key for key in layers) != before:
            raise ValueError("mixes two namings of blocks (input_blocks and down_blocks), of which one would be lost")
        by_key = convert_unet_state_dict_to_peft(alphas or {})
        return layers, {
            key.removeprefix("unet.").removesuffix(".alpha").split(".lora_A.")[0]: value
            for key, value in by_key.items()
        }


class UNetParts(SharedParts):
    """A second network uses the denoiser's image projections and the attention processors with them
    (IP-Adapter), and its factors of FreeU."""

    def __init__(self, denoiser: nn.Module, network: nn.Module) -> None:
        self._denoiser, self._network = denoiser, network
        self._before: tuple | None = None
        self._freeu = _freeu(network)

    def follow(self) -> None:
        """Take over an IP-Adapter that was loaded onto the denoiser, and give it back when it has
        left; take over FreeU as it is now.

        Raises UserError for FaceID Plus, which keeps rows of a call in the network.
        """
        from diffusers.models.embeddings import MultiIPAdapterImageProjection

        network, denoiser = self._network, self._denoiser
        _set_freeu(network, _freeu(denoiser))
        shared = denoiser.encoder_hid_proj
        if not isinstance(shared, MultiIPAdapterImageProjection):
            self._restore_prompts()
            return
        if any(getattr(layer, "clip_embeds", None) is not None for layer in shared.image_projection_layers):
            raise UserError(
                "negative: the image prompts are FaceID Plus's, whose rows are kept in the unet and cannot be shared "
                "out between two networks; use a LoRA as the negative"
            )
        if network.encoder_hid_proj is not shared:
            before = network.encoder_hid_proj, network.config.encoder_hid_dim_type, network.attn_processors
            self._before = self._before or before
            self._set(shared, denoiser.config.encoder_hid_dim_type, denoiser.attn_processors)

    def restore(self) -> None:
        """Give the second network its own projections, processors and FreeU back."""
        _set_freeu(self._network, self._freeu)
        self._restore_prompts()

    def _restore_prompts(self) -> None:
        if self._before is not None:
            self._set(*self._before)
            self._before = None

    def _set(self, projection: nn.Module | None, kind: str | None, processors: dict) -> None:
        self._network.encoder_hid_proj = projection
        self._network.config.encoder_hid_dim_type = kind
        self._network.set_attn_processor(dict(processors))  # it empties the dict


_FREEU = ("s1", "s2", "b1", "b2")


def _freeu(unet: nn.Module) -> list[dict[str, float | None]]:
    """FreeU's factors of each block on the way up; None where FreeU is off."""
    return [{name: getattr(block, name, None) for name in _FREEU} for block in unet.up_blocks]


def _set_freeu(unet: nn.Module, factors: list[dict[str, float | None]]) -> None:
    """Give each block on the way up its factors."""
    for block, values in zip(unet.up_blocks, factors, strict=True):
        for name, value in values.items():
            if getattr(block, name, None) != value:
                setattr(block, name, value)


class UNetAdapter(Adapter):
    """Latents (C, H, W) on a grid of cells of `vae_scale` pixels."""

    def checked_config(self, config: dict) -> dict:
        """With a sample size and a number of channels that are whole numbers."""
        return config | {"sample_size": int(config["sample_size"]), "in_channels": int(config["in_channels"])}

    @property
    def vae_scale(self) -> int:
        """Pixels per latent cell along one axis."""
        raise NotImplementedError

    @property
    def default_resolution(self) -> int:
        """The latent's side in the denoiser's config, in pixels."""
        return self.denoiser_config["sample_size"] * self.vae_scale

    def latent_shape_of(self, height: int, width: int, field: str = "") -> tuple[int, int, int]:
        """(C, H, W) of the latent of a picture in pixels; errors name `field`, or else the side."""
        for side, pixels in (("height", height), ("width", width)):
            if pixels % self.vae_scale or not 1 <= pixels <= MAX_RESOLUTION:
                raise UserError(
                    f"{field or side}: {pixels} is no multiple of {self.vae_scale} from {self.vae_scale} to "
                    f"{MAX_RESOLUTION}"
                )
        return (self.denoiser_config["in_channels"], height // self.vae_scale, width // self.vae_scale)


def guided_pipelines(family: str) -> tuple[str, ...]:
    """The names of a family's stock pipeline and of its kin that guide in the same way."""
    return tuple(f"{family}{kind}Pipeline" for kind in _KINDS)
