"""The arithmetic of the compiled kernels in numpy, with approximate instructions at their worst.

Triton compiles `sqrt` and `/` to the instructions in `DOCUMENTED`, whose results may lie anywhere
within the error that the PTX ISA states; it fuses products with sums, and takes `log` from
libdevice, all of whose instructions round correctly. Everything else is IEEE, as in Triton's
interpreter. An emulation follows its kernel operation by operation. `Choice` says to which side
every approximate result errs, and which product of a sum of two is fused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import exact
import numpy as np

F = np.float32
# Worst errors by the PTX ISA (floating-point instructions): sqrt.approx has a "maximum relative
# error" of 2^-23 over all positive numbers; the "maximum ulp error" of div.full "is 2 across the
# full range of inputs".
DOCUMENTED = {"sqrt.approx.f32": 2.0**-23, "div.full.f32": 2.0}
SMALLEST_NORMAL = 2.0**-126  # .ftz replaces smaller arguments and results by zero

# ln(1 + f) = f + f^2 (LOG[0] + LOG[1] f + ...) for -1/3 <= f <= 1/3: __nv_logf of libdevice, with
# its numbers as the PTX writes them.
LOG_BITS = ("BF000000", "3EAAAA78", "BE7FFF22", "3E4CED0B", "BE2AD8B9", "3E0F2955", "BDF8CDCC", "3E1039F6", "BE055027")
LN2_BITS = "3F317218"
_LOG = [np.uint32(int(bits, 16)).view(F) for bits in LOG_BITS]
_LN2 = np.uint32(int(LN2_BITS, 16)).view(F)


@dataclass(frozen=True)
class Choice:
    """How far the approximate results err, each in units of their documented errors."""

    sqrt: int = 0
    div: int = 0
    other_div: int = 0
    first: bool = True
    """In k0 a + k1 b, whether the first product is the fused one."""


def choices(*, sqrt: bool = False, divisions: int = 0) -> Iterator[Choice]:
    """Every extreme choice of a kernel with these approximate instructions."""
    signs = [(-1, 1) if used else (0,) for used in (sqrt, divisions > 0, divisions > 1)]
    for a, b, c in itertools.product(*signs):
        for first in (False, True):
            yield Choice(a, b, c, first)


def fma(a, b, c) -> np.ndarray:
    """a b + c in float32, rounded once (the sum is rounded to 53 bits before)."""
    return F(np.float64(a) * np.float64(b) + np.float64(c))


def horner(x: np.ndarray, *coefficients) -> np.ndarray:
    """coefficients[0] + coefficients[1] x + ..., by fused operations."""
    out = F(coefficients[-1])
    for c in coefficients[-2::-1]:
        out = fma(out, x, F(c))
    return out


def two_products(choice: Choice, k0, a, k1, b) -> np.ndarray:
    """k0 a + k1 b: one product is rounded, the other is fused with the sum."""
    return fma(k0, a, F(k1) * F(b)) if choice.first else fma(k1, b, F(k0) * F(a))


def _within(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """The float32 that is farthest from the float64 `value` and within `error`, on its side."""
    edge = value + error
    out = F(edge)
    beyond = np.abs(np.float64(out) - value) > np.abs(error)
    return np.where(beyond, np.nextafter(out, F(value)), out)


def sqrt_approx(x: np.ndarray, side: int) -> np.ndarray:
    """sqrt.approx.ftz.f32 of float32 numbers that are zero or normal."""
    assert ((x == 0) | (x >= SMALLEST_NORMAL)).all(), "sqrt.approx.ftz flushes subnormal arguments"
    value = np.sqrt(np.float64(x))
    return _within(value, side * DOCUMENTED["sqrt.approx.f32"] * value) if side else F(value)


def div_full(a: np.ndarray, b: np.ndarray, side: int) -> np.ndarray:
    """div.full.f32; an exact zero stays one."""
    value = np.float64(a) / np.float64(b)
    ulp = np.spacing(np.abs(F(value))).astype(np.float64)
    return np.where(value == 0, F(0), _within(value, side * DOCUMENTED["div.full.f32"] * ulp)) if side else F(value)


def log(x: np.ndarray) -> np.ndarray:
    """__nv_logf of normal float32 numbers."""
    bits = x.view(np.int32)
    exponent = (bits - np.int32(1059760811)) & np.int32(-8388608)
    f = (bits - exponent).view(F) - F(1)
    return fma(F(exponent) * F(2.0**-23), _LN2, fma(f * horner(f, *_LOG), f, f))


def box_muller(words: np.ndarray, choice: Choice) -> np.ndarray:
    """`common.box_muller` of (..., 2) uint32 words: two normals, (..., 2) float32."""
    from selfnpo_kernels.triton import common

    kept = (words >> np.uint32(8)).astype(np.int32)
    u1 = F(kept[..., 0] + 1) * F(2.0**-24)
    radius = sqrt_approx(F(-2) * log(u1), choice.sqrt)
    turn = kept[..., 1]
    quarter = (turn + (1 << 21)) >> 22
    remainder = F(turn - (quarter << 22)) * F(2.0**-24)
    square = remainder * remainder
    sine = remainder * horner(square, *(float(getattr(common, f"SIN_{i}").value) for i in range(4)))
    cosine = horner(square, 1.0, *(float(getattr(common, f"COS_{i}").value) for i in range(1, 5)))
    odd = quarter & 1 == 1
    x, y = np.where(odd, sine, cosine), np.where(odd, cosine, sine)
    x, y = np.where((quarter + 1) & 2 == 2, -x, x), np.where(quarter & 2 == 2, -y, y)
    return np.stack([radius * x, radius * y], axis=-1)


def total(values: np.ndarray) -> np.ndarray:
    """Sums over the last axis, as a program does: eight for each thread, then over the threads."""
    short = -values.shape[-1] % 1024
    padded = np.pad(values, [*[(0, 0)] * (values.ndim - 1), (0, short)])
    lanes = padded.reshape(*values.shape[:-1], -1, 8)
    sums = lanes[..., 0]
    for i in range(1, 8):
        sums = sums + lanes[..., i]
    while sums.shape[-1] > 1:
        if sums.shape[-1] % 2:
            sums = np.concatenate([sums, np.zeros_like(sums[..., :1])], axis=-1)
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def awkward_words() -> np.ndarray:
    """(n, 2) uint32: the ends of both uniforms and the eighths of a turn, each with each."""
    ends = np.arange(40)
    near = [ends, 2**24 - 1 - ends]
    near += [np.clip((2**24 // 8) * i + ends - 20, 0, 2**24 - 1) for i in range(1, 8)]
    near += [2**i + np.arange(-2, 3) for i in range(6, 24)]
    kept = np.unique(np.concatenate(near)).astype(np.uint32) << np.uint32(8)
    return np.stack(np.meshgrid(kept, kept), axis=-1).reshape(-1, 2)


def random_words(seed: int, count: int) -> np.ndarray:
    """(count, 2) uint32."""
    return np.random.default_rng(seed).integers(0, 2**32, (count, 2), dtype=np.uint32)


def normal_sizes(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, sizes), each (..., 2) float64, of the exact normals of words."""
    kept = (words >> np.uint32(8)).astype(np.float64)
    return exact.box_muller((kept[..., 0] + 1) * 2.0**-24, kept[..., 1] * 2.0**-24)
