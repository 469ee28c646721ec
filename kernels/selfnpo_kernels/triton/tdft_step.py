"""A grid step of every slot of a continuous rollout, its training pair, and the next sample where one has ended."""

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
    draw_id,
    entry,
    guided,
    half_bits,
    item_of,
    launch,
    load,
    load_or_none,
    normals,
    place,
    plan,
    randint,
    store,
    uniform,
)


@triton.jit
def _pair_time(seed, pair_id, pair_index, timesteps, train_steps):
    """(t, s): the pair's own timestep, and the one above it that Eq. 16 noises to."""
    t = tl.load(timesteps + pair_index + 1)
    s = t + 1 + randint(seed, pair_id, draw_id(RENOISE_TIME, pair_index), train_steps - 1 - t)
    return t, s


@triton.jit
def _start_index(seed, sample_id, top):
    """Grid index at which a trajectory from data begins."""
    return randint(seed, sample_id, draw_id(START_INDEX, sample_id * 0 - 1), top)


@triton.jit
def _write_next_slot(
    next_slots, sample, batch, index, sample_id, left, ended, top, items, stride, max_steps, seed,
    FROM_DATA: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    next_id = tl.where(ended, sample_id + stride, sample_id)
    if FROM_DATA:
        first_index = _start_index(seed, next_id, top)
        first_left = tl.minimum(first_index + 1, max_steps)
    else:
        first_index = top
        first_left = top
    next_slots += sample
    tl.store(next_slots, tl.where(ended, first_index, index - 1))
    tl.store(next_slots + batch, next_id)
    tl.store(next_slots + 2 * batch, tl.where(ended, first_left, left - 1))
    tl.store(next_slots + 3 * batch, item_of(next_id, items, seed, HALF) + 1)


@triton.jit
def _write_pair(
    pairs, sample, batch, t, s, pair_id, pair_index, items, seed, dropout, SHUFFLED: tl.constexpr, HALF: tl.constexpr
):
    dropped = uniform(seed, pair_id, draw_id(PROMPT_DROPOUT, pair_index)) < dropout
    row = tl.where(dropped, 0, item_of(pair_id, items, seed + SHUFFLED, HALF) + 1)
    pairs += sample
    tl.store(pairs, t)
    tl.store(pairs + batch, s)
    tl.store(pairs + 2 * batch, pair_id)
    tl.store(pairs + 3 * batch, row)


@triton.jit
def _first_state(
    x, latents, start, sample_id, block, top, items, seed, HALF: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr
):
    """The new sample's first state: noise, or its noised latents; (BLOCK,) float32."""
    first = normals(seed, sample_id, draw_id(START_NOISE, sample_id * 0 - 1), block, BLOCK, x.dtype.element_ty)
    if latents is not None:
        start += (_start_index(seed, sample_id, top) + 1) * 2
        item = item_of(sample_id, items, seed, HALF).to(block.dtype)  # an index no wider than it has to be
        source = load(latents, item, block, N, BLOCK)
        first = tl.load(start) * source + tl.load(start + 1) * first
    return first


@entry(do_not_specialize=["batch", "top", "train_steps", "items", "stride", "max_steps", "seed"])
def tdft_step_kernel(
    target, x_s, pairs, pair_weight, pos, neg, x, final, slots, next_slots,
    step, start, renoise, timesteps, weight, latents,
    batch: tl.int64, top: tl.int64, train_steps: tl.int64, items: tl.int64, stride: tl.int64, max_steps: tl.int64,
    seed: tl.int64, dropout,
    SHUFFLED: tl.constexpr, NAIVE: tl.constexpr, HALF: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of a slot: target, x_s, the next state; its first block writes the slot's and the pair's integers."""
    sample, block = place(N, BLOCK, WIDE)
    # The long loads first: nothing that follows from the slot has to arrive before they are under way.
    state = load(x, sample, block, N, BLOCK)
    positive = load_or_none(pos, sample, block, N, BLOCK)
    negative = load_or_none(neg, sample, block, N, BLOCK)
    index = tl.load(slots + sample)
    sample_id = tl.load(slots + batch + sample)
    left = tl.load(slots + 2 * batch + sample)
    ended = left == 0
    # A state at the last timestep has no s above it: the sample that ended in that slot before gives its end instead.
    no_room = (index == top) & (final is not None)
    pair_index = tl.where(no_room, -1, index)
    pair_id = tl.where(no_room, sample_id - stride, sample_id)
    t, s = _pair_time(seed, pair_id, pair_index, timesteps, train_steps)
    if block == 0:
        _write_next_slot(
            next_slots, sample, batch, index, sample_id, left, ended, top, items, stride, max_steps, seed,
            latents is not None, HALF,
        )  # fmt: skip
        _write_pair(pairs, sample, batch, t, s, pair_id, pair_index, items, seed, dropout, SHUFFLED, HALF)
        tl.store(pair_weight + sample, tl.load(weight + pair_index + 1))

    k = step + (index + 1) * 7
    p = guided(positive, negative, k + 6)
    goal = tl.load(k) * state + tl.load(k + 1) * p
    moved = tl.load(k + 2) * state + tl.load(k + 3) * p
    if final is not None:
        if no_room:
            state = load(final, sample, block, N, BLOCK)
            goal = state
    store(target, sample, block, goal, N, BLOCK)
    k = renoise + ((pair_index + 1) * train_steps + s) * 2
    if NAIVE:
        state = goal  # Eq. 15
    z = normals(seed, pair_id, draw_id(RENOISE, pair_index), block, BLOCK, x.dtype.element_ty)
    store(x_s, sample, block, tl.load(k) * state + tl.load(k + 1) * z, N, BLOCK)  # Eq. 16

    # The layouts of loads and stores may differ: no thread overwrites what another has yet to read.
    tl.debug_barrier()
    if ended:
        if final is not None:
            store(final, sample, block, moved, N, BLOCK)
        moved = _first_state(x, latents, start, sample_id + stride, block, top, items, seed, HALF, N, BLOCK)
    store(x, sample, block, moved, N, BLOCK)


def tdft_step(
    pos, neg, x, final, slots, next_slots, step, start, renoise, timesteps, weight, latents,
    items, stride, max_steps, seed, dropout, shuffled, naive,
):  # fmt: skip
    """Guided step, pair of Eq. 16 (15 if `naive`) and restart of every slot in one pass; `ops.tdft_step` has it all.

    Every program works out its sample's scalars; the first of each sample writes next_slots, pairs and weight. x and
    final are overwritten block by block by the program that read the block.
    """
    target, x_s, pairs = torch.empty_like(x), torch.empty_like(x), torch.empty_like(slots)
    pair_weight = weight.new_empty(x.shape[0])
    p = plan(x.shape, rows=0 if latents is None else items)
    launch(
        tdft_step_kernel, p.programs, x,
        target, x_s, pairs, pair_weight, pos, neg, x, final, slots, next_slots,
        step, start, renoise, timesteps, weight, latents,
        x.shape[0], timesteps.shape[0] - 2, renoise.shape[1], items, stride, max_steps, seed, dropout,
        SHUFFLED=int(shuffled), NAIVE=naive, HALF=half_bits(items), **p.options,
    )  # fmt: skip
    return target, x_s, pairs, pair_weight
