"""What the families around diffusers' UNet2DConditionModel share: names, namings, image prompts,
latents of a grid."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from selfnpo_fast.models.base import Adapter
from selfnpo_fast.models.family import Family, SharedParts
from selfnpo_fast.models.size import Size
from selfnpo_fast.models.unet_names import original_paths
from selfnpo_fast.runtime.errors import UserError, shortened

MAX_RESOLUTION = 2**14  # pixels

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
"""What UNet2DConditionModel.forward takes besides the sample, read from it and GLIGEN's pipelines.
"""


class UNetFamily(Family):
    """A family whose denoiser is a UNet2DConditionModel."""

    denoiser_class = "UNet2DConditionModel"
    denoiser_name = "unet"
    repeated_blocks = ("BasicTransformerBlock", "ResnetBlock2D")
    input_name = "sample"
    row_names = _ROW_NAMES
    not_rows = frozenset({"cross_attention_kwargs.ip_adapter_masks"})  # they count image prompts
    inert_options = frozenset({"sample_size", "upcast_attention"})
    # All of a transformer block's layers, as other trainers for UNets have it by default.
    lora_targets = (*Family.lora_targets, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
    text_lora_prefixes = (
        *("text_encoder.", "text_encoder_2.", "text_encoders.", "clip_l.", "clip_g."),
        *("lora_te_", "lora_te1_", "lora_te2_", "bundle_emb."),  # the last is OneTrainer's, for embeddings of tokens
    )
    added_embedding: str | None = None
    """What the network adds to the embedding of the timestep (addition_embed_type)."""

    def why_unserved(self, config: dict) -> str | None:
        """Networks whose forward wants more than a latent and a text, or gives more than a
        prediction."""
        into, out = config.get("in_channels"), config.get("out_channels")
        if into != out and isinstance(into, int) and isinstance(out, int):
            kinds = {9: ", as for inpainting", 8: ", as for instructions about a picture", 5: ", as with a depth map"}
            kind = kinds.get(into, "") if out == 4 else ""
            return (
                f"takes {into} channels and gives {out}{kind}: it wants or gives more than a latent, which is not "
                "served; give the text-to-image model"
            )
        classes = config.get("class_embed_type") or config.get("num_class_embeds")
        if classes is not None:
            return f"wants class labels ({shortened(classes, 40)}), which no prompt gives; give a text-to-image model"
        added = config.get("addition_embed_type")
        if added != self.added_embedding:
            return (
                f"has {shortened(added, 40)} as addition_embed_type, and a {self.pipeline_class} gives "
                f"{self.added_embedding!r}; give a model of that pipeline"
            )
        return None

    def why_unguided(self, config: dict) -> str | None:
        """Latent consistency models take the guidance scale as an input."""
        if config.get("time_cond_proj_dim") is not None:
            return "takes the guidance scale as an input (LCM)"
        return None

    def why_unsampled(self, config: dict) -> str | None:
        """The sampler has no way to give image prompts."""
        if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
            return "wants image prompts (IP-Adapter), which need attach_negative"
        return None

    def shared_parts(self, denoiser: nn.Module, network: nn.Module) -> SharedParts:
        """Image prompts (the IP-Adapter's projections and attention processors), and FreeU."""
        return UNetParts(denoiser, network)

    def original_paths(self, paths: Iterable[str]) -> dict[str, str]:
        """The names of the original Stable Diffusion code."""
        return original_paths(paths)


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
        """With a number of channels that is a whole number."""
        return config | {"in_channels": int(config["in_channels"])}

    @property
    def vae_scale(self) -> int:
        """Pixels per latent cell along one axis."""
        raise NotImplementedError

    @property
    def default_size(self) -> Size:
        """Height and width of the latent in the denoiser's config, in pixels.

        Raises UserError where the config names none.
        """
        size = self.denoiser_config.get("sample_size")
        sides = list(size) if isinstance(size, list | tuple) else [size, size]
        if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
            raise UserError(
                f"model.resolution: {self.path} names no size of its pictures (sample_size is {shortened(size, 40)}); "
                "give a resolution"
            )
        return Size(sides[0] * self.vae_scale, sides[1] * self.vae_scale)

    def latent_shape_of(self, size: Size, field: str = "") -> tuple[int, int, int]:
        """(C, H, W) of the latent of a picture; errors name `field` as in the base."""
        size.refuse_frames(field, self.path)
        size.check_sides(self.vae_scale, MAX_RESOLUTION, field)
        return (self.denoiser_config["in_channels"], size.height // self.vae_scale, size.width // self.vae_scale)


def guided_pipelines(family: str) -> tuple[str, ...]:
    """The names of a family's stock pipeline and of its kin that guide in the same way."""
    return tuple(f"{family}{kind}Pipeline" for kind in _KINDS)
