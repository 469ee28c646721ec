"""The factor that gives a guided prediction the standard deviation of the conditional one."""

from __future__ import annotations

import triton
import triton.language as tl

from selfnpo_kernels.triton.common import entry, guided, launch, load, place, plan, table_row


@triton.jit
def _moments(values, inside, count):
    """(mean, sum of squared deviations) of a block, in two passes over its registers."""
    mean = tl.sum(values, 0) / count
    deviation = tl.where(inside, values - mean, 0.0)
    return mean, tl.sum(deviation * deviation, 0)


@entry()
def guidance_moments_kernel(
    partial, pos, neg, k, index,
    PER_SAMPLE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block: mean and squared deviations of pos and of p, four floats of `partial` a program."""
    sample, block = place(N, BLOCK, WIDE)
    conditional = load(pos, sample, block, N, BLOCK)
    negative = load(neg, sample, block, N, BLOCK)
    p = guided(conditional, negative, k + table_row(index, sample, PER_SAMPLE) * 7 + 6)
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
    """Sum of squared deviations of a row from its blocks' moments.

    Chan, Golub and LeVeque, for any number of parts: sum of M2_b + n_b (mean_b - mean)^2.
    """
    weighted = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, blocks, WIDTH):
        b = start + tl.arange(0, WIDTH)
        count = tl.minimum(N - b * BLOCK, BLOCK).to(tl.float32)
        weighted += tl.where(b < blocks, count * tl.load(partial + 4 * b, mask=b < blocks, other=0), 0.0)
    mean = tl.sum(weighted, 0) / N
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
    scale, partial, blocks, phi, rest, N: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    """One sample: its blocks' moments combined into phi std(pos) / std(p) + rest."""
    sample = tl.program_id(0)
    partial += sample.to(tl.int64) * blocks * 4
    conditional = _combined(partial, blocks, N, BLOCK, WIDTH)
    combined = _combined(partial + 2, blocks, N, BLOCK, WIDTH)
    # The 1 / (N - 1) of both variances cancels.
    tl.store(scale + sample, phi * tl.sqrt(conditional / combined) + rest)


def guidance_rescale(pos, neg, k, index, phi):
    """phi std(pos) / std(p) + 1 - phi per sample, p = pos + w (pos - neg) (Lin et al., section 3.4); (B,) float32.

    One pass over pos and neg leaves each block's mean and squared deviations (its size is known); a second kernel
    combines them. No atomics: the order of every sum depends on the shape alone.
    """
    # Twice the usual block, since every block costs four reductions over the program's warps.
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
