"""The operations in plain PyTorch: the reference that the tests compare every kernel with.

The function of an op takes the arguments of its schema (`schemas.py`); `ops.py` holds the contract.
The arithmetic is float32, or float64 where an input is float64. A result is rounded to the dtype of
the state that it continues.

Letters for shapes: B samples; `...` the latent axes, any number of them.
"""

from __future__ import annotations

import torch

from selfnpo_kernels.checks import arithmetic
from selfnpo_kernels.rng import Draw, NoiseKey, draw_id, permute, randint, uniform
from selfnpo_kernels.rng import normal as draw_normals


def _rows(k: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """The samples' rows of a coefficient table.

    Raises ValueError for an index outside the table, on CPUs only: the host would have to wait for
    the values on a GPU.
    """
    if index is None:
        return k
    if index.device.type == "cpu" and ((index < 0) | (index >= len(k))).any():
        raise ValueError(f"index holds {index.tolist()[:8]}; expected 0 to {len(k) - 1}")
    return k[index]


def _column(k: torch.Tensor, j: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Column j of a (B, n) table in a shape that broadcasts over (B, ...)."""
    return k[:, j].to(dtype).view(-1, *[1] * (like.ndim - 1))


def _noise(like, noise, seed, sample_ids, draw, draws, dtype: torch.dtype) -> torch.Tensor:
    """The given noise, or the normals of the key, in the shape of `like`."""
    if noise is not None:
        return noise.to(dtype)
    return draw_normals(NoiseKey(seed, sample_ids, draw if draws is None else draws), tuple(like.shape[1:]), dtype)


def _guided(pos, neg, x, k, scale, dtype: torch.dtype) -> torch.Tensor:
    """p = scale (pos + w (pos - neg)); with one branch missing, scale times the other branch."""
    if pos is None or neg is None:
        p = (neg if pos is None else pos).to(dtype)
    else:
        p = pos.to(dtype) + _column(k, 6, x, dtype) * (pos.to(dtype) - neg.to(dtype))
    return p if scale is None else p * scale.to(dtype).view(-1, *[1] * (x.ndim - 1))


def normal(sample_ids, shape, seed, draw, draws, dtype):
    """Standard normals (B, *shape) in `dtype`."""
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    key = NoiseKey(seed, sample_ids, draw if draws is None else draws)
    return draw_normals(key, tuple(shape), computed_in).to(dtype)


def affine_noise(x, k, index, noise, seed, sample_ids, draw, draws):
    """k0 x + k1 noise, (B, ...) in x's dtype."""
    dtype = arithmetic(x, noise)
    k = _rows(k, index)
    z = _noise(x, noise, seed, sample_ids, draw, draws, dtype)
    return (_column(k, 0, x, dtype) * x.to(dtype) + _column(k, 1, x, dtype) * z).to(x.dtype)


def guidance_rescale(pos, neg, k, index, phi):
    """phi std(pos) / std(p) + 1 - phi per sample, (B,)."""
    dtype = arithmetic(pos, neg)
    p = _guided(pos, neg, pos, _rows(k, index), None, dtype)
    ratio = pos.to(dtype).flatten(1).std(1) / p.flatten(1).std(1)
    return phi * ratio + (1 - phi)


def guided_step(pos, neg, x, k, index, scale, x0_prev, x0_prev2, noise, seed, sample_ids, draw, draws):
    """(x_next, x0), the latter k0 x + k1 p, the former the sum of all other terms of a row."""
    dtype = arithmetic(pos, neg, x)
    k = _rows(k, index)
    p, wide_x = _guided(pos, neg, x, k, scale, dtype), x.to(dtype)
    x0 = _column(k, 0, x, dtype) * wide_x + _column(k, 1, x, dtype) * p
    x_next = _column(k, 2, x, dtype) * wide_x + _column(k, 3, x, dtype) * p
    for column, previous in ((4, x0_prev), (7, x0_prev2)):
        if previous is not None:
            x_next = x_next + _column(k, column, x, dtype) * previous.to(dtype)
    if noise is not None or sample_ids is not None:
        x_next = x_next + _column(k, 5, x, dtype) * _noise(x, noise, seed, sample_ids, draw, draws, dtype)
    return x_next.to(x.dtype), x0.to(x.dtype)


def tdft_step(
    pos, neg, x, final, slots, next_slots, step, start, renoise, timesteps, weight, latents,
    num_prompts, stride, max_steps, seed, dropout, shuffled, naive,
):  # fmt: skip
    """One grid step of every slot, the training pair of its state, and restarts where samples end.

    Returns (target, x_s, pairs, weight) and overwrites x, final and next_slots; see
    `ops.tdft_step`.
    """
    index, sample_ids, states_left, _ = slots
    last_index = len(timesteps) - 2

    def key(kind: Draw, ids: torch.Tensor, grid_index: torch.Tensor | int = -1) -> NoiseKey:
        return NoiseKey(seed, ids, draw_id(kind, grid_index))

    def prompt_index(ids: torch.Tensor, order: int = 0) -> torch.Tensor:
        return permute(ids % num_prompts, num_prompts, seed + order, ids // num_prompts)

    def per_element(mask: torch.Tensor) -> torch.Tensor:
        return mask.view(-1, *[1] * (x.ndim - 1))

    # The guided solver step of every slot. Results are rounded once, at the end of this function.
    state = x.to(arithmetic(pos, neg, x, latents))
    x_next, x0 = guided_step(pos, neg, state, step, index + 1, None, None, None, None, 0, None, 0, None)

    # Which state gives the pair. No timestep s lies above the last grid index: there the pair is
    # that of the final state of the slot's previous sample, at t = 0.
    use_final = torch.zeros_like(index, dtype=torch.bool) if final is None else index == last_index
    pair_index = torch.where(use_final, -1, index)
    pair_ids = torch.where(use_final, sample_ids - stride, sample_ids)
    pair_state = state if final is None else torch.where(per_element(use_final), final.to(state.dtype), state)
    target = x0 if final is None else torch.where(per_element(use_final), final.to(state.dtype), x0)

    # The pair's timesteps, its noised state (Eq. 16; Eq. 15 if naive) and its conditioning row.
    t = timesteps[pair_index + 1]
    s = t + 1 + randint(key(Draw.RENOISE_TIME, pair_ids, pair_index), renoise.shape[1] - 1 - t)
    renoise_key = key(Draw.RENOISE, pair_ids, pair_index)
    # The dtype depends on x only: these are the normals that `normal` gives lockstep rollouts.
    z = draw_normals(renoise_key, tuple(x.shape[1:]), arithmetic(x))
    x_s = affine_noise(target if naive else pair_state, renoise[pair_index + 1, s], None, z, 0, None, 0, None)
    dropped = uniform(key(Draw.PROMPT_DROPOUT, pair_ids, pair_index)) < dropout
    row = torch.where(dropped, 0, prompt_index(pair_ids, order=int(shuffled)) + 1)

    # The first state of the next sample, from noise or from a latent.
    ended = states_left == 0
    next_ids = torch.where(ended, sample_ids + stride, sample_ids)
    first = draw_normals(key(Draw.START_NOISE, next_ids), tuple(x.shape[1:]), arithmetic(x))
    if latents is None:
        first_index = torch.full_like(index, last_index)
        first_left = first_index
    else:
        first_index = randint(key(Draw.START_INDEX, next_ids), last_index)
        first_left = (first_index + 1).clamp(max=max_steps)
        clean = latents[prompt_index(next_ids)].to(state.dtype)
        first = affine_noise(clean, start, first_index + 1, first, 0, None, 0, None)

    # Every slot moves on; x, final and next_slots are overwritten.
    if final is not None:
        final.copy_(torch.where(per_element(ended), x_next, final.to(state.dtype)))
    x.copy_(torch.where(per_element(ended), first, x_next))
    next_slots[0] = torch.where(ended, first_index, index - 1)
    next_slots[1] = next_ids
    next_slots[2] = torch.where(ended, first_left, states_left - 1)
    next_slots[3] = prompt_index(next_ids) + 1
    pairs = torch.stack([t, s, pair_ids, row])
    return target.to(x.dtype), x_s.to(x.dtype), pairs, weight[pair_index + 1]


def x0_loss(pred, x_s, target, k, index, weight, kind, c, want_slope):
    """(weighted mean of the loss (), loss per sample (B,), slope (B, ...) or (0,))."""
    dtype = arithmetic(pred, x_s, target)
    k = _rows(k, index)
    x0 = _column(k, 0, x_s, dtype) * x_s.to(dtype) + _column(k, 1, x_s, dtype) * pred.to(dtype)
    d = x0 - target.to(dtype)
    if kind == "l2":
        loss, slope = d.square(), 2 * d
    else:
        root = (d.square() + c * c).sqrt()
        # d^2 / (root + c) equals root - c, whose subtraction would cancel where |d| is far below c.
        loss, slope = d.square() / (root + c), d / root
    per_sample = loss.flatten(1).mean(1)
    slope = slope.to(pred.dtype) if want_slope else pred.new_empty(0)
    return (per_sample * weight.to(dtype)).mean(), per_sample, slope


def x0_loss_backward(slope, k, index, weight, grad):
    """d(loss) / d(pred) = slope k1 weight grad / (B n), (B, ...) in slope's dtype.

    n is the number of elements of a sample.
    """
    dtype = arithmetic(slope)
    k = _rows(k, index)
    factor = k[:, 1].to(dtype) * weight.to(dtype) * grad.to(dtype) / slope.numel()
    return (slope.to(dtype) * factor.view(-1, *[1] * (slope.ndim - 1))).to(slope.dtype)


def ema_update(masters, live, shadows, decay):
    """master <- decay master + (1 - decay) live; shadow <- master."""
    for i, (master, new) in enumerate(zip(masters, live, strict=True)):
        master.lerp_(new.to(master.dtype), 1 - decay)
        if shadows:
            shadows[i].copy_(master)
