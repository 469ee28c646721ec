"""The slots of a continuous rollout as the host knows them, one step before the device.

Which sample a slot holds and which prompts its next step needs follow from keyed draws, not from
the states. So the host takes the same steps on states of one number each, and a table on the host
has the rows at the device before the step that gathers them: nothing is read back.

Shape letters: B slots of a group.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch

from selfnpo_kernels import tdft_step

if TYPE_CHECKING:
    from selfnpo_fast.rollout.continuous import ContinuousRollout

_HOST = torch.device("cpu")


class SlotsAhead:
    """Follows a rollout's slots on the host, and prefetches what the next step gathers."""

    def __init__(self, rollout: ContinuousRollout) -> None:
        """Empty slots, as the rollout's are."""
        self._rollout, self._maker = rollout, rollout.maker
        self._slots = rollout.slots.to(_HOST, copy=True)  # (groups, 4, B), as the rollout's
        self._next_slots = torch.zeros_like(self._slots[0])
        tables = rollout.tables
        self._tables = replace(tables, **{f.name: getattr(tables, f.name).to(_HOST) for f in fields(tables)})
        # States of one number each: what becomes of them does not matter.
        self._x = torch.zeros(rollout.batch, 1)
        self._final = None if rollout.final is None else torch.zeros_like(self._x)
        self._latents = None if rollout.latents is None else torch.zeros(self._maker.num_prompts, 1)
        # The group whose next step was taken here, and the rows of that step.
        self._next: tuple[int, torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def fill(self, group: int) -> None:
        """Fill a group's slots as the rollout does, and prefetch the rows of what walks there."""
        slots = self._slots[group]
        ids = slots[1].clone()
        _, index, left, _, walkers = self._rollout.first_draws(ids)
        slots[0], slots[2], slots[3] = index, left, self._maker.rows(ids)
        self._maker.prefetch(self._maker.rows(walkers), ids[:0])

    @torch.no_grad()
    def prefetch(self, group: int) -> None:
        """Bring the rows of a group's next step to the device, where they are not there yet."""
        if self._next is None or self._next[0] != group:
            self._next = (group, *self._step(group))
        self._maker.prefetch(*self._next[1:])

    def _step(self, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a group's next step; its samples' rows and its pairs' rows, (B,) each."""
        slots = self._slots[group]
        rows = slots[3].clone()
        _, _, pairs, _ = tdft_step(
            torch.zeros_like(self._x), None, self._x.zero_(), self._final, slots, self._next_slots,
            self._tables, self._rollout.rules, self._latents,
        )  # fmt: skip
        slots.copy_(self._next_slots)
        return rows, pairs[3]

    def taken(self, following: int | None) -> None:
        """The step whose rows were prefetched is on its way; `following` is the group that takes
        the next one, if it is filled."""
        self._next = None
        if following is not None:
            self.prefetch(following)

    def load(self, slots: torch.Tensor) -> None:
        """Go on from the rollout's `slots`, which were loaded."""
        self._slots.copy_(slots)
        self._next = None
