"""What adapters ask of an autoencoder, whatever it encodes: a hash, keyed samples, whole pictures,
work in tiles and slices."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from selfnpo_fast.runtime.errors import UserError, shortened
from selfnpo_kernels import Draw, NoiseKey, draw_id, normal


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """How an autoencoder works, to save memory: by diffusers' enable_tiling and enable_slicing."""

    tiling: bool = False
    """Tiles of a picture or of the frames, whose seams are blended: other pixels than without."""
    slicing: bool = False
    """One picture of a batch after the other. Clips are always taken so."""

    def check(self, vae: nn.Module | None, field: str = "") -> None:
        """UserError where an autoencoder does not offer what is asked for; `field` goes before the
        option's name."""
        for name in ("tiling", "slicing"):
            if getattr(self, name) and not hasattr(vae, f"use_{name}"):
                what = "this family's autoencoder" if vae is None else type(vae).__name__
                raise UserError(f"{field}vae_{name}: {what} has no {name}; leave the option out")

    @contextlib.contextmanager
    def of(self, vae: nn.Module) -> Iterator[None]:
        """An autoencoder works so within the block, and afterwards as it did."""
        before = dict(vars(vae))
        if self.tiling:
            vae.enable_tiling()
        if self.slicing:
            vae.enable_slicing()
        changed = {name: before[name] for name, value in vars(vae).items() if value is not before.get(name)}
        try:
            yield
        finally:
            vars(vae).update(changed)

    def check_shape(self, made: torch.Tensor, rows: int, columns: int) -> None:
        """UserError where what tiles made is of another size: their overlaps do not fit any."""
        if self.tiling and tuple(made.shape[-2:]) != (rows, columns):
            found = " x ".join(map(str, made.shape[-2:]))
            raise UserError(
                f"vae_tiling: the autoencoder's tiles make {found} where {rows} x {columns} is expected: their "
                "overlaps do not fit this size; leave the option out, or take another size"
            )


def sha256_of(vae: nn.Module, pieces: Pieces) -> str:
    """A hash of an autoencoder's weights and config, and of tiling, 64 hex digits: equal ones give
    equal latents."""
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    if pieces.tiling:
        digest.update(b"tiling")
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
