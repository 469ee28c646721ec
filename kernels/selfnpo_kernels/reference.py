"""The operations in plain PyTorch: the oracle that every kernel is held against.

Each function has the signature of its schema in `ops.py`, where its contract is written. Arithmetic is float32, or
float64 where an input is float64; results come in the dtype of the state they continue. Shape letters: B samples; `...`
the latent axes, any rank.
"""

from __future__ import annotations

import torch

from selfnpo_kernels.rng import Draw, NoiseKey, draw_id, permute, randint, uniform
from selfnpo_kernels.rng import normal as draw_normals


def _wide(*tensors: torch.Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _rows(k: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """The samples' rows of a coefficient table. ValueError for rows that are not there, which only CPUs can tell."""
    if index is None:
        return k
    if index.device.type == "cpu" and ((index < 0) | (index >= len(k))).any():
        raise ValueError(f"index holds {index.tolist()[:8]}; expected 0 to {len(k) - 1}")
    return k[index]


def _column(k: torch.Tensor, j: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Column j of (B, n) shaped to broadcast over (B, ...)."""
    return k[:, j].to(dtype).view(-1, *[1] * (like.ndim - 1))


def _noise(like, noise, seed, sample_ids, draw, draws, dtype: torch.dtype) -> torch.Tensor:
    if noise is not None:
        return noise.to(dtype)
    return draw_normals(NoiseKey(seed, sample_ids, draw if draws is None else draws), tuple(like.shape[1:]), dtype)


def _guided(pos, neg, x, k, scale, dtype: torch.dtype) -> torch.Tensor:
    """p = pos + w (pos - neg), times each sample's rescale factor; the one that is given, where only one is."""
    if pos is None or neg is None:
        p = (neg if pos is None else pos).to(dtype)
    else:
        p = pos.to(dtype) + _column(k, 6, x, dtype) * (pos.to(dtype) - neg.to(dtype))
    return p if scale is None else p * scale.to(dtype).view(-1, *[1] * (x.ndim - 1))


def normal(sample_ids, shape, seed, draw, draws, dtype):
    """Standard normals (B, *shape)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return draw_normals(NoiseKey(seed, sample_ids, draw if draws is None else draws), tuple(shape), wide).to(dtype)


def affine_noise(x, k, index, noise, seed, sample_ids, draw, draws):
    """k0 x + k1 noise."""
    dtype = _wide(x, noise)
    k = _rows(k, index)
    z = _noise(x, noise, seed, sample_ids, draw, draws, dtype)
    return (_column(k, 0, x, dtype) * x.to(dtype) + _column(k, 1, x, dtype) * z).to(x.dtype)


def guidance_rescale(pos, neg, k, index, phi):
    """phi std(pos) / std(p) + 1 - phi per sample."""
    dtype = _wide(pos, neg)
    p = _guided(pos, neg, pos, _rows(k, index), None, dtype)
    ratio = pos.to(dtype).flatten(1).std(1) / p.flatten(1).std(1)
    return phi * ratio + (1 - phi)


def guided_step(pos, neg, x, k, index, scale, x0_prev, noise, seed, sample_ids, draw, draws):
    """x0 = k0 x + k1 p and x_next = k2 x + k3 p + k4 x0_prev + k5 noise."""
    dtype = _wide(pos, neg, x)
    k = _rows(k, index)
    p, wide_x = _guided(pos, neg, x, k, scale, dtype), x.to(dtype)
    x0 = _column(k, 0, x, dtype) * wide_x + _column(k, 1, x, dtype) * p
    x_next = _column(k, 2, x, dtype) * wide_x + _column(k, 3, x, dtype) * p
    if x0_prev is not None:
        x_next = x_next + _column(k, 4, x, dtype) * x0_prev.to(dtype)
    if noise is not None or sample_ids is not None:
        x_next = x_next + _column(k, 5, x, dtype) * _noise(x, noise, seed, sample_ids, draw, draws, dtype)
    return x_next.to(x.dtype), x0.to(x.dtype)


def tdft_step(
    pos, neg, x, final, slots, next_slots, step, start, renoise, timesteps, weight, latents,
    items, stride, max_steps, seed, dropout, shuffled, naive,
):  # fmt: skip
    """One grid step of every slot, the pair of the state it was in, and the next sample where this one ended."""
    index, ids, left, _ = slots
    top = len(timesteps) - 2  # the last grid index
    now = x.to(_wide(pos, neg, x, latents))  # results are rounded once, at the very end
    moved, x0 = guided_step(pos, neg, now, step, index + 1, None, None, None, 0, None, 0, None)

    def key(kind: Draw, sample_ids: torch.Tensor, at: torch.Tensor | int = -1) -> NoiseKey:
        return NoiseKey(seed, sample_ids, draw_id(kind, at))

    def item(sample_ids: torch.Tensor, order: int = 0) -> torch.Tensor:
        return permute(sample_ids % items, items, seed + order, sample_ids // items)

    def here(mask: torch.Tensor) -> torch.Tensor:
        return mask.view(-1, *[1] * (x.ndim - 1))

    # A state at the last timestep has no s above it: the sample that has just ended in that slot gives its end instead.
    no_room = torch.zeros_like(index, dtype=torch.bool) if final is None else index == top
    pair_index, pair_ids = torch.where(no_room, -1, index), torch.where(no_room, ids - stride, ids)
    state = now if final is None else torch.where(here(no_room), final.to(now.dtype), now)
    target = x0 if final is None else torch.where(here(no_room), final.to(now.dtype), x0)
    t = timesteps[pair_index + 1]
    s = t + 1 + randint(key(Draw.RENOISE_TIME, pair_ids, pair_index), renoise.shape[1] - 1 - t)
    noise_key = key(Draw.RENOISE, pair_ids, pair_index)
    z = draw_normals(noise_key, tuple(x.shape[1:]), _wide(x))  # as `normal` gives them to lockstep rollouts
    x_s = affine_noise(target if naive else state, renoise[pair_index + 1, s], None, z, 0, None, 0, None)
    dropped = uniform(key(Draw.PROMPT_DROPOUT, pair_ids, pair_index)) < dropout
    row = torch.where(dropped, 0, item(pair_ids, order=int(shuffled)) + 1)

    ended = left == 0
    new_ids = torch.where(ended, ids + stride, ids)
    first = draw_normals(key(Draw.START_NOISE, new_ids), tuple(x.shape[1:]), _wide(x))
    if latents is None:
        first_index = torch.full_like(index, top)
        first_left = first_index
    else:
        first_index = randint(key(Draw.START_INDEX, new_ids), top)
        first_left = (first_index + 1).clamp(max=max_steps)
        clean = latents[item(new_ids)].to(now.dtype)
        first = affine_noise(clean, start, first_index + 1, first, 0, None, 0, None)
    if final is not None:
        final.copy_(torch.where(here(ended), moved, final.to(now.dtype)))
    x.copy_(torch.where(here(ended), first, moved))
    next_slots[0] = torch.where(ended, first_index, index - 1)
    next_slots[1] = new_ids
    next_slots[2] = torch.where(ended, first_left, left - 1)
    next_slots[3] = item(new_ids) + 1
    pairs = torch.stack([t, s, pair_ids, row])
    return target.to(x.dtype), x_s.to(x.dtype), pairs, weight[pair_index + 1]


def x0_loss(pred, x_s, target, k, index, weight, kind, c, slope):
    """(weighted mean, per sample, d(per-element loss) / d(x0))."""
    dtype = _wide(pred, x_s, target)
    k = _rows(k, index)
    x0 = _column(k, 0, x_s, dtype) * x_s.to(dtype) + _column(k, 1, x_s, dtype) * pred.to(dtype)
    d = x0 - target.to(dtype)
    if kind == "l2":
        loss, rise = d.square(), 2 * d
    else:
        root = (d.square() + c * c).sqrt()
        # The square of d over the sum, not a difference: sqrt(d^2 + c^2) - c cancels where |d| is far below c.
        loss, rise = d.square() / (root + c), d / root
    per_sample = loss.flatten(1).mean(1)
    out = rise.to(pred.dtype) if slope else pred.new_empty(0)
    return (per_sample * weight.to(dtype)).mean(), per_sample, out


def x0_loss_backward(slope, k, index, weight, grad):
    """slope times k1 weight grad / (B n)."""
    dtype = _wide(slope)
    k = _rows(k, index)
    factor = k[:, 1].to(dtype) * weight.to(dtype) * grad.to(dtype) / slope.numel()
    return (slope.to(dtype) * factor.view(-1, *[1] * (slope.ndim - 1))).to(slope.dtype)


def ema_update(masters, live, shadows, decay):
    """master <- decay master + (1 - decay) live, in place; the shadow gets a copy."""
    for i, (master, new) in enumerate(zip(masters, live, strict=True)):
        master.lerp_(new.to(master.dtype), 1 - decay)
        if shadows:
            shadows[i].copy_(master)
