"""Counter-based noise: Philox4x32-10 in plain PyTorch integers.

A number depends on the seed, the sample's id and the draw it is for, never on batch size, rank, device or call order.
Key = the 64-bit seed; counter = (element // 4, id low, id high, draw id), all 32-bit. Uniforms keep 24 bits,
`u1 = ((bits >> 8) + 1) 2^-24` and `u2 = (bits >> 8) 2^-24`; each counter gives four normals by Box-Muller.
Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_DRAW_KINDS = 16


class Draw(enum.IntEnum):
    """What a random number is for; uses that recur along a trajectory add the grid index (`draw_id`)."""

    START_NOISE = 0
    START_INDEX = 1
    STEPS = 2
    RENOISE_TIME = 3
    RENOISE = 4
    ETA = 5
    PROMPT_DROPOUT = 6
    STAGGER = 7
    SAMPLE = 8
    POSTERIOR = 9


def draw_id(kind: Draw, grid_index: torch.Tensor | int = -1) -> torch.Tensor | int:
    """The 32-bit draw id of `kind` at a grid index (-1 stands for t = 0 and for draws made once per trajectory)."""
    return (grid_index + 1) * _DRAW_KINDS + int(kind)


@dataclass(frozen=True)
class NoiseKey:
    """Names the normals that an operation draws for itself.

    `sample_ids` (B,) int64; `draws` an int or (B,) int64 of draw ids, of which the lower 32 bits count.
    """

    seed: int
    sample_ids: torch.Tensor
    draws: torch.Tensor | int


def philox(counter: tuple[torch.Tensor, ...], seed: int) -> tuple[torch.Tensor, ...]:
    """Ten rounds of Philox4x32 on four int64 tensors holding uint32 values; returns four such tensors.

    Products of two 32-bit values wrap in int64 exactly as in uint64, and the mask after the shift drops the sign.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _blocks(key: NoiseKey, blocks: int) -> torch.Tensor:
    """Random bits (B, blocks, 4) int64 in [0, 2^32)."""
    ids = key.sample_ids.to(torch.int64).view(-1, 1)
    draws = torch.as_tensor(key.draws, dtype=torch.int64, device=ids.device).view(-1, 1) & _MASK
    shape = (len(ids), blocks)
    element = torch.arange(blocks, device=ids.device).expand(shape)
    counter = (element, (ids & _MASK).expand(shape), ((ids >> 32) & _MASK).expand(shape), draws.expand(shape))
    return torch.stack(philox(counter, key.seed), dim=-1)


def normal(key: NoiseKey, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normals (B, *shape), Box-Muller in `dtype` (float32 or float64); element = row-major index in a sample.

    The uniforms are exact in either dtype.
    """
    count = math.prod(shape)
    bits = _blocks(key, -(-count // 4)) >> 8
    u1 = (bits[..., 0::2] + 1).to(dtype) * 2.0**-24
    u2 = bits[..., 1::2].to(dtype) * 2.0**-24
    radius, angle = torch.sqrt(-2 * torch.log(u1)), 2 * math.pi * u2
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :count].contiguous().view(-1, *shape)


def uniform(key: NoiseKey) -> torch.Tensor:
    """One uniform per sample, (B,) float32 in [0, 1) with 24 random bits."""
    return (_blocks(key, 1)[:, 0, 0] >> 8).float() * 2.0**-24


def randint(key: NoiseKey, high: torch.Tensor | int) -> torch.Tensor:
    """One integer per sample, (B,) int64 uniform in {0, ..., high - 1}; `high` an int or (B,) below 2^31."""
    return (_blocks(key, 1)[:, 0, 0] * high) >> 32


def permute(position: torch.Tensor, size: int, key: int, epoch: torch.Tensor) -> torch.Tensor:
    """A keyed permutation of {0, ..., size - 1} per epoch, applied to `position`.

    position (B,) int64 in that range; epoch (B,) int64; returns (B,) int64. A four-round Feistel network over the next
    even power of two, walked until it lands inside the range. Its rounds mix by multiplication (xxHash's primes):
    shuffling needs less than noise does.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    salt = [(key >> (16 * r)) & 0xFFFF for r in range(4)]
    turn = (epoch * 0x27D4EB2F) & _MASK
    out = position.to(torch.int64)
    outside = torch.ones_like(out, dtype=torch.bool)
    while outside.any():
        left, right = out >> half, out & low
        for r in range(4):
            mixed = ((right + salt[r] + (r << 17)) * 0x85EBCA77 + turn) & _MASK
            mixed = ((mixed ^ (mixed >> 15)) * 0x9E3779B1) & _MASK
            left, right = right, left ^ ((mixed ^ (mixed >> 16)) & low)
        out = torch.where(outside, (left << half) | right, out)
        outside = out >= size
    return out
