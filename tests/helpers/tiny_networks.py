"""Tiny random networks of the real diffusers transformers, with inputs for one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import CogVideoXTransformer3DModel, SD3Transformer2DModel, WanTransformer3DModel
from torch import nn

WIDTH = 32


def cogvideox() -> tuple[nn.Module, dict]:
    """Two blocks over 3 frames of 4 x 4 latents with 3 tokens of text; the arguments of a call."""
    network = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=3,
    )
    inputs = {"hidden_states": torch.randn(2, 3, 4, 4, 4), "encoder_hidden_states": torch.randn(2, 3, WIDTH)}
    return network, inputs | {"timestep": torch.tensor([3, 700])}


def sd3() -> tuple[nn.Module, dict]:
    """Two blocks over 8 x 8 latents with 3 tokens of text; the arguments of a call."""
    network = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
    )
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 3, WIDTH)}
    return network, inputs | {"pooled_projections": torch.randn(2, 24), "timestep": torch.tensor([3.0, 700.0])}


def wan() -> tuple[nn.Module, dict]:
    """Two blocks over 2 frames of 4 x 4 latents with 3 tokens of text; the arguments of a call."""
    network = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=16,
    )
    inputs = {"hidden_states": torch.randn(2, 4, 2, 4, 4), "encoder_hidden_states": torch.randn(2, 3, WIDTH)}
    return network, inputs | {"timestep": torch.tensor([3, 700])}


NETWORKS: dict[str, Callable[[], tuple[nn.Module, dict]]] = {"cogvideox": cogvideox, "sd3": sd3, "wan": wan}


def new(name: str, seed: int = 0) -> tuple[nn.Module, dict]:
    """(network, arguments of a call) by name; equal seeds give equal tensors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, inputs = NETWORKS[name]()
    return network, inputs | {"return_dict": False}
