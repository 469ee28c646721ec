"""A continuous rollout, computed sample by sample in Python and float64 from the written contract.

A slot holds one sample at a time. Each call moves the sample down by one grid step and returns a
pair of the state before the step. After the last state of a sample, the slot takes the sample with
its next id.
"""

from __future__ import annotations

from dataclasses import dataclass

import exact
import numpy as np
import torch
from cases import F32, draw, wide

from selfnpo_kernels import Draw, TdftRules, TdftTables


@dataclass
class World:
    """What all slots share: the op's tables, its rules, and the latents of real data."""

    tables: TdftTables
    rules: TdftRules
    latents: torch.Tensor | None

    def row(self, table: str, *at: int) -> np.ndarray:
        return wide(getattr(self.tables, table)[at])

    @property
    def top(self) -> int:
        return len(self.tables.timesteps) - 2

    def prompt_index(self, sample: int, order: int = 0) -> int:
        return exact.prompt_index(sample, self.rules.num_prompts, self.rules.seed + order)


@dataclass
class Slot:
    """A sample in progress.

    x and final are (values, sizes), each (...); roundings are relative to the sizes.
    """

    index: int
    sample: int
    left: int
    x: tuple[np.ndarray, np.ndarray]
    final: tuple[np.ndarray, np.ndarray] | None


@dataclass
class Pair:
    """What a call returns for one slot; target and x_s are (values, sizes)."""

    target: tuple[np.ndarray, np.ndarray]
    x_s: tuple[np.ndarray, np.ndarray]
    numbers: list[int]
    """t, s, sample id, the student's conditioning row."""
    weight: float


def begin(world: World, slot: Slot, sample: int) -> None:
    """Put a new sample into the slot."""
    seed, shape = world.rules.seed, slot.x[0].shape
    value, size = (a[0] for a in exact.sized_normals(seed, [sample], exact.draw_id(Draw.START_NOISE), shape))
    slot.sample = sample
    if world.latents is None:
        slot.index = slot.left = world.top
        slot.x = value, size
        return
    # Below the last grid index.
    slot.index = exact.randint(seed, sample, exact.draw_id(Draw.START_INDEX), world.top)
    slot.left = min(slot.index + 1, world.rules.max_steps)
    signal, disturbance = world.row("start", slot.index + 1)
    latent = wide(world.latents[world.prompt_index(sample)])
    slot.x = exact.linear((signal, latent, np.abs(latent)), (disturbance, value, size))


def pair_of(world: World, slot: Slot, x0: tuple[np.ndarray, np.ndarray]) -> Pair:
    """The pair of the slot's state, or of the previous sample's end where no s lies above."""
    rules, index, sample, state, target = world.rules, slot.index, slot.sample, slot.x, x0
    if world.latents is None and index == world.top:
        index, sample, state, target = -1, sample - rules.stride, slot.final, slot.final
    t, end = int(world.tables.timesteps[index + 1]), world.tables.renoise.shape[1]
    s = t + 1 + exact.randint(rules.seed, sample, exact.draw_id(Draw.RENOISE_TIME, index), end - 1 - t)
    noise = exact.sized_normals(rules.seed, [sample], exact.draw_id(Draw.RENOISE, index), state[0].shape)
    signal, disturbance = world.row("renoise", index + 1, s)
    x_s = exact.linear((signal, *(target if rules.naive else state)), (disturbance, noise[0][0], noise[1][0]))
    dropped = exact.uniform(rules.seed, sample, exact.draw_id(Draw.PROMPT_DROPOUT, index)) < np.float32(rules.dropout)
    row = 0 if dropped else world.prompt_index(sample, order=int(rules.shuffled)) + 1
    return Pair(target, x_s, [t, s, sample, row], float(world.row("weight", index + 1)))


def advance(world: World, slot: Slot, pos: np.ndarray | None, neg: np.ndarray | None) -> Pair:
    """One call for one slot; pos and neg are its network outputs, (...)."""
    k = world.row("step", slot.index + 1)
    p = [a[0] for a in exact.guided(*(a if a is None else a[None] for a in (pos, neg)), k[None])]
    x0, moved = exact.linear((k[0], *slot.x), (k[1], *p)), exact.linear((k[2], *slot.x), (k[3], *p))
    pair = pair_of(world, slot, x0)
    if slot.left == 0:
        slot.final = moved if world.latents is None else None
        begin(world, slot, slot.sample + world.rules.stride)
    else:
        slot.index, slot.left, slot.x = slot.index - 1, slot.left - 1, moved
    return pair


def make_world(
    seed: int,
    shape: tuple[int, ...],
    *,
    steps: int,
    w: float,
    start: str,
    latent_dtype: torch.dtype = F32,
    on: str = "cpu",
    **rules,
) -> World:
    """Random tables in which no two rows are equal, for `steps` of 30 training timesteps."""
    timesteps = torch.tensor([0, *((i + 1) * 30 // steps - 1 for i in range(steps))])

    def table(*size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + len(size) + size[-1])
        return (0.4 + 0.5 * torch.rand(size, generator=generator)).to(on)

    # One row more than the grid has: lockstep rollouts append the identity.
    step = table(steps + 2, 8)
    step[:, 6] = w
    defaults = {"num_prompts": 3, "stride": 11, "max_steps": steps, "seed": seed}
    rules = TdftRules(**(defaults | rules))
    tables = TdftTables(
        step=step,
        start=table(steps + 1, 2),
        renoise=table(steps + 1, 30, 2),
        timesteps=timesteps.to(on),
        weight=table(steps + 1),
    )
    latents = draw(seed, (rules.num_prompts, *shape[1:]), dtype=latent_dtype, on=on)[0] if start == "data" else None
    return World(tables, rules, latents)
