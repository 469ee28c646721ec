"""Latents and captions of real images, from which rollouts may start (Eq. 14)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.data.latent_store import stored_latents
from selfnpo_fast.data.store_files import fingerprint
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.world import World

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "digits"


@dataclass(frozen=True)
class RealData:
    """Latents of real images and their captions."""

    latents: torch.Tensor
    """(N, ...) float32, scaled for the denoiser; in host memory or mapped from a file."""
    captions: list[str]
    """N captions."""
    fingerprint: str
    """The SHA-256 of the latents (`store_files.fingerprint`), which tells other latents apart."""


def load_real_data(config: TrainConfig, adapter, world: World) -> RealData:
    """The real images that `config.data` names: the embedded digits, or a source of pictures.

    The latents of a source are kept in a store. All ranks together encode what the store lacks.
    Raises UserError on all ranks for a bad source or store, and RunError on all ranks where the
    disk is full.
    """
    data = config.data
    if data.source == "digits":
        return _embedded(adapter, data.limit)
    root = data.store or str(Path(config.output).expanduser().absolute().parent / "latents")
    choices = {"limit": data.limit, "column": data.column, "skip": data.on_bad == "skip", "stride": data.stride}
    return RealData(*stored_latents(data.source, root, adapter, seed=config.seed, world=world, **choices))


def _embedded(adapter, limit: int) -> RealData:
    """The first `limit` embedded digits. Raises UserError for a model with other latents."""
    with safe_open(ASSETS / "latents.safetensors", "pt") as file:
        latents = file.get_tensor("latents")[:limit].float()
        prompt_indices = file.get_tensor("prompt_index")[:limit].long().tolist()
    if tuple(latents.shape[1:]) != tuple(adapter.latent_shape):
        raise UserError(
            f"data.source: 'digits' holds latents of shape {tuple(latents.shape[1:])}, but the model needs "
            f"{tuple(adapter.latent_shape)}; it fits only the embedded digits model"
        )
    prompts = (ASSETS / "prompts.txt").read_text().splitlines()
    return RealData(latents, [prompts[i] for i in prompt_indices], fingerprint(latents))
