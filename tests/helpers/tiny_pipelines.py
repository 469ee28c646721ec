"""Tiny random pipelines of diffusers' transformer families, for calls with embeddings as prompts.

The classes of pipelines, denoisers and schedulers are diffusers' own. Autoencoders are pooled
pixels, and there are no text encoders.
"""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace

import diffusers
import torch
from PIL import Image
from torch import nn

from selfnpo_fast.models import FAMILIES

CHANNELS, WIDTH, POOLED = 16, 12, 6
"""Latent channels, and the widths of text embeddings."""
CLASSES = [name for family in FAMILIES.values() if family.denoiser_name != "unet" for name in family.guided_pipelines]
CASES = [*CLASSES, "WanPipeline two experts", "StableDiffusion3Pipeline skipped layers"]
"""The classes, and ways of calling them that have rules of their own; a class's name comes first."""


class PooledPixels(nn.Module):
    """Stands for an autoencoder: latents are means of pixels, repeated along the channels."""

    dtype, device, temperal_downsample = torch.float32, torch.device("cpu"), [False, True, True]

    def __init__(self, space: int, time: int) -> None:
        super().__init__()
        self.spatial_compression_ratio, self.temporal_compression_ratio = space, time
        self.latents_mean, self.latents_std = torch.zeros(CHANNELS), torch.ones(CHANNELS)
        self.config = SimpleNamespace(
            block_out_channels=(1, 1, 1, 1), latent_channels=CHANNELS, z_dim=CHANNELS, scaling_factor=0.7,
            shift_factor=0.1, invert_scale_latents=False, temporal_compression_ratio=time, scale_factor_temporal=time,
            scale_factor_spatial=space, latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS,
        )  # fmt: skip

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        space = self.spatial_compression_ratio
        grey = pixels.mean(dim=1, keepdim=True)
        if grey.ndim == 5:
            grey = grey[:, :, :: self.temporal_compression_ratio]
        pooled = grey.unfold(-2, space, space).unfold(-2, space, space).mean(dim=(-2, -1))
        latents = pooled.repeat(1, CHANNELS, *[1] * (pooled.ndim - 2))
        draw = SimpleNamespace(sample=lambda generator=None: latents, mode=lambda: latents)
        return SimpleNamespace(latent_dist=draw)


def denoiser(name: str) -> nn.Module:
    """The denoiser of a case, without the randomness of `build`."""
    if name.startswith("CogVideoX"):
        return diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=CHANNELS * (2 if "ImageToVideo" in name else 1),
            out_channels=CHANNELS, time_embed_dim=8, text_embed_dim=WIDTH, num_layers=2, sample_width=4,
            sample_height=4, sample_frames=9, max_text_seq_length=7, use_rotary_positional_embeddings=True,
            ofs_embed_dim=8 if "ImageToVideo" in name else None,
        )  # fmt: skip
    if name.startswith("StableDiffusion3"):
        return diffusers.SD3Transformer2DModel(**_sd3())
    if name.startswith("Wan"):
        return diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=36 if "ImageToVideo" in name else CHANNELS,
            out_channels=CHANNELS, text_dim=WIDTH, freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True,
            rope_max_seq_len=32,
        )  # fmt: skip
    if name.startswith("LTX"):
        return diffusers.LTXVideoTransformer3DModel(
            in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=8,
            cross_attention_dim=16, num_layers=2, caption_channels=WIDTH,
        )  # fmt: skip
    if name.startswith("QwenImage"):
        return diffusers.QwenImageTransformer2DModel(
            in_channels=4 * CHANNELS, out_channels=CHANNELS, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
        )  # fmt: skip
    if name.startswith("Flux"):
        return diffusers.FluxTransformer2DModel(
            in_channels=4 * CHANNELS, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=POOLED, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
    assert name.startswith("ZImage"), name
    return diffusers.ZImageTransformer2DModel(
        in_channels=CHANNELS, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4], axes_lens=[128, 32, 32],
    )  # fmt: skip


def _sd3() -> dict:
    return {
        "sample_size": 4, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": WIDTH,
        "caption_projection_dim": 16, "pooled_projection_dim": POOLED, "pos_embed_max_size": 8,
    }  # fmt: skip


@torch.no_grad()
def randomised(network: nn.Module, seed: int) -> nn.Module:
    """The network in evaluation mode, with parameters that no initialisation has left at zero or
    one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return network.eval().requires_grad_(False)


def build(case: str) -> diffusers.DiffusionPipeline:
    """A pipeline of a case, without a progress bar."""
    name = case.split()[0]
    torch.manual_seed(0)
    space, time = (32, 8) if name.startswith("LTX") else (8, 4)
    parts = {
        "transformer": randomised(denoiser(name), 0), "vae": PooledPixels(space, time), "text_encoder": None,
        "tokenizer": None, "scheduler": _scheduler(name),
    }  # fmt: skip
    if name.startswith(("Flux", "StableDiffusion3")):
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
    if name.startswith("StableDiffusion3"):
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    if name == "QwenImageEditPipeline":
        parts |= {"processor": None}
    if "ControlNet" in name:
        controlnet = diffusers.SD3ControlNetModel(**_sd3() | {"num_layers": 1})
        parts["controlnet"] = randomised(controlnet, 1)
    if case.endswith("two experts"):
        parts |= {"transformer_2": randomised(denoiser(name), 2), "boundary_ratio": 0.9}
    pipe = getattr(diffusers, name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler(name: str):
    if name.startswith("CogVideoX"):
        kind = diffusers.CogVideoXDPMScheduler if "VideoToVideo" in name else diffusers.CogVideoXDDIMScheduler
        return kind(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        )
    if name.startswith("Wan"):
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        return diffusers.UniPCMultistepScheduler(**flow)
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def text(negative: bool, length: int, rows: int = 2) -> torch.Tensor:
    """Embeddings of prompts, (rows, length, WIDTH)."""
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(50 + negative))


def arguments(case: str, **changes) -> dict:
    """Keyword arguments of a short, guided call of two prompts; None leaves an argument out.

    The output is latents, and all noise is seeded.
    """
    name = case.split()[0]
    generator = torch.Generator().manual_seed(9)
    size = 64 if name.startswith("LTX") else 32
    values: dict = {
        "prompt_embeds": text(False, 7), "negative_prompt_embeds": text(True, 7), "num_inference_steps": 2,
        "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(3), "output_type": "latent",
        "height": size, "width": size, "return_dict": False,
    }  # fmt: skip
    picture = torch.rand(2, 3, size, size, generator=generator)
    if name.startswith(("CogVideoX", "LTX")):
        values["num_frames"] = 9
    if name.startswith("Wan"):
        values |= {"num_frames": 5, "num_inference_steps": 3}
    if name == "CogVideoXPipeline":
        values["use_dynamic_cfg"] = True
    if name.startswith(("Flux", "StableDiffusion3")):
        pooled = torch.randn(4, POOLED, generator=generator)
        values |= {"pooled_prompt_embeds": pooled[:2], "negative_pooled_prompt_embeds": pooled[2:]}
    if name.startswith(("Flux", "QwenImage")):
        values["true_cfg_scale"] = 3.0
    if name.startswith("QwenImage"):
        values |= {"guidance_scale": None, "negative_prompt_embeds": text(True, 5)}
        values |= {
            "prompt_embeds_mask": torch.ones(2, 7).long(),
            "negative_prompt_embeds_mask": torch.ones(2, 5).long(),
        }
    if name.startswith("LTX"):
        masks = {"prompt_attention_mask": [1] * 6 + [0], "negative_prompt_attention_mask": [1] * 4 + [0] * 3}
        values |= {key: torch.tensor([mask, mask]) for key, mask in masks.items()}
    if name.startswith("ZImage"):  # its scale is omega; prompts of 7, 40, 3 and 34 tokens: one and two multiples of 32
        values["guidance_scale"] = 2.0
        values["prompt_embeds"] = [text(False, 7, 1)[0], text(False, 40, 1)[0]]
        values["negative_prompt_embeds"] = [text(True, 34, 1)[0], text(True, 3, 1)[0]]
    if "Img2Img" in name or "Inpaint" in name:
        values |= {"image": picture, "strength": 1.0}
    if "Inpaint" in name:
        values["mask_image"] = (torch.arange(size) < size // 2).float().expand(2, 1, size, size)
    if "ControlNet" in name:
        values["control_image"] = picture
    if "ImageToVideo" in name:
        values["image"] = picture[:1] if name.startswith("Wan") else picture
    if "VideoToVideo" in name:
        del values["num_frames" if "num_frames" in values else "height"]
        frames = torch.rand(5, 3, size, size, generator=generator)
        values |= {"video": [frames, frames.flip(0)], "strength": 1.0}
    if name == "LTXConditionPipeline":
        values |= {"image": Image.new("RGB", (size, size), "red"), "frame_index": 0, "strength": 0.8}
    if name == "QwenImageEditPipeline":
        values["image"] = Image.new("RGB", (size, size), "red")
    if case.endswith("skipped layers"):
        values |= {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
    return {key: value for key, value in (values | changes).items() if value is not None or key == "guidance_scale"}


@contextlib.contextmanager
def small_edits():
    """Within it, Qwen-Image-Edit takes pictures of 32 pixels, not of a million."""
    module = diffusers.pipelines.qwenimage.pipeline_qwenimage_edit
    before, module.calculate_dimensions = module.calculate_dimensions, lambda area, ratio: (32, 32, None)
    try:
        yield
    finally:
        module.calculate_dimensions = before


@torch.no_grad()
def draw(pipe, case: str, **changes) -> torch.Tensor:
    """Latents of a short call."""
    with small_edits():
        return pipe(**arguments(case, **changes))[0]


# The plain loop with two networks.

ROWS = {"hidden_states", "encoder_hidden_states", "timestep", "pooled_projections", "guidance", "video_coords"}
ROWS |= {"encoder_hidden_states_mask", "encoder_attention_mask", "block_controlnet_hidden_states"}


class RowByRow(nn.Module):
    """In a denoiser's place: computes each row by itself, by the network of its branch.

    A row is negative where its text begins as a negative prompt's does: the rule knows nothing of
    pipelines, orders and calls.
    """

    def __init__(self, positive: nn.Module, negative: nn.Module) -> None:
        super().__init__()
        self.positive, self.negative = positive, negative

    config = property(lambda self: self.positive.config)
    dtype = property(lambda self: self.positive.dtype)
    device = property(lambda self: self.positive.device)
    in_channels = property(lambda self: self.positive.in_channels)

    def cache_context(self, name: str, **kwargs):
        return contextlib.nullcontext()

    def forward(self, *args, **kwargs):
        if args:  # Z-Image: lists
            x, t, words = args
            pairs = [([x[i]], t[i : i + 1], [words[i]]) for i in range(len(x))]
            rows = [self.of(words[i])(*pair, **kwargs)[0][0] for i, pair in enumerate(pairs)]
            return (rows,)
        count = len(kwargs["hidden_states"])
        outputs = []
        for i in range(count):
            row = {key: self.row(value, i) if key in ROWS else value for key, value in kwargs.items()}
            if kwargs.get("img_shapes") is not None:
                row["img_shapes"] = kwargs["img_shapes"][i : i + 1]
            outputs.append(self.of(row["encoder_hidden_states"][0])(**row)[0])
        return (torch.cat(outputs),)

    def row(self, value, i: int):
        if isinstance(value, list | tuple):
            return [self.row(part, i) for part in value]
        return value[i : i + 1] if isinstance(value, torch.Tensor) else value

    def of(self, words: torch.Tensor) -> nn.Module:
        """The network for a row with this text."""
        return self.negative if any(torch.equal(words[0], first) for first in _negative_firsts()) else self.positive


@functools.cache
def _negative_firsts() -> list[torch.Tensor]:
    """The first token of every negative prompt of `arguments`."""
    kinds = ((7, 2), (5, 2), (34, 1), (3, 1))
    return [words[0] for length, rows in kinds for words in text(True, length, rows)]
