"""The loss on the student's x0, its slope in the same pass, and the gradient made of that slope."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from selfnpo_kernels.triton.common import entry, launch, load, place, plan, store, table_row


@entry()
def x0_loss_kernel(
    partial, slope, pred, x_s, target, k, index, c,
    HUBER: tl.constexpr, PER_SAMPLE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of a sample: the sum of its losses, and the slope d(loss per element) / d(x0) where it is asked for."""
    sample, block = place(N, BLOCK, WIDE)
    output = load(pred, sample, block, N, BLOCK)
    state = load(x_s, sample, block, N, BLOCK)
    goal = load(target, sample, block, N, BLOCK)
    k += table_row(index, sample, PER_SAMPLE) * 2
    d = tl.load(k) * state + tl.load(k + 1) * output - goal  # zero beyond the row's end, like its loss
    if HUBER:
        root = tl.sqrt(d * d + c * c)
        # The square of d over the sum, not a difference: sqrt(d^2 + c^2) - c cancels where |d| is far below c.
        loss = d * d / (root + c)
        rise = d / root
    else:
        loss = d * d
        rise = 2 * d
    if slope is not None:
        store(slope, sample, block, rise, N, BLOCK)
    tl.store(partial + tl.program_id(0), tl.sum(loss, 0))


@entry(do_not_specialize=["samples", "blocks"])
def x0_loss_sum_kernel(
    loss, per_sample, partial, weight, samples, blocks, count, TILE: tl.constexpr, WIDTH: tl.constexpr
):
    """Sum the partial losses in a fixed order: one program, TILE samples and WIDTH blocks at a time."""
    total = tl.zeros((TILE,), tl.float32)
    for first in range(0, samples, TILE):
        row = first + tl.arange(0, TILE)
        sums = tl.zeros((TILE,), tl.float32)
        for start in range(0, blocks, WIDTH):
            column = start + tl.arange(0, WIDTH)
            mask = (row < samples)[:, None] & (column < blocks)[None, :]
            sums += tl.sum(tl.load(partial + row[:, None] * blocks + column[None, :], mask=mask, other=0), 1)
        mean = sums / count
        tl.store(per_sample + row, mean, mask=row < samples)
        total += mean * tl.load(weight + row, mask=row < samples, other=0)
    tl.store(loss, tl.sum(total, 0) / samples)


def x0_loss(pred, x_s, target, k, index, weight, kind, c, slope):
    """d = k0 x_s + k1 pred - target, and the mean of d^2 (Eq. 17) or of sqrt(d^2 + c^2) - c (the authors' code).

    Returns (the weighted mean over the batch (), the loss per sample (B,), d(loss per element) / d(x0) (B, ...) in
    pred's dtype, or empty unless `slope`); the losses float32, summed in an order that depends on the shape alone.
    """
    p = plan(pred.shape)
    partial = pred.new_empty(p.programs, dtype=torch.float32)
    rise = torch.empty_like(pred) if slope else pred.new_empty(0)
    launch(
        x0_loss_kernel, p.programs, pred, partial, rise if slope else None, pred, x_s, target, k, index, c,
        HUBER=kind == "huber", PER_SAMPLE=index is None and k.shape[0] > 1, **p.options,
    )  # fmt: skip
    loss, per_sample = partial.new_empty(()), partial.new_empty(p.samples)
    # 4096 partial losses a turn, so that one program does not wait for memory more often than it has to.
    width = min(triton.next_power_of_2(p.blocks), 256)
    launch(
        x0_loss_sum_kernel, 1, pred, loss, per_sample, partial, weight, p.samples, p.blocks, float(p.N),
        TILE=4096 // width, WIDTH=width, num_warps=8,
    )  # fmt: skip
    return loss, per_sample, rise


@entry()
def x0_loss_backward_kernel(
    out, slope, k, index, weight, grad, size,
    PER_SAMPLE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of a sample: out = slope k1 weight grad / size."""
    sample, block = place(N, BLOCK, WIDE)
    rise = load(slope, sample, block, N, BLOCK)
    k += table_row(index, sample, PER_SAMPLE) * 2
    factor = tl.load(k + 1) * tl.load(weight + sample) * tl.load(grad) / size
    store(out, sample, block, factor * rise, N, BLOCK)


def x0_loss_backward(slope, k, index, weight, grad):
    """d(loss) / d(pred) = slope k1 weight grad / (B n), (B, ...) in slope's dtype."""
    out = torch.empty_like(slope)
    p = plan(slope.shape)
    launch(
        x0_loss_backward_kernel, p.programs, slope, out, slope, k, index, weight, grad, float(slope.numel()),
        PER_SAMPLE=index is None and k.shape[0] > 1, **p.options,
    )  # fmt: skip
    return out
