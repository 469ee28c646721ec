"""Tiny pipelines of the transformer families, of the real diffusers classes, with fixed seeds.

Stable Diffusion 3, CogVideoX and Wan, each written to a folder as a whole pipeline.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny import text_config, tokenizer
from transformers import (
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

WIDTH = 32
"""Width of T5's states, to which CLIP's are filled up in Stable Diffusion 3."""
TOKENS = 226
"""Tokens that a CogVideoX takes of a prompt, where a call of the stock pipeline names no other number."""


def t5_tokenizer(model_max_length: int | None = None) -> T5Tokenizer:
    """A tokenizer of characters: every letter is a token."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *letters]
    vocab = [(piece, -1.0 - 0.01 * i) for i, piece in enumerate(pieces)]
    more = {} if model_max_length is None else {"model_max_length": model_max_length}
    return T5Tokenizer(vocab=vocab, extra_ids=0, **more)


def _t5_config(cls: type, tokens: T5Tokenizer):
    return cls(
        vocab_size=len(tokens),
        d_model=WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
    )


def t5_encoder(tokens: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(_t5_config(T5Config, tokens)).eval()


def umt5_encoder(tokens: T5Tokenizer) -> UMT5EncoderModel:
    return UMT5EncoderModel(_t5_config(UMT5Config, tokens)).eval()


# Stable Diffusion 3


def sd3_transformer(**changes) -> SD3Transformer2DModel:
    """Two blocks, the first of which has a second attention, as in Stable Diffusion 3.5 medium."""
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": 16,
        "pooled_projection_dim": WIDTH,
        "pos_embed_max_size": 12,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return SD3Transformer2DModel(**(config | changes)).eval()


def sd3_vae() -> AutoencoderKL:
    """An autoencoder of 16 channels with 8 pixels per latent cell."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def write_sd3(folder: Path, seed: int = 0, **transformer_changes) -> Path:
    """Write a Stable Diffusion 3 pipeline, which draws 64 x 64 pixels, and return the folder."""
    torch.manual_seed(seed)
    clip, t5 = tokenizer(), t5_tokenizer()
    StableDiffusion3Pipeline(
        transformer=sd3_transformer(**transformer_changes),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=sd3_vae(),
        text_encoder=CLIPTextModelWithProjection(text_config(clip)).eval(),
        tokenizer=clip,
        text_encoder_2=CLIPTextModelWithProjection(text_config(clip)).eval(),
        tokenizer_2=clip,
        text_encoder_3=t5_encoder(t5),
        tokenizer_3=t5,
    ).save_pretrained(folder)
    return folder


# CogVideoX


def cogvideox_transformer(**changes) -> CogVideoXTransformer3DModel:
    """Two blocks; without `changes` as in 2B, whose positions are no rotary ones."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,  # rotary tables split it into a quarter, three eighths and three eighths
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": WIDTH,
        "num_layers": 2,
        "sample_width": 6,
        "sample_height": 4,
        "sample_frames": 9,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": TOKENS,
        "use_rotary_positional_embeddings": False,
    }
    return CogVideoXTransformer3DModel(**(config | changes)).eval()


def cogvideox_vae(scaling_factor: float = 1.15258426) -> AutoencoderKLCogVideoX:
    """An autoencoder with 8 pixels and 4 frames per latent cell."""
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_height=32,
        sample_width=48,
        scaling_factor=scaling_factor,
    ).eval()


def cogvideox_scheduler(cls: type = CogVideoXDDIMScheduler, snr_shift_scale: float = 3.0):
    return cls(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
        snr_shift_scale=snr_shift_scale,
        timestep_spacing="trailing",
    )


def write_cogvideox(folder: Path, seed: int = 0, *, rotary: bool = False, **transformer_changes) -> Path:
    """Write a CogVideoX pipeline, which draws 9 frames of 32 x 48 pixels, and return the folder.

    With `rotary` it is made as 5B is: rotary positions, its scheduler and its scaling.
    """
    torch.manual_seed(seed)
    tokens = t5_tokenizer()
    CogVideoXPipeline(
        tokenizer=tokens,
        text_encoder=t5_encoder(tokens),
        vae=cogvideox_vae(0.7 if rotary else 1.15258426),
        transformer=cogvideox_transformer(use_rotary_positional_embeddings=rotary, **transformer_changes),
        scheduler=cogvideox_scheduler(CogVideoXDPMScheduler, 1.0) if rotary else cogvideox_scheduler(),
    ).save_pretrained(folder)
    return folder


# Wan


def wan_transformer(**changes) -> WanTransformer3DModel:
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": WIDTH,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 64,
    }
    return WanTransformer3DModel(**(config | changes)).eval()


def wan_vae() -> AutoencoderKLWan:
    """An autoencoder with 8 pixels and 4 frames per latent cell, and statistics for each channel."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.7571, -0.7089, -0.9113, 0.1075],
        latents_std=[2.8184, 1.4541, 2.3275, 2.6558],
    ).eval()


def wan_scheduler(flow_shift: float = 3.0) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, solver_order=2
    )


def write_wan(folder: Path, seed: int = 0, *, experts: int = 1, boundary: float = 0.875, **transformer_changes) -> Path:
    """Write a Wan pipeline and return the folder.

    With two experts it is made as 2.2 is: `transformer` above the boundary, `transformer_2` below.
    """
    torch.manual_seed(seed)
    tokens = t5_tokenizer()
    WanPipeline(
        tokenizer=tokens,
        text_encoder=umt5_encoder(tokens),
        vae=wan_vae(),
        transformer=wan_transformer(**transformer_changes),
        transformer_2=wan_transformer(**transformer_changes) if experts == 2 else None,
        boundary_ratio=boundary if experts == 2 else None,
        scheduler=wan_scheduler(),
    ).save_pretrained(folder)
    return folder
