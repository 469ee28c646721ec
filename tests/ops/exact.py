"""The numbers of the ops, computed by other means.

Noise uses numpy's unsigned integers, formulas float64, and draws Python's integers. This module
imports only the names of the draws from the code under test.
"""

from __future__ import annotations

import math

import numpy as np

from selfnpo_kernels import Draw

MASK = 0xFFFFFFFF


def philox(counter: tuple, seed: int) -> list[np.ndarray]:
    """Philox4x32-10 (Salmon et al., 2011) on four arrays of uint32 values, held as uint64.

    seed: any integer.
    """
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    key = [np.uint64(seed & MASK), np.uint64(seed >> 32 & MASK)]
    low, half = np.uint64(MASK), np.uint64(32)
    for _ in range(10):
        products = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [products[1] >> half ^ c[1] ^ key[0], products[1] & low, products[0] >> half ^ c[3] ^ key[1],
             products[0] & low]  # fmt: skip
        key = [key[0] + np.uint64(0x9E3779B9) & low, key[1] + np.uint64(0xBB67AE85) & low]
    return c


def bits(seed: int, ids, draws, blocks: int) -> np.ndarray:
    """(B, blocks, 4) uint32 values; ids (B,) int64; draws an int or (B,)."""
    ids = np.asarray(ids, dtype=np.int64).astype(np.uint64)[:, None]
    draws = np.broadcast_to(np.asarray(draws, dtype=np.uint64), len(ids))[:, None]
    element = np.arange(blocks, dtype=np.uint64)[None]
    words = philox((element, ids & np.uint64(MASK), ids >> np.uint64(32), draws), seed)
    return np.stack(np.broadcast_arrays(*words), axis=-1)


def uniforms(seed: int, ids, draws, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(u1, u2), each (B, pairs) float64: the inputs of Box-Muller."""
    kept = bits(seed, ids, draws, -(-count // 4)) >> np.uint64(8)
    return (kept[..., 0::2] + np.uint64(1)).reshape(len(kept), -1) * 2.0**-24, (
        kept[..., 1::2].reshape(len(kept), -1) * 2.0**-24
    )


def box_muller(u1: np.ndarray, u2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(normals, sizes), each (..., 2), of two uniforms. Roundings are relative to the sizes.

    The rounding of an angle grows with the angle.
    """
    radius, angle = np.sqrt(-2 * np.log(u1)), 2 * np.pi * u2
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs, np.repeat((radius * (1 + angle))[..., None], 2, axis=-1)


def sized_normals(seed: int, ids, draws, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(normals, sizes), each (B, *shape), of a key."""
    count = math.prod(shape)
    both = box_muller(*uniforms(seed, ids, draws, count))
    return tuple(a.reshape(len(a), -1)[:, :count].reshape(-1, *shape) for a in both)


def normals(seed: int, ids, draws, shape: tuple[int, ...]) -> np.ndarray:
    """(B, *shape) float64."""
    return sized_normals(seed, ids, draws, shape)[0]


def draw_id(kind: Draw, grid_index: int = -1) -> int:
    """Sixteen kinds of draws at each grid index."""
    return 16 * (grid_index + 1) + int(kind)


def first_word(seed: int, sample: int, draw: int) -> int:
    """The first 32 bits of a sample's draw."""
    return int(bits(seed, [sample], draw, 1)[0, 0, 0])


def uniform(seed: int, sample: int, draw: int) -> float:
    """One number in [0, 1)."""
    return (first_word(seed, sample, draw) >> 8) * 2.0**-24


def randint(seed: int, sample: int, draw: int, high: int) -> int:
    """One number in {0, ..., high - 1}."""
    return first_word(seed, sample, draw) * high >> 32


def prompt_index(sample: int, num_prompts: int, key: int) -> int:
    """The prompt of a sample: a Feistel permutation of each epoch of `num_prompts` ids."""
    epoch, position = divmod(sample, num_prompts)
    half = 1
    while 4**half < num_prompts:
        half += 1
    low = 2**half - 1
    while True:
        left, right = position >> half, position & low
        for r in range(4):
            mixed = (right + (key >> 16 * r & 0xFFFF) + (r << 17)) * 0x85EBCA77 + epoch * 0x27D4EB2F & MASK
            mixed = (mixed ^ mixed >> 15) * 0x9E3779B1 & MASK
            left, right = right, left ^ (mixed ^ mixed >> 16) & low
        position = left << half | right
        if position < num_prompts:
            return position


def column(k: np.ndarray, j: int, rank: int) -> np.ndarray:
    """Column j of (B, n), to broadcast over (B, ...)."""
    return k[:, j].reshape(-1, *[1] * (rank - 1))


def guided(pos, neg, k: np.ndarray, scale=None) -> tuple[np.ndarray, np.ndarray]:
    """(p, size of its terms) of classifier-free guidance, Eq. 1."""
    if pos is None or neg is None:
        p = neg if pos is None else pos
        size = np.abs(p)
    else:
        w = column(k, 6, pos.ndim)
        p = (1 + w) * pos - w * neg
        size = np.abs(pos) + np.abs(w) * (np.abs(pos) + np.abs(neg))
    if scale is None:
        return p, size
    s = scale.reshape(-1, *[1] * (p.ndim - 1))
    return s * p, np.abs(s) * size


def linear(*terms: tuple) -> tuple[np.ndarray, np.ndarray]:
    """(sum of coefficient times value, sum of the absolute values of coefficient times size).

    terms: (coefficient, value, size) each.
    """
    return sum(k * value for k, value, _ in terms), sum(np.abs(k) * np.abs(size) for k, _, size in terms)
