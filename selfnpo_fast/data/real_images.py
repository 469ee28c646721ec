"""Latents of real images with captions, for rollouts that start from data (Eq. 14)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.data.latent_store import stored_latents
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.world import World

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "digits"


@dataclass(frozen=True)
class RealData:
    """Scaled latents (N, C, H, W) float32, in host memory or mapped from a file, and one caption each."""

    latents: torch.Tensor
    captions: list[str]


def load_real_data(config: TrainConfig, adapter, world: World) -> RealData:
    """The embedded digits' latents for `digits`, otherwise those that `data.store` keeps of the pictures of a source.

    What it does not have is encoded now; all ranks take part.
    Raises UserError on all ranks for what is wrong with source or store, and RunError where the disk takes no more.
    """
    data = config.data
    if data.source == "digits":
        return _embedded(adapter, data.limit)
    root = data.store or str(Path(config.output).expanduser().absolute().parent / "latents")
    return RealData(*stored_latents(data.source, root, adapter, limit=data.limit, seed=config.seed, world=world))


def _embedded(adapter, limit: int) -> RealData:
    with safe_open(ASSETS / "latents.safetensors", "pt") as file:
        latents = file.get_tensor("latents")[:limit].float()
        index = file.get_tensor("prompt_index")[:limit].long().tolist()
    if tuple(latents.shape[1:]) != tuple(adapter.latent_shape):
        raise UserError(
            f"data.source: 'digits' holds latents of shape {tuple(latents.shape[1:])}, but the model needs "
            f"{tuple(adapter.latent_shape)}; it fits the embedded digits model alone"
        )
    prompts = (ASSETS / "prompts.txt").read_text().splitlines()
    return RealData(latents, [prompts[i] for i in index])
