"""`affine_noise`: k0 x + k1 noise."""

from __future__ import annotations

import torch
import triton.language as tl

from selfnpo_kernels.triton import common
from selfnpo_kernels.triton.common import entry, launch, load, plan, sample_and_block, store, table_row


@entry(do_not_specialize=["seed", "draw"])
def affine_noise_kernel(
    out, x, k, index, noise, sample_ids, draws, seed: tl.int64, draw: tl.int64,
    PER_SAMPLE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of a sample: out = k0 x + k1 noise."""
    sample, block = sample_and_block(N, BLOCK, WIDE)
    values = load(x, sample, block, N, BLOCK)
    z = common.noise(noise, seed, sample_ids, draw, draws, sample, block, N, BLOCK, x.dtype.element_ty)
    k += table_row(index, sample, PER_SAMPLE) * 2
    store(out, sample, block, tl.load(k) * values + tl.load(k + 1) * z, N, BLOCK)


def affine_noise(x, k, index, noise, seed, sample_ids, draw, draws):
    """k0 x + k1 noise, (B, ...) in x's dtype; see `ops.affine_noise`."""
    out = torch.empty_like(x)
    p = plan(x.shape)
    launch(
        affine_noise_kernel, p.programs, x, out, x, k, index, noise, sample_ids, draws, seed, draw,
        PER_SAMPLE=index is None and k.shape[0] > 1, **p.options,
    )  # fmt: skip
    return out
