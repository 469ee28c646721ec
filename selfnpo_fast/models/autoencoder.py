"""What adapters ask of an autoencoder, whatever it encodes: a hash, keyed samples, whole pictures."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import torch
from torch import nn

from selfnpo_fast.runtime.errors import shortened
from selfnpo_kernels import Draw, NoiseKey, draw_id, normal


def sha256_of(vae: nn.Module) -> str:
    """A hash of an autoencoder's weights and config, 64 hex digits: equal ones give equal
    latents."""
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in vae.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def sampled(posterior: Any, ids: torch.Tensor, seed: int) -> torch.Tensor:
    """A sample (B, ...) of an autoencoder's posterior.

    The noise of a sample depends on the seed and its own id in ids (B,) int64 only, so that batches
    may be cut in any way.
    """
    noise = normal(NoiseKey(seed, ids, draw_id(Draw.POSTERIOR)), posterior.mean.shape[1:])
    # The posterior has a deviation for each element, which no fused op knows: each picture meets
    # this once.
    return torch.addcmul(posterior.mean, posterior.std, noise)


def clamped(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1]; what is infinite becomes NaN, so that it is not taken for white."""
    return pictures.clamp(-1, 1).masked_fill_(pictures.isinf(), torch.nan)


def check_scaling(config: dict, channels: int) -> None:
    """ValueError where an autoencoder's config has numbers that latents of so many channels cannot
    be divided by or multiplied with."""
    scaling, shift = config.get("scaling_factor", 1.0), config.get("shift_factor")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    for name, value, possible in (
        ("scaling_factor", scaling, are_numbers([scaling]) and scaling > 0),
        ("shift_factor", shift, shift is None or are_numbers([shift])),
        ("latents_mean", mean, mean is None or (are_numbers(mean) and len(mean) == channels)),
        ("latents_std", std, std is None or (are_numbers(std) and len(std) == channels and min(std) > 0)),
    ):
        if not possible:
            raise ValueError(f"its {name} is {shortened(value)}; expected finite numbers that latents can be scaled by")


def are_numbers(values: Any) -> bool:
    """Whether a config's value is a list of finite numbers."""
    return isinstance(values, list | tuple) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )
