"""`tdft_step`: one grid step of every slot of a continuous rollout, with pairs and restarts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from selfnpo_kernels.triton.common import (
    PROMPT_DROPOUT,
    RENOISE,
    RENOISE_TIME,
    START_INDEX,
    START_NOISE,
    STEP_COLUMNS,
    draw_id,
    entry,
    guided,
    half_bits,
    launch,
    load,
    load_or_none,
    normals,
    plan,
    prompt_index,
    randint,
    sample_and_block,
    store,
    uniform,
)


@triton.jit
def _pair_timesteps(seed, pair_id, pair_index, timesteps, train_steps):
    """(t, s): the timestep of the pair's state, and the later one that Eq. 16 noises it to."""
    t = tl.load(timesteps + pair_index + 1)
    s = t + 1 + randint(seed, pair_id, draw_id(RENOISE_TIME, pair_index), train_steps - 1 - t)
    return t, s


@triton.jit
def _start_index(seed, sample_id, last_index):
    """Grid index at which a trajectory from data begins."""
    return randint(seed, sample_id, draw_id(START_INDEX, sample_id * 0 - 1), last_index)


@triton.jit
def _write_next_slot(
    next_slots, sample, batch, index, sample_id, states_left, ended, last_index, num_prompts, stride, max_steps, seed,
    FROM_DATA: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Writes a slot's column of `next_slots`."""
    next_id = tl.where(ended, sample_id + stride, sample_id)
    if FROM_DATA:
        first_index = _start_index(seed, next_id, last_index)
        first_left = tl.minimum(first_index + 1, max_steps)
    else:
        first_index = last_index
        first_left = last_index
    next_slots += sample
    tl.store(next_slots, tl.where(ended, first_index, index - 1))
    tl.store(next_slots + batch, next_id)
    tl.store(next_slots + 2 * batch, tl.where(ended, first_left, states_left - 1))
    tl.store(next_slots + 3 * batch, prompt_index(next_id, num_prompts, seed, HALF) + 1)


@triton.jit
def _write_pair(
    pairs, sample, batch, t, s, pair_id, pair_index, num_prompts, seed, dropout,
    SHUFFLED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Writes a slot's column of `pairs`."""
    dropped = uniform(seed, pair_id, draw_id(PROMPT_DROPOUT, pair_index)) < dropout
    row = tl.where(dropped, 0, prompt_index(pair_id, num_prompts, seed + SHUFFLED, HALF) + 1)
    pairs += sample
    tl.store(pairs, t)
    tl.store(pairs + batch, s)
    tl.store(pairs + 2 * batch, pair_id)
    tl.store(pairs + 3 * batch, row)


@triton.jit
def _first_state(
    x, latents, start, sample_id, block, last_index, num_prompts, seed,
    HALF: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a new sample's first state, (BLOCK,) float32: noise, or its noised latent."""
    first = normals(seed, sample_id, draw_id(START_NOISE, sample_id * 0 - 1), block, BLOCK, x.dtype.element_ty)
    if latents is not None:
        start += (_start_index(seed, sample_id, last_index) + 1) * 2
        # As wide as `block`: 64 bits only where the plan is wide.
        row = prompt_index(sample_id, num_prompts, seed, HALF).to(block.dtype)
        clean = load(latents, row, block, N, BLOCK)
        first = tl.load(start) * clean + tl.load(start + 1) * first
    return first


@entry(do_not_specialize=["batch", "last_index", "train_steps", "num_prompts", "stride", "max_steps", "seed"])
def tdft_step_kernel(
    target, x_s, pairs, pair_weight, pos, neg, x, final, slots, next_slots,
    step, start, renoise, timesteps, weight, latents,
    batch: tl.int64, last_index: tl.int64, train_steps: tl.int64, num_prompts: tl.int64, stride: tl.int64,
    max_steps: tl.int64, seed: tl.int64, dropout,
    SHUFFLED: tl.constexpr, NAIVE: tl.constexpr, HALF: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of a slot: target, x_s and the next state.

    The first block of a slot also writes its columns of next_slots, pairs and pair_weight.
    """
    sample, block = sample_and_block(N, BLOCK, WIDE)
    # The long loads come first, so that they do not wait for values that depend on the slot.
    state = load(x, sample, block, N, BLOCK)
    positive = load_or_none(pos, sample, block, N, BLOCK)
    negative = load_or_none(neg, sample, block, N, BLOCK)
    index = tl.load(slots + sample)
    sample_id = tl.load(slots + batch + sample)
    states_left = tl.load(slots + 2 * batch + sample)
    ended = states_left == 0

    # Which state gives the pair. No timestep s lies above the last grid index: there the pair is
    # that of the final state of the slot's previous sample, at t = 0.
    use_final = (index == last_index) & (final is not None)
    pair_index = tl.where(use_final, -1, index)
    pair_id = tl.where(use_final, sample_id - stride, sample_id)
    t, s = _pair_timesteps(seed, pair_id, pair_index, timesteps, train_steps)

    # The integers of the slot and of the pair.
    if block == 0:
        _write_next_slot(
            next_slots, sample, batch, index, sample_id, states_left, ended, last_index, num_prompts, stride,
            max_steps, seed, latents is not None, HALF,
        )  # fmt: skip
        _write_pair(pairs, sample, batch, t, s, pair_id, pair_index, num_prompts, seed, dropout, SHUFFLED, HALF)
        tl.store(pair_weight + sample, tl.load(weight + pair_index + 1))

    # The guided solver step, and the target.
    k = step + (index + 1) * STEP_COLUMNS
    p = guided(positive, negative, k + 6)
    x0 = tl.load(k) * state + tl.load(k + 1) * p
    x_next = tl.load(k + 2) * state + tl.load(k + 3) * p
    if final is not None:
        if use_final:
            state = load(final, sample, block, N, BLOCK)
            x0 = state
    store(target, sample, block, x0, N, BLOCK)

    # The pair's noised state: Eq. 16, or Eq. 15 if naive.
    k = renoise + ((pair_index + 1) * train_steps + s) * 2
    if NAIVE:
        state = x0
    z = normals(seed, pair_id, draw_id(RENOISE, pair_index), block, BLOCK, x.dtype.element_ty)
    store(x_s, sample, block, tl.load(k) * state + tl.load(k + 1) * z, N, BLOCK)

    # The slot moves on. The layouts of loads and stores may differ: the barrier keeps a thread from
    # overwriting what another thread has yet to read.
    tl.debug_barrier()
    if ended:
        if final is not None:
            store(final, sample, block, x_next, N, BLOCK)
        x_next = _first_state(
            x, latents, start, sample_id + stride, block, last_index, num_prompts, seed, HALF, N, BLOCK
        )
    store(x, sample, block, x_next, N, BLOCK)


def tdft_step(
    pos, neg, x, final, slots, next_slots, step, start, renoise, timesteps, weight, latents,
    num_prompts, stride, max_steps, seed, dropout, shuffled, naive,
):  # fmt: skip
    """The guided step, the pair and the restart of every slot in one pass; see `ops.tdft_step`.

    Every program computes the scalars of its sample. The first program of a sample writes its
    columns of next_slots, pairs and weight. A block of x and final is overwritten by the program
    that reads it.
    """
    target, x_s, pairs = torch.empty_like(x), torch.empty_like(x), torch.empty_like(slots)
    pair_weight = weight.new_empty(x.shape[0])
    p = plan(x.shape, rows=0 if latents is None else num_prompts)
    launch(
        tdft_step_kernel, p.programs, x,
        target, x_s, pairs, pair_weight, pos, neg, x, final, slots, next_slots,
        step, start, renoise, timesteps, weight, latents,
        x.shape[0], timesteps.shape[0] - 2, renoise.shape[1], num_prompts, stride, max_steps, seed, dropout,
        SHUFFLED=int(shuffled), NAIVE=naive, HALF=half_bits(num_prompts), **p.options,
    )  # fmt: skip
    return target, x_s, pairs, pair_weight
