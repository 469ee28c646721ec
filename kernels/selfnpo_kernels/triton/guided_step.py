"""One solver step under classifier-free guidance, in one pass."""

from __future__ import annotations

import torch
import triton.language as tl

from selfnpo_kernels.triton import common
from selfnpo_kernels.triton.common import entry, guided, launch, load, load_or_none, place, plan, store, table_row


@entry(do_not_specialize=["seed", "draw"])
def guided_step_kernel(
    x_next, x0, pos, neg, x, k, index, scale, x0_prev, noise, sample_ids, draws, seed: tl.int64, draw: tl.int64,
    PER_SAMPLE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of a sample: x_next and x0 from pos, neg, x, and from x0_prev and noise where they are given."""
    sample, block = place(N, BLOCK, WIDE)
    # The long loads first: nothing that follows from the index has to arrive before they are under way.
    state = load(x, sample, block, N, BLOCK)
    positive = load_or_none(pos, sample, block, N, BLOCK)
    negative = load_or_none(neg, sample, block, N, BLOCK)
    before = load_or_none(x0_prev, sample, block, N, BLOCK)
    k += table_row(index, sample, PER_SAMPLE) * 7
    p = guided(positive, negative, k + 6)
    if scale is not None:
        p *= tl.load(scale + sample)
    step = tl.load(k + 2) * state + tl.load(k + 3) * p
    if before is not None:
        step += tl.load(k + 4) * before
    if noise is not None or sample_ids is not None:
        z = common.noise(noise, seed, sample_ids, draw, draws, sample, block, N, BLOCK, x.dtype.element_ty)
        step += tl.load(k + 5) * z
    store(x_next, sample, block, step, N, BLOCK)
    store(x0, sample, block, tl.load(k) * state + tl.load(k + 1) * p, N, BLOCK)


def guided_step(pos, neg, x, k, index, scale, x0_prev, noise, seed, sample_ids, draw, draws):
    """p = scale (pos + w (pos - neg)); x0 = k0 x + k1 p; x_next = k2 x + k3 p + k4 x0_prev + k5 noise.

    Returns (x_next, x0), each (B, ...) in x's dtype.
    """
    x_next, x0 = torch.empty_like(x), torch.empty_like(x)
    p = plan(x.shape)
    launch(
        guided_step_kernel, p.programs, x,
        x_next, x0, pos, neg, x, k, index, scale, x0_prev, noise, sample_ids, draws, seed, draw,
        PER_SAMPLE=index is None and k.shape[0] > 1, **p.options,
    )  # fmt: skip
    return x_next, x0
