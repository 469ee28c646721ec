"""`guidance_rescale`: the factor that gives the guided prediction the standard deviation of pos."""

from __future__ import annotations

import triton
import triton.language as tl

from selfnpo_kernels.triton.common import (
    STEP_COLUMNS,
    entry,
    guided,
    launch,
    load,
    plan,
    sample_and_block,
    table_row,
)


@triton.jit
def _moments(values, inside, count):
    """(mean, sum of squared deviations) of a block's values, in two passes over registers.

    inside: mask of the elements within the row.
    count: how many they are.
    """
    mean = tl.div_rn(tl.sum(values, 0), count)
    deviation = tl.where(inside, values - mean, 0.0)
    return mean, tl.sum(deviation * deviation, 0)


@entry()
def guidance_moments_kernel(
    partial, pos, neg, k, index,
    PER_SAMPLE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of a sample: the moments of pos and of p.

    partial: (programs, 4) float32; a program writes the mean and the sum of squared deviations of
        its block of pos, then those of p.
    """
    sample, block = sample_and_block(N, BLOCK, WIDE)
    conditional = load(pos, sample, block, N, BLOCK)
    negative = load(neg, sample, block, N, BLOCK)
    p = guided(conditional, negative, k + table_row(index, sample, PER_SAMPLE) * STEP_COLUMNS + 6)
    lane = block * BLOCK + tl.arange(0, BLOCK)
    count = tl.minimum(N - block * BLOCK, BLOCK).to(tl.float32)
    mean, squares = _moments(conditional, lane < N, count)
    guided_mean, guided_squares = _moments(p, lane < N, count)
    partial += tl.program_id(0) * 4
    tl.store(partial, mean)
    tl.store(partial + 1, squares)
    tl.store(partial + 2, guided_mean)
    tl.store(partial + 3, guided_squares)


@triton.jit
def _combined(partial, blocks, N: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The sum of squared deviations of a row, from the moments of its blocks.

    The formula of Chan, Golub and LeVeque for any number of parts: the sum over the blocks b of
    M2_b + n_b (mean_b - mean)^2. `partial` points at the first block's mean.
    """
    # The mean of the row.
    weighted = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, blocks, WIDTH):
        b = start + tl.arange(0, WIDTH)
        count = tl.minimum(N - b * BLOCK, BLOCK).to(tl.float32)
        weighted += tl.where(b < blocks, count * tl.load(partial + 4 * b, mask=b < blocks, other=0), 0.0)
    mean = tl.div_rn(tl.sum(weighted, 0), N * 1.0)
    # The squared deviations from it.
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, blocks, WIDTH):
        b = start + tl.arange(0, WIDTH)
        count = tl.minimum(N - b * BLOCK, BLOCK).to(tl.float32)
        deviation = tl.load(partial + 4 * b, mask=b < blocks, other=0) - mean
        squares = tl.load(partial + 4 * b + 1, mask=b < blocks, other=0)
        total += tl.where(b < blocks, squares + count * deviation * deviation, 0.0)
    return tl.sum(total, 0)


@entry(do_not_specialize=["blocks"])
def guidance_rescale_kernel(
    scale, partial, blocks, phi, one_minus_phi, N: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    """One sample: phi std(pos) / std(p) + 1 - phi from the moments of its blocks."""
    sample = tl.program_id(0)
    partial += sample.to(tl.int64) * blocks * 4
    squares = _combined(partial, blocks, N, BLOCK, WIDTH)
    guided_squares = _combined(partial + 2, blocks, N, BLOCK, WIDTH)
    # The 1 / (N - 1) of both variances cancels.
    tl.store(scale + sample, phi * tl.sqrt_rn(tl.div_rn(squares, guided_squares)) + one_minus_phi)


def guidance_rescale(pos, neg, k, index, phi):
    """phi std(pos) / std(p) + 1 - phi per sample, (B,) float32; see `ops.guidance_rescale`.

    One pass over pos and neg writes the mean and the squared deviations of each block. A second
    kernel combines them. There are no atomics: the order of every sum depends only on the shape.
    """
    # Blocks of twice the usual size, since each block takes four reductions over the program's
    # warps.
    p = plan(pos.shape, block=2048)
    partial = k.new_empty(4 * p.programs)
    launch(
        guidance_moments_kernel, p.programs, pos, partial, pos, neg, k, index,
        PER_SAMPLE=index is None and k.shape[0] > 1, **p.options,
    )  # fmt: skip
    scale = k.new_empty(p.samples)
    launch(
        guidance_rescale_kernel, p.samples, pos, scale, partial, p.blocks, phi, 1 - phi,
        N=p.N, BLOCK=p.BLOCK, WIDTH=min(triton.next_power_of_2(p.blocks), 128), num_warps=1,
    )  # fmt: skip
    return scale
