"""`x0_loss` and `x0_loss_backward`: the loss on the student's x0, its slope, and the gradient.

The loss and its slope are computed in one pass; the gradient is computed from the slope.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from selfnpo_kernels.triton.common import entry, launch, load, plan, sample_and_block, store, table_row


@entry()
def x0_loss_kernel(
    partial, slope, pred, x_s, target, k, index, c,
    HUBER: tl.constexpr, PER_SAMPLE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of a sample: the sum of its losses, and the slope unless its pointer is None."""
    sample, block = sample_and_block(N, BLOCK, WIDE)
    output = load(pred, sample, block, N, BLOCK)
    state = load(x_s, sample, block, N, BLOCK)
    target_values = load(target, sample, block, N, BLOCK)
    k += table_row(index, sample, PER_SAMPLE) * 2
    # Beyond the row's end d is 0, and so is its loss.
    d = tl.load(k) * state + tl.load(k + 1) * output - target_values
    if HUBER:
        root = tl.sqrt(d * d + c * c)
        # d^2 / (root + c) equals root - c, whose subtraction would cancel where |d| is far below c.
        loss = d * d / (root + c)
        slope_values = d / root
    else:
        loss = d * d
        slope_values = 2 * d
    if slope is not None:
        store(slope, sample, block, slope_values, N, BLOCK)
    tl.store(partial + tl.program_id(0), tl.sum(loss, 0))


@entry(do_not_specialize=["samples", "blocks"])
def x0_loss_sum_kernel(
    loss, per_sample, partial, weight, samples, blocks, count, TILE: tl.constexpr, WIDTH: tl.constexpr
):
    """Sums the partial losses in a fixed order, in one program: TILE by WIDTH losses at a time.

    partial: (samples, blocks) float32, the sum of each block.
    Writes loss () and per_sample (samples,).
    """
    total = tl.zeros((TILE,), tl.float32)
    for first in range(0, samples, TILE):
        row = first + tl.arange(0, TILE)
        sums = tl.zeros((TILE,), tl.float32)
        for start in range(0, blocks, WIDTH):
            column = start + tl.arange(0, WIDTH)
            mask = (row < samples)[:, None] & (column < blocks)[None, :]
            sums += tl.sum(tl.load(partial + row[:, None] * blocks + column[None, :], mask=mask, other=0), 1)
        mean = tl.div_rn(sums, count)
        tl.store(per_sample + row, mean, mask=row < samples)
        total += mean * tl.load(weight + row, mask=row < samples, other=0)
    tl.store(loss, tl.div_rn(tl.sum(total, 0), samples.to(tl.float32)))


def x0_loss(pred, x_s, target, k, index, weight, kind, c, want_slope):
    """(weighted mean of the loss (), loss per sample (B,), slope); see `ops.x0_loss`.

    The losses are float32, and the order of their sums depends only on the shape. The slope
    d(loss per element) / d(x0) is (B, ...) in pred's dtype, or (0,) unless `want_slope`.
    """
    p = plan(pred.shape)
    partial = pred.new_empty(p.programs, dtype=torch.float32)
    slope = torch.empty_like(pred) if want_slope else pred.new_empty(0)
    launch(
        x0_loss_kernel, p.programs, pred, partial, slope if want_slope else None, pred, x_s, target, k, index, c,
        HUBER=kind == "huber", PER_SAMPLE=index is None and k.shape[0] > 1, **p.options,
    )  # fmt: skip
    loss, per_sample = partial.new_empty(()), partial.new_empty(p.samples)
    # 4096 partial losses at a time, so that the one program seldom waits for memory.
    width = min(triton.next_power_of_2(p.blocks), 256)
    launch(
        x0_loss_sum_kernel, 1, pred, loss, per_sample, partial, weight, p.samples, p.blocks, float(p.N),
        TILE=4096 // width, WIDTH=width, num_warps=8,
    )  # fmt: skip
    return loss, per_sample, slope


@entry()
def x0_loss_backward_kernel(
    out, slope, k, index, weight, grad, size,
    PER_SAMPLE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of a sample: out = slope k1 weight grad / size."""
    sample, block = sample_and_block(N, BLOCK, WIDE)
    slope_values = load(slope, sample, block, N, BLOCK)
    k += table_row(index, sample, PER_SAMPLE) * 2
    factor = tl.div_rn(tl.load(k + 1) * tl.load(weight + sample) * tl.load(grad), size)
    store(out, sample, block, factor * slope_values, N, BLOCK)


def x0_loss_backward(slope, k, index, weight, grad):
    """d(loss) / d(pred) = slope k1 weight grad / (B n), (B, ...) in slope's dtype.

    n is the number of elements of a sample.
    """
    out = torch.empty_like(slope)
    p = plan(slope.shape)
    launch(
        x0_loss_backward_kernel, p.programs, slope, out, slope, k, index, weight, grad, float(slope.numel()),
        PER_SAMPLE=index is None and k.shape[0] > 1, **p.options,
    )  # fmt: skip
    return out
