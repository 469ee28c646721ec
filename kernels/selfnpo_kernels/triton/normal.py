"""`normal`: standard normals of a key."""

from __future__ import annotations

import torch
import triton.language as tl

from selfnpo_kernels.triton.common import entry, launch, noise, plan, sample_and_block, store


@entry(do_not_specialize=["seed", "draw"])
def normal_kernel(
    out, sample_ids, draws, seed: tl.int64, draw: tl.int64, N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """One block of a sample: standard normals of the sample's key."""
    sample, block = sample_and_block(N, BLOCK, WIDE)
    z = noise(None, seed, sample_ids, draw, draws, sample, block, N, BLOCK, out.dtype.element_ty)
    store(out, sample, block, z, N, BLOCK)


def normal(sample_ids, shape, seed, draw, draws, dtype):
    """Standard normals (B, *shape) in `dtype`; see `ops.normal`."""
    out = torch.empty((sample_ids.shape[0], *shape), dtype=dtype, device=sample_ids.device)
    p = plan(out.shape)
    launch(normal_kernel, p.programs, out, out, sample_ids, draws, seed, draw, **p.options)
    return out
