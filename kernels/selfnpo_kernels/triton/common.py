"""What the kernels share: noise, keyed draws, the placing of programs, launching.

Every kernel runs on a flat grid, `blocks` programs for each sample, so a sample's scalars are loaded once a program and
both thousands of samples and huge ones fit a grid. The row length N is a constexpr: the compiler then knows whether
rows begin at multiples of 16 bytes, and that a row's end falls between two accesses.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from selfnpo_kernels.rng import Draw

_DRAW_KINDS = tl.constexpr(16)
START_NOISE = tl.constexpr(int(Draw.START_NOISE))
START_INDEX = tl.constexpr(int(Draw.START_INDEX))
RENOISE_TIME = tl.constexpr(int(Draw.RENOISE_TIME))
RENOISE = tl.constexpr(int(Draw.RENOISE))
PROMPT_DROPOUT = tl.constexpr(int(Draw.PROMPT_DROPOUT))


# Arguments of which a kernel reads a few numbers a sample: where they begin is nobody's concern, and rows of a table
# begin anywhere. Without this, every odd address would compile a variant of its own.
SMALL = ["k", "index", "scale", "sample_ids", "draws", "weight", "slots", "next_slots", "pairs", "pair_weight", "step",
         "start", "renoise", "timesteps", "grad", "per_sample", "loss"]  # fmt: skip


def entry(**options):
    """triton.jit for kernels whose small arguments are named as in `SMALL`."""

    def decorate(function):
        names = [name for name in inspect.signature(function).parameters if name in SMALL]
        return triton.jit(function, do_not_specialize_on_alignment=names, **options)

    return decorate


# The launch


@dataclass(frozen=True)
class Plan:
    """How a (B, ...) tensor is cut into programs: the constexprs of `place`, and the warps."""

    N: int
    BLOCK: int
    WIDE: bool
    num_warps: int
    samples: int

    @property
    def blocks(self) -> int:
        """Programs for each sample."""
        return triton.cdiv(self.N, self.BLOCK)

    @property
    def programs(self) -> int:
        """Programs in all."""
        return self.samples * self.blocks

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        return {"N": self.N, "BLOCK": self.BLOCK, "WIDE": self.WIDE, "num_warps": self.num_warps}


def plan(shape: tuple[int, ...], *, block: int = 1024, rows: int = 0) -> Plan:
    """The configuration for tensors of `shape` (B, ...), of which the largest has max(B, rows) rows.

    1024 elements over 128 threads are eight a thread: one 16-byte access of bf16, two of float32, and no fewer would do
    for either. Larger blocks would cost registers (tdft_step takes 80) and so warps to hide latency with, and waste
    more of a row's last block. Rows of 256 elements or fewer get one warp, eight elements a thread again.
    """
    samples, count = shape[0], math.prod(shape[1:])
    block, warps = (block, 4) if count > 256 else (256, 1)
    if count >= 2**31:
        raise ValueError(f"a sample has {count} elements; expected fewer than 2^31")
    wide = max(samples, rows) * max(count, 8) + block > 2**31  # rows of tables have up to 7 columns
    return Plan(N=count, BLOCK=block, WIDE=wide, num_warps=warps, samples=samples)


_recorder: list[tuple] | None = None


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple]]:
    """Collect (kernel, arguments, options) of the launches inside the context, and launch nothing: for `aot.py`."""
    global _recorder
    before, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = before


def launch(kernel, programs: int, on: torch.Tensor, *arguments, **options) -> None:
    """Run `programs` programs on the device of `on`."""
    if _recorder is not None:
        _recorder.append((kernel, arguments, options))
    elif programs:
        with torch.cuda.device_of(on):
            kernel[(programs,)](*arguments, **options)


# Placing and memory


@triton.jit
def place(N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """(sample, block of its row) of this program."""
    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    sample = program // blocks
    block = program % blocks
    if WIDE:
        sample = sample.to(tl.int64)
        block = block.to(tl.int64)
    return sample, block


@triton.jit
def load(pointer, row, block, N: tl.constexpr, BLOCK: tl.constexpr):
    """A block of row `row` in float32; zeros beyond the row's end."""
    lane = block * BLOCK + tl.arange(0, BLOCK)
    if N % BLOCK == 0:
        values = tl.load(pointer + (row * N + lane))
    else:
        values = tl.load(pointer + (row * N + lane), mask=lane < N, other=0)
    return values.to(tl.float32)


def interpreted() -> bool:
    """Whether the kernels of this process run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
    return not isinstance(place, triton.runtime.JITFunction)


# The interpreter cuts a float32 off where the hardware rounds it to bfloat16.
_CUTS_OFF = tl.constexpr(interpreted())


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 values in `dtype`, to nearest even."""
    if _CUTS_OFF and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def store(pointer, row, block, values, N: tl.constexpr, BLOCK: tl.constexpr):
    """Round a block once and write it."""
    lane = block * BLOCK + tl.arange(0, BLOCK)
    values = rounded(values, pointer.dtype.element_ty)
    if N % BLOCK == 0:
        tl.store(pointer + (row * N + lane), values)
    else:
        tl.store(pointer + (row * N + lane), values, mask=lane < N)


@triton.jit
def table_row(index, sample, PER_SAMPLE: tl.constexpr):
    """The sample's row in a coefficient table: by its index, one for each sample, or the only one."""
    if index is not None:
        row = tl.load(index + sample)
    elif PER_SAMPLE:
        row = sample
    else:
        row = sample * 0
    return row


@triton.jit
def load_or_none(pointer, row, block, N: tl.constexpr, BLOCK: tl.constexpr):
    """As `load`; None for None."""
    if pointer is None:
        values = None
    else:
        values = load(pointer, row, block, N, BLOCK)
    return values


@triton.jit
def guided(pos, neg, w):
    """p = pos + w (pos - neg), or the one that is given (Eq. 6); w a pointer."""
    if pos is None:
        p = neg
    elif neg is None:
        p = pos
    else:
        p = pos + tl.load(w) * (pos - neg)
    return p


# Noise: as rng.py defines it


@triton.jit
def philox_words(seed, sample_id, draw, counter):
    """Four words of random bits; counter uint32, a scalar or a block; seed, sample_id and draw int64 scalars."""
    low = sample_id.to(tl.uint32)
    high = (sample_id >> 32).to(tl.uint32)
    return tl.philox(seed.to(tl.int64), counter, low, high, draw.to(tl.uint32))


# sin(2 pi v) = v (SIN_0 + SIN_1 v^2 + ...) and cos(2 pi v) = 1 + COS_1 v^2 + ... for |v| <= 1/8, fitted minimax.
SIN_0 = tl.constexpr(6.28318529)
SIN_1 = tl.constexpr(-41.3416626)
SIN_2 = tl.constexpr(81.5925535)
SIN_3 = tl.constexpr(-75.4020679)
COS_1 = tl.constexpr(-19.7392087)
COS_2 = tl.constexpr(64.9393265)
COS_3 = tl.constexpr(-85.4437417)
COS_4 = tl.constexpr(59.2459643)


@triton.jit
def box_muller(radius_bits, angle_bits):
    """Two normals from two words, Box-Muller with u1 = ((bits >> 8) + 1) 2^-24 and u2 = (bits >> 8) 2^-24.

    The angle is split in integers into the nearest quarter turn and an exact rest, |rest| <= 1/8 turn, where short
    minimax polynomials (fitted for this; errors 3e-9 and 5e-11) give sin and cos of 2 pi rest: the library's cos keeps
    a table for huge arguments on the stack.
    """
    u1 = ((radius_bits >> 8) + 1).to(tl.int32).to(tl.float32) * (2.0**-24)
    radius = tl.sqrt(-2.0 * tl.log(u1))
    turn = (angle_bits >> 8).to(tl.int32)
    quarter = (turn + (1 << 21)) >> 22
    rest = (turn - (quarter << 22)).to(tl.float32) * (2.0**-24)
    square = rest * rest
    sine = rest * (((SIN_3 * square + SIN_2) * square + SIN_1) * square + SIN_0)
    cosine = (((COS_4 * square + COS_3) * square + COS_2) * square + COS_1) * square + 1.0
    odd = (quarter & 1) == 1
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    x = tl.where(((quarter + 1) & 2) == 2, -x, x)
    y = tl.where((quarter & 2) == 2, -y, y)
    return radius * x, radius * y


@triton.jit
def _four(seed, sample_id, draw, counter):
    """The four normals of each counter."""
    w0, w1, w2, w3 = philox_words(seed, sample_id, draw, counter.to(tl.uint32))
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def normals(seed, sample_id, draw, block, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """Standard normals of elements block * BLOCK ... of a sample, (BLOCK,) float32: four from each counter.

    A thread holds as many consecutive ones as a 16-byte access of `dtype`, so that nothing moves between threads: one
    counter for float32, two for the narrow types. After each join the last axis counts faster than those before.
    """
    if dtype.primitive_bitwidth == 32:
        z0, z1, z2, z3 = _four(seed, sample_id, draw, block * (BLOCK // 4) + tl.arange(0, BLOCK // 4))
    else:
        counter = 2 * (block * (BLOCK // 8) + tl.arange(0, BLOCK // 8))
        a0, a1, a2, a3 = _four(seed, sample_id, draw, counter)
        b0, b1, b2, b3 = _four(seed, sample_id, draw, counter + 1)
        z0, z1, z2, z3 = tl.join(a0, b0), tl.join(a1, b1), tl.join(a2, b2), tl.join(a3, b3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK,))


@triton.jit
def noise(
    given, seed, sample_ids, draw, draws, sample, block, N: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr
):
    """The given noise of a block, or its key's normals, for a tensor of `dtype`."""
    if given is not None:
        z = load(given, sample, block, N, BLOCK)
    else:
        if draws is not None:
            draw = tl.load(draws + sample)
        z = normals(seed, tl.load(sample_ids + sample), draw, block, BLOCK, dtype)
    return z


# Keyed draws, one for a sample


@triton.jit
def draw_id(kind: tl.constexpr, grid_index):
    """The draw of a kind at a grid index, -1 for t = 0 (rng.draw_id)."""
    return (grid_index + 1) * _DRAW_KINDS + kind


@triton.jit
def word(seed, sample_id, draw):
    """The first word of a sample's draw, int64 in [0, 2^32)."""
    bits, _, _, _ = philox_words(seed, sample_id, draw, (draw * 0).to(tl.uint32))
    return bits.to(tl.int64)


@triton.jit
def randint(seed, sample_id, draw, high):
    """rng.randint: an integer in {0, ..., high - 1}."""
    return (word(seed, sample_id, draw) * high) >> 32


@triton.jit
def uniform(seed, sample_id, draw):
    """rng.uniform: float32 in [0, 1)."""
    return (word(seed, sample_id, draw) >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)


@triton.jit
def _feistel(value, key, turn, HALF: tl.constexpr):
    low: tl.constexpr = (1 << HALF) - 1
    left = value >> HALF
    right = value & low
    for r in tl.static_range(4):
        salt = ((key >> (16 * r)) & 0xFFFF).to(tl.uint32)
        mixed = (right + salt + (r << 17)) * tl.full((), 0x85EBCA77, tl.uint32) + turn
        mixed = (mixed ^ (mixed >> 15)) * tl.full((), 0x9E3779B1, tl.uint32)
        left, right = right, left ^ ((mixed ^ (mixed >> 16)) & low)
    return (left << HALF) | right


@triton.jit
def item_of(sample_id, items, key, HALF: tl.constexpr):
    """The item (prompt, image) of a sample: rng.permute of its place in its epoch, int64.

    All mixing is modulo 2^32. HALF is `half_bits(items)`. Ids below zero count from the epoch before, as in Python.
    """
    epoch = sample_id // items
    position = sample_id - epoch * items
    if position < 0:
        position += items
        epoch -= 1
    turn = epoch.to(tl.uint32) * tl.full((), 0x27D4EB2F, tl.uint32)
    size = items.to(tl.uint32)
    value = _feistel(position.to(tl.uint32), key, turn, HALF)
    while value >= size:
        value = _feistel(value, key, turn, HALF)
    return value.to(tl.int64)


def half_bits(items: int) -> int:
    """Half the bits that the Feistel network of `item_of` permutes."""
    return max(1, (max(items - 1, 1).bit_length() + 1) // 2)
