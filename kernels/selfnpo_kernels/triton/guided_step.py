"""`guided_step`: a solver step under classifier-free guidance, in one pass."""

from __future__ import annotations

import torch
import triton.language as tl

from selfnpo_kernels.triton import common
from selfnpo_kernels.triton.common import (
    STEP_COLUMNS,
    entry,
    guided,
    launch,
    load,
    load_or_none,
    plan,
    sample_and_block,
    store,
    table_row,
)


@entry(do_not_specialize=["seed", "draw"])
def guided_step_kernel(
    x_next, x0, pos, neg, x, k, index, scale, x0_prev, x0_prev2, noise, sample_ids, draws, seed: tl.int64,
    draw: tl.int64, PER_SAMPLE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of a sample: x_next and x0 from pos, neg, x, and from what else is given."""
    sample, block = sample_and_block(N, BLOCK, WIDE)
    # The long loads come first, so that they do not wait for values that depend on the index.
    state = load(x, sample, block, N, BLOCK)
    positive = load_or_none(pos, sample, block, N, BLOCK)
    negative = load_or_none(neg, sample, block, N, BLOCK)
    previous = load_or_none(x0_prev, sample, block, N, BLOCK)
    before_previous = load_or_none(x0_prev2, sample, block, N, BLOCK)
    k += table_row(index, sample, PER_SAMPLE) * STEP_COLUMNS
    p = guided(positive, negative, k + 6)
    if scale is not None:
        p *= tl.load(scale + sample)
    x_next_values = tl.load(k + 2) * state + tl.load(k + 3) * p
    if previous is not None:
        x_next_values += tl.load(k + 4) * previous
    if before_previous is not None:
        x_next_values += tl.load(k + 7) * before_previous
    if noise is not None or sample_ids is not None:
        z = common.noise(noise, seed, sample_ids, draw, draws, sample, block, N, BLOCK, x.dtype.element_ty)
        x_next_values += tl.load(k + 5) * z
    store(x_next, sample, block, x_next_values, N, BLOCK)
    store(x0, sample, block, tl.load(k) * state + tl.load(k + 1) * p, N, BLOCK)


def guided_step(pos, neg, x, k, index, scale, x0_prev, x0_prev2, noise, seed, sample_ids, draw, draws):
    """(x_next, x0), each (B, ...) in x's dtype; see `ops.guided_step`."""
    x_next, x0 = torch.empty_like(x), torch.empty_like(x)
    p = plan(x.shape)
    launch(
        guided_step_kernel, p.programs, x,
        x_next, x0, pos, neg, x, k, index, scale, x0_prev, x0_prev2, noise, sample_ids, draws, seed, draw,
        PER_SAMPLE=index is None and k.shape[0] > 1, **p.options,
    )  # fmt: skip
    return x_next, x0
