"""Training pairs from states that somebody else's rollout has left."""

from __future__ import annotations

import torch

from selfnpo_fast.rollout import PairMaker, Pairs
from selfnpo_kernels import Draw


def finished_pairs(
    maker: PairMaker, x_t: torch.Tensor, index: torch.Tensor, target: torch.Tensor, sample_ids: torch.Tensor
) -> Pairs:
    """The pairs of states x_t (B, ...) at grid indices (B,), re-noised with the maker's own
    draws."""
    s = maker.draw_s(sample_ids, index)
    return Pairs(
        x_s=maker.grid.noised(x_t, target, index, s, maker.key(Draw.RENOISE, sample_ids, index)),
        s=s,
        target=target,
        t=maker.grid.timestep(index),
        rows=maker.student_rows(sample_ids, index),
        weight=torch.ones(len(s), device=x_t.device),
        sample_ids=sample_ids,
    )
