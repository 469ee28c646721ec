"""Fine-tunes and low-rank updates of a tiny network, the positives and negatives of tests."""

from __future__ import annotations

import copy
from pathlib import Path

import tiny
import torch
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict

from selfnpo_fast.config import LoraConfig
from selfnpo_fast.negatives.load import as_network, load_negative
from selfnpo_fast.training.lora import add_lora


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(states, timesteps, text rows) for two samples, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    return x, torch.tensor([100, 700]), torch.randn(2, 12, tiny.WIDTH, generator=generator)


@torch.no_grad()
def output(network: torch.nn.Module) -> torch.Tensor:
    """The network's output (2, 4, 8, 8) for `inputs()`."""
    return network(*inputs()).sample


def with_lora(adapter, rank: int, alpha: float | None, targets: list[str] | None = None) -> torch.nn.Module:
    """The base under a PEFT adapter, neither of whose factors is zero."""
    network = adapter.load_denoiser(torch.float32)
    add_lora(network, LoraConfig(rank=rank, alpha=alpha, targets=targets or ["to_q", "to_k", "to_v", "to_out.0"]), 0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


def save_with_diffusers(folder: Path, network: torch.nn.Module) -> None:
    """Write the network's adapter as a LoRA file."""
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(network))


def merged(adapter, network: torch.nn.Module, scale: float) -> torch.nn.Module:
    """The base with scale * B A added to its weights."""
    base = adapter.load_denoiser(torch.float32)
    lora = {name: value for name, value in network.named_parameters() if "lora_A" in name}
    with torch.no_grad():
        for name, down in lora.items():
            up = dict(network.named_parameters())[name.replace("lora_A", "lora_B")]
            base.get_submodule(name.split(".lora_A")[0]).weight += scale * up @ down
    return base


def moved(network: torch.nn.Module, seed: int, size: float) -> torch.nn.Module:
    """A copy with Gaussian noise of standard deviation `size` on every weight."""
    network, generator = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return network


def load_network(adapter, path: str | Path, dtype: torch.dtype) -> torch.nn.Module:
    """A negative for the adapter's denoiser as a network."""
    positive = adapter.load_denoiser(dtype)
    return as_network(positive, load_negative(positive, path))
