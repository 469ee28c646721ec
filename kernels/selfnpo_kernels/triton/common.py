"""Shared by the kernels: launching, loads and stores, noise, and keyed draws.

Every kernel runs on a flat grid with `blocks` programs for each sample. A program therefore loads
the scalars of one sample only, and a grid holds thousands of samples as well as very large ones.
The row length N (elements of a sample) is a constexpr: the compiler then knows whether rows begin
at multiples of 16 bytes, and that a row ends between two accesses.
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
from selfnpo_kernels.schemas import STEP_COLUMNS as _STEP_COLUMNS

STEP_COLUMNS = tl.constexpr(_STEP_COLUMNS)
_DRAW_KINDS = tl.constexpr(16)
START_NOISE = tl.constexpr(int(Draw.START_NOISE))
START_INDEX = tl.constexpr(int(Draw.START_INDEX))
RENOISE_TIME = tl.constexpr(int(Draw.RENOISE_TIME))
RENOISE = tl.constexpr(int(Draw.RENOISE))
PROMPT_DROPOUT = tl.constexpr(int(Draw.PROMPT_DROPOUT))


# Arguments of which a kernel reads a few numbers for each sample. Their alignment does not matter,
# and rows of a table begin at any address. Specialised on alignment, the kernels would be compiled
# again for every odd address.
SMALL = ["k", "index", "scale", "sample_ids", "draws", "weight", "slots", "next_slots", "pairs", "pair_weight", "step",
         "start", "renoise", "timesteps", "grad", "per_sample", "loss"]  # fmt: skip


def entry(**options):
    """triton.jit with `options`, not specialised on the alignment of the arguments in `SMALL`."""

    def decorate(function):
        names = [name for name in inspect.signature(function).parameters if name in SMALL]
        return triton.jit(function, do_not_specialize_on_alignment=names, **options)

    return decorate


# The launch


@dataclass(frozen=True)
class Plan:
    """How a (B, ...) tensor is divided among programs."""

    N: int
    """Elements of a sample."""
    BLOCK: int
    """Elements of a program."""
    WIDE: bool
    """Whether indices need 64 bits."""
    num_warps: int
    """Warps of a program."""
    samples: int
    """B."""

    @property
    def blocks(self) -> int:
        """Number of programs for each sample."""
        return triton.cdiv(self.N, self.BLOCK)

    @property
    def programs(self) -> int:
        """Number of programs of all samples."""
        return self.samples * self.blocks

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        return {"N": self.N, "BLOCK": self.BLOCK, "WIDE": self.WIDE, "num_warps": self.num_warps}


def plan(shape: tuple[int, ...], *, block: int = 1024, rows: int = 0) -> Plan:
    """The plan for tensors of `shape` (B, ...), of which the largest has max(B, rows) rows.

    1024 elements over 128 threads are eight for each thread: one 16-byte access of bfloat16 or two
    of float32, the least that fills 16-byte accesses for both. Larger blocks would take more
    registers (tdft_step takes 80), which leaves fewer warps to hide latency, and would waste more
    of a row's last block. Rows of 256 elements or fewer get one warp, again eight elements for each
    thread.

    Raises ValueError where a sample has 2^31 elements or more.
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
    """Collects (kernel, arguments, options) of the launches inside the context; launches nothing.

    `aot.py` uses it.
    """
    global _recorder
    before, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = before


def launch(kernel, programs: int, on: torch.Tensor, *arguments, **options) -> None:
    """Runs `programs` programs of a kernel on the device of the tensor `on`."""
    if _recorder is not None:
        _recorder.append((kernel, arguments, options))
    elif programs:
        with torch.cuda.device_of(on):
            kernel[(programs,)](*arguments, **options)


# Blocks in memory


@triton.jit
def sample_and_block(N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """(sample, block within the sample's row) of this program."""
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
    """A block of a row, (BLOCK,) float32; zeros beyond the row's end."""
    lane = block * BLOCK + tl.arange(0, BLOCK)
    if N % BLOCK == 0:
        values = tl.load(pointer + (row * N + lane))
    else:
        values = tl.load(pointer + (row * N + lane), mask=lane < N, other=0)
    return values.to(tl.float32)


def interpreted() -> bool:
    """Whether the kernels of this process run in Triton's interpreter.

    They do where TRITON_INTERPRET was 1 when this module was imported.
    """
    return not isinstance(sample_and_block, triton.runtime.JITFunction)


# The interpreter truncates a float32 to bfloat16, where the hardware rounds it.
_TRUNCATES = tl.constexpr(interpreted())


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 values rounded to `dtype`, to nearest even."""
    if _TRUNCATES and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def store(pointer, row, block, values, N: tl.constexpr, BLOCK: tl.constexpr):
    """Rounds a block of a row, (BLOCK,) float32, to the dtype of the tensor and writes it."""
    lane = block * BLOCK + tl.arange(0, BLOCK)
    values = rounded(values, pointer.dtype.element_ty)
    if N % BLOCK == 0:
        tl.store(pointer + (row * N + lane), values)
    else:
        tl.store(pointer + (row * N + lane), values, mask=lane < N)


@triton.jit
def table_row(index, sample, PER_SAMPLE: tl.constexpr):
    """The sample's row in a coefficient table: from the index, one for each sample, or row 0."""
    if index is not None:
        row = tl.load(index + sample)
    elif PER_SAMPLE:
        row = sample
    else:
        row = sample * 0
    return row


@triton.jit
def load_or_none(pointer, row, block, N: tl.constexpr, BLOCK: tl.constexpr):
    """As `load`; None where the pointer is None."""
    if pointer is None:
        values = None
    else:
        values = load(pointer, row, block, N, BLOCK)
    return values


@triton.jit
def guided(pos, neg, w):
    """p = pos + w (pos - neg), or the given one of pos and neg (Eq. 1); w is a pointer."""
    if pos is None:
        p = neg
    elif neg is None:
        p = pos
    else:
        p = pos + tl.load(w) * (pos - neg)
    return p


# Noise, as rng.py defines it


@triton.jit
def philox_words(seed, sample_id, draw, counter):
    """Four words of random bits for each counter.

    counter: uint32, a scalar or a block.
    seed, sample_id, draw: int64 scalars.
    """
    low = sample_id.to(tl.uint32)
    high = (sample_id >> 32).to(tl.uint32)
    return tl.philox(seed.to(tl.int64), counter, low, high, draw.to(tl.uint32))


# sin(2 pi v) = v (SIN_0 + SIN_1 v^2 + ...) and cos(2 pi v) = 1 + COS_1 v^2 + ... for |v| <= 1/8.
# The coefficients are a minimax fit; the errors are 3e-9 (sin) and 5e-11 (cos).
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
    """Two normals from two words, by Box-Muller.

    The uniforms are u1 = ((bits >> 8) + 1) 2^-24 and u2 = (bits >> 8) 2^-24.

    Integer arithmetic splits the angle into the nearest quarter turn and an exact remainder of at
    most 1/8 turn, whose sine and cosine come from short polynomials. The library's cosine would
    keep a table for huge arguments on the stack.
    """
    u1 = ((radius_bits >> 8) + 1).to(tl.int32).to(tl.float32) * (2.0**-24)
    radius = tl.sqrt(-2.0 * tl.log(u1))
    turn = (angle_bits >> 8).to(tl.int32)
    quarter = (turn + (1 << 21)) >> 22
    remainder = (turn - (quarter << 22)).to(tl.float32) * (2.0**-24)
    square = remainder * remainder
    sine = remainder * (((SIN_3 * square + SIN_2) * square + SIN_1) * square + SIN_0)
    cosine = (((COS_4 * square + COS_3) * square + COS_2) * square + COS_1) * square + 1.0
    odd = (quarter & 1) == 1
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    x = tl.where(((quarter + 1) & 2) == 2, -x, x)
    y = tl.where((quarter & 2) == 2, -y, y)
    return radius * x, radius * y


@triton.jit
def _four(seed, sample_id, draw, counter):
    """The four normals of each counter, in the order of elements."""
    w0, w1, w2, w3 = philox_words(seed, sample_id, draw, counter.to(tl.uint32))
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def normals(seed, sample_id, draw, block, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """Standard normals of the elements from block * BLOCK on of a sample, (BLOCK,) float32.

    Each counter gives four normals. A thread computes as many consecutive normals as it stores in
    one 16-byte access of `dtype`, so that no value moves between threads: those of one counter for
    float32, of two counters for narrower types. After each join the last axis varies fastest.
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
    """The given noise of a block, or the normals of its key, (BLOCK,) float32.

    dtype: of the tensor that the noise is for; see `normals`.
    """
    if given is not None:
        z = load(given, sample, block, N, BLOCK)
    else:
        if draws is not None:
            draw = tl.load(draws + sample)
        z = normals(seed, tl.load(sample_ids + sample), draw, block, BLOCK, dtype)
    return z


# Keyed draws: one number for each sample


@triton.jit
def draw_id(kind: tl.constexpr, grid_index):
    """rng.draw_id: the draw id of a purpose at a grid index, -1 for t = 0."""
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
    """Four Feistel rounds on a uint32 below 2^(2 HALF); turn: the epoch's share of the mixing."""
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
def prompt_index(sample_id, num_prompts, key, HALF: tl.constexpr):
    """Index of a sample's prompt (or latent), int64: rng.permute of the id's position in its epoch.

    The mixing is modulo 2^32. HALF is `half_bits(num_prompts)`. The quotient of a negative id is
    rounded down, as in Python.
    """
    epoch = sample_id // num_prompts
    position = sample_id - epoch * num_prompts
    if position < 0:
        position += num_prompts
        epoch -= 1
    turn = epoch.to(tl.uint32) * tl.full((), 0x27D4EB2F, tl.uint32)
    size = num_prompts.to(tl.uint32)
    value = _feistel(position.to(tl.uint32), key, turn, HALF)
    while value >= size:
        value = _feistel(value, key, turn, HALF)
    return value.to(tl.int64)


def half_bits(num_prompts: int) -> int:
    """Half the number of bits that the Feistel network of `prompt_index` permutes."""
    return max(1, (max(num_prompts - 1, 1).bit_length() + 1) // 2)
