"""Tiny pipelines of the real diffusers classes, written to a folder with fixed seeds, offline."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

WIDTH = 16
SHALLOW = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}
"""Changes of `unet` for tests that compile: one resolution, and attention in the middle only.

Such a network compiles in less than half the time.
"""


def tokenizer() -> CLIPTokenizer:
    """A tokenizer of characters: every letter is a token."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=12)


def text_config(tokens: CLIPTokenizer, projection: int = WIDTH) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=projection,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def vae() -> AutoencoderKL:
    """An autoencoder with 8 pixels per latent cell, as in Stable Diffusion."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
    )


def scheduler(prediction_type: str = "epsilon", **changes) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        **changes,
    )


def unet(**changes) -> UNet2DConditionModel:
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(config | changes))


def sdxl_unet(**changes) -> UNet2DConditionModel:
    """A UNet for two text encoders, pooled text embeddings and size conditioning."""
    config = {
        "cross_attention_dim": 2 * WIDTH,
        "attention_head_dim": (2, 4),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
        "transformer_layers_per_block": 1,
        "use_linear_projection": True,
    }
    return unet(**(config | changes))


def write_sd(folder: Path, prediction_type: str = "epsilon", seed: int = 0, **unet_changes) -> Path:
    """Write a Stable Diffusion 1.x pipeline to `folder`, and return that."""
    torch.manual_seed(seed)
    tokens = tokenizer()
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(tokens)),
        tokenizer=tokens,
        unet=unet(**unet_changes),
        scheduler=scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_sdxl(folder: Path, seed: int = 0) -> Path:
    """Write a Stable Diffusion XL pipeline to `folder`, and return that."""
    torch.manual_seed(seed)
    tokens = tokenizer()
    StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(tokens)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokens)),
        tokenizer=tokens,
        tokenizer_2=tokens,
        unet=sdxl_unet(),
        scheduler=scheduler(),
        force_zeros_for_empty_prompt=True,
    ).save_pretrained(folder)
    return folder


def edit(path: Path, **changes) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
