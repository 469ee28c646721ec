"""Counter-based random numbers: Philox4x32-10 in plain PyTorch integers.

A number depends on the seed, on the sample's id and on the purpose of the draw. It never depends on
the batch size, the rank, the device or the order of calls.

The key is the 64-bit seed. The counter is four 32-bit words: element // 4, the low and the high
word of the sample id, and the draw id. Uniforms keep 24 bits, u1 = ((bits >> 8) + 1) 2^-24 and u2 =
(bits >> 8) 2^-24. Each counter gives four normals by Box-Muller.

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
    """The purpose of a random number. A purpose that recurs along a trajectory adds the grid index.

    `draw_id` combines the two.
    """

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
    """The draw id of `kind` at a grid index, an int or (B,) int64 like `grid_index`.

    Grid index -1 stands for t = 0, and for purposes that occur once in a trajectory.
    """
    return (grid_index + 1) * _DRAW_KINDS + int(kind)


@dataclass(frozen=True)
class NoiseKey:
    """The key of random numbers that an operation draws itself."""

    seed: int
    """Any integer; its lower 64 bits count."""
    sample_ids: torch.Tensor
    """(B,) int64."""
    draws: torch.Tensor | int
    """Draw ids: an int, or (B,) int64; the lower 32 bits count."""


def philox(counter: tuple[torch.Tensor, ...], seed: int) -> tuple[torch.Tensor, ...]:
    """Ten rounds of Philox4x32 on four int64 tensors of one shape that hold uint32 values.

    Returns four such tensors. Products of two 32-bit values wrap in int64 exactly as in uint64, and
    the mask after the shift drops the sign.
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
    """Standard normals (B, *shape), by Box-Muller in `dtype` (float32 or float64).

    Elements are counted in row-major order within a sample. The uniforms are exact in either dtype.
    """
    count = math.prod(shape)
    bits = _blocks(key, -(-count // 4)) >> 8
    u1 = (bits[..., 0::2] + 1).to(dtype) * 2.0**-24
    u2 = bits[..., 1::2].to(dtype) * 2.0**-24
    radius, angle = torch.sqrt(-2 * torch.log(u1)), 2 * math.pi * u2
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :count].contiguous().view(-1, *shape)


def uniform(key: NoiseKey) -> torch.Tensor:
    """One uniform number for each sample, (B,) float32 in [0, 1) with 24 random bits."""
    return (_blocks(key, 1)[:, 0, 0] >> 8).float() * 2.0**-24


def randint(key: NoiseKey, high: torch.Tensor | int) -> torch.Tensor:
    """One integer for each sample, (B,) int64, uniform in {0, ..., high - 1}.

    high: an int or (B,) int64, below 2^31.
    """
    return (_blocks(key, 1)[:, 0, 0] * high) >> 32


def permute(position: torch.Tensor, size: int, key: int, epoch: torch.Tensor) -> torch.Tensor:
    """Applies a permutation of {0, ..., size - 1} to `position`; key and epoch choose it.

    position: (B,) int64 in that range.
    epoch: (B,) int64.
    Returns (B,) int64.

    A Feistel network of four rounds permutes the numbers below the next power of four. It is
    applied again while a result lies outside the range. Its rounds mix by multiplication with the
    primes of xxHash, which is enough for shuffling and too little for noise.
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
