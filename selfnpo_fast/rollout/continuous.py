"""Continuous rollouts (in-flight batching): every forward of the reference gives pairs.

Every slot is at its own grid index, every state gives a pair, and the kernel starts a new sample in
a slot whose sample has ended.

Shape letters: B pairs of one micro-batch, which are also the slots of one group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from selfnpo_fast.rollout.grid import life_states
from selfnpo_fast.rollout.lockstep import walk
from selfnpo_fast.rollout.pairs import PairMaker, Pairs
from selfnpo_fast.rollout.slots_ahead import SlotsAhead
from selfnpo_fast.runtime.capture import Capture, Step, no_capture
from selfnpo_fast.runtime.compiling import compiled
from selfnpo_fast.runtime.layout import check_layout, check_range, layout_of
from selfnpo_fast.runtime.limits import MAX_SAMPLE_ID
from selfnpo_kernels import Draw, TdftTables, affine_noise, normal, randint, tdft_step

_COLUMNS = ("index", "ids", "left", "rows")
"""Names of the four slot tables in a checkpoint."""


def fill_width(batch: int) -> int:
    """Rows of each forward that fills the slots of a group of `batch`.

    A sample walks about half as many steps as the longest walk has. With half of the batch in a
    forward, hardly a row is empty, and all forwards have one size.
    """
    return -(-batch // 2)


class ContinuousRollout:
    """Slots whose samples are at different grid indices; one forward moves a group by one step.

    A group has as many slots as a micro-batch has pairs, and the groups take turns. A slot whose
    sample ends starts a new sample.

    From noise, the state at the last grid index has no s above it. The sample that has just ended
    in the slot gives its final x as a pair at t = 0 instead, so that N forwards give N pairs.
    """

    def __init__(
        self,
        maker: PairMaker,
        *,
        batch: int,
        groups: int,
        rank: int,
        world_size: int,
        compile: str = "off",
        capture: Capture = no_capture,
    ) -> None:
        """Empty slots.

        batch      slots of a group on this rank, B
        groups     groups of slots
        compile    `engine.compile` of the config
        capture    makes a step that can be replayed, such as a CUDA graph
        """
        self._capture, self._compiled = capture, compiled(self._advance, compile)
        self._steps: list[Step | None] = [None] * groups  # each is built when it is first needed
        self.maker, self.batch, self.groups, self.cursor = maker, batch, groups, 0
        maker.predictor.full_batch = max(maker.predictor.full_batch, batch)
        self.total_slots = batch * groups * world_size
        group = torch.arange(groups, device=maker.device)[:, None]
        lane = torch.arange(batch, device=maker.device)[None] + rank * batch
        # Per group: grid index, sample id, states left to the sample after this one, table row.
        self.slots = torch.zeros(groups, 4, batch, dtype=torch.int64, device=maker.device)
        # Sample ids start at `total_slots`: lower ids are of the samples that ended just before the
        # run began.
        self.slots[:, 1] = self.total_slots + group * batch * world_size + lane
        self._next_slots = torch.zeros_like(self.slots[0])
        self.x = torch.zeros(groups, batch, *maker.latent_shape, device=maker.device)
        from_noise = maker.config.start == "noise"
        # The state in which each slot's previous sample ended.
        self.final = torch.zeros_like(self.x) if from_noise else None
        self.latents = None if from_noise else maker.latents.to(maker.device)
        self.tables = self._tables()
        self.rules = maker.rules(self.total_slots)
        self.filled = 0  # groups whose slots hold samples: the first ones
        # Where conditioning rows come from the host, it has to know which samples the slots hold.
        self._ahead = SlotsAhead(self) if maker.predictor.table.on_host else None

    def _tables(self) -> TdftTables:
        """The grid's tables, and the weights of pairs."""
        grid = self.maker.grid
        return TdftTables(
            step=grid.step,
            start=grid.start,
            renoise=grid.drawn_renoise(),
            timesteps=grid.draws_above,  # the op says t by it, and draws s above it
            weight=self.maker.weights,
        )

    @property
    def index(self) -> torch.Tensor:
        """Grid indices of all slots, (groups, B) int64."""
        return self.slots[:, 0]

    @property
    def ids(self) -> torch.Tensor:
        """Sample ids of all slots, (groups, B) int64."""
        return self.slots[:, 1]

    def _first_states(self, ids: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """First states (B, ...) of samples `ids` (B,) that start at grid indices `start` (B,)."""
        maker = self.maker
        key = maker.key(Draw.START_NOISE, ids)
        if self.latents is None:
            return normal(key, maker.latent_shape)
        return affine_noise(maker.start_latents(ids), maker.grid.start, key, index=start + 1)

    def first_draws(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The states that samples `ids` (B,) are in when slots are filled, on the device of `ids`.

        Returns, each (B,), the grid index where the sample starts, its present one, the states left
        to it, whether it is at its very start, and the sample that walks in the slot. A slot at the
        very start of a sample needs the end of the sample before, for the pair at t = 0: there the
        sample before walks, and to the end of its trajectory.
        """
        states = torch.tensor(life_states(self.maker.config), device=ids.device)
        start, index, left = states[randint(self.maker.key(Draw.STAGGER, ids), len(states))].unbind(1)
        at_start = (index == start) & (self.final is not None)
        return start, index, left, at_start, torch.where(at_start, ids - self.total_slots, ids)

    @torch.no_grad()
    def _stagger(self, group: int) -> None:
        """Fill a group's slots, each with a state drawn from the long-run distribution."""
        maker, slots = self.maker, self.slots[group]
        if self._ahead is not None:
            self._ahead.fill(group)
        ids = slots[1]
        start, index, left, at_start, walker_ids = self.first_draws(ids)
        slots[0], slots[2], slots[3] = index, left, maker.rows(ids)
        first = self._first_states(walker_ids, start)
        stop = torch.where(at_start, -1, index)
        # Walk. Every step needs to know on the host how many samples still move.
        x = walk(
            maker.predictor, maker.grid, first, start.cpu(), stop.cpu(), maker.rows(walker_ids), fill_width(self.batch)
        )
        # Keep the ends, and put the slot's own sample where the sample before has walked.
        if self.final is not None:
            self.final[group] = x
            x = torch.where(at_start.view(-1, *[1] * len(maker.latent_shape)), self._first_states(ids, start), x)
        self.x[group] = x

    def fill(self, turns: int | None = None, before_group: Callable[[], None] | None = None) -> None:
        """Fill those groups that are still empty: all of them, or those of the next `turns` calls.

        `before_group` is called before each of them. Where it raises, all of them are as good as
        empty, and a later call fills them.
        """
        last = self.groups if turns is None else min(self.cursor + turns, self.groups)
        for group in range(self.filled, last):
            if before_group is not None:
                before_group()
            self._stagger(group)
        self.filled = max(self.filled, last)

    @torch.no_grad()
    def next_pairs(self) -> Pairs:
        """Advance one group by one grid step, and return the pairs of the states it was in.

        A group is filled on its first turn: the first update need not wait for the other groups.
        """
        self.fill(1)
        group = self.cursor
        step = self._step_of(group)
        if self._ahead is not None:
            self._ahead.prefetch(group)
        self.cursor = (group + 1) % self.groups
        self.maker.predictor.forwards += self.maker.predictor.forwards_per_state * self.batch
        target, x_s, pairs, weight = step()
        if self._ahead is not None:
            self._ahead.taken(self.cursor if self.cursor < self.filled else None)
        t, s, sample_ids, rows = pairs
        return Pairs(x_s=x_s, s=s, target=target, t=t, rows=rows, weight=weight, sample_ids=sample_ids)

    def _step_of(self, group: int) -> Step:
        """One grid step of a group: a function without arguments, on tensors that never move.

        The step is compiled and captured once it is settled how the guidance branches run.
        """
        if self._steps[group] is not None:
            return self._steps[group]
        x, slots = self.x[group], self.slots[group]
        final = None if self.final is None else self.final[group]
        if not self.maker.predictor.decided:
            return lambda: self._advance(x, final, slots)
        state = [tensor for tensor in (x, final, slots, self._next_slots) if tensor is not None]
        self._steps[group] = self._capture(lambda: self._compiled(x, final, slots), state)
        return self._steps[group]

    def _advance(self, x: torch.Tensor, final: torch.Tensor | None, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The reference's forward and `tdft_step`; x, final and slots become their next values.

        x, final    (B, ...)
        slots       (4, B) int64

        Returns (target, x_s, pairs, weight) as `tdft_step` does.
        """
        maker = self.maker
        pos, neg = maker.predictor.outputs(x, maker.grid.timestep(slots[0]), slots[3])
        out = tdft_step(pos, neg, x, final, slots, self._next_slots, self.tables, self.rules, self.latents)
        pairs, grid = out[2], maker.grid
        if grid.moved is not None:  # the op draws uniformly, and its tables are by the drawn s
            index = slots[0]
            if final is not None:
                index = torch.where(index == grid.steps - 1, -1, index)
            pairs[0], pairs[1] = grid.timestep(index), grid.level_of(index, pairs[1])
        slots.copy_(self._next_slots)
        return out

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All slots of this rank as (groups, B, ...) tensors.

        The slots of all ranks, joined along the second dimension, are those of a single rank.
        """
        state = {name: column.contiguous() for name, column in zip(_COLUMNS, self.slots.unbind(1), strict=True)}
        state |= {"cursor": torch.tensor(self.cursor), "filled": torch.tensor(self.filled)}
        state |= {"x": self.x, **self.maker.predictor.state_dict()}
        return state if self.final is None else state | {"final": self.final}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state_dict()`. Raises ValueError where it is none of this rollout's."""
        check_layout(layout_of(state.items()), layout_of(self.state_dict().items()))
        maker = self.maker
        check_range("index", state["index"], -1, maker.config.grid_steps - 1)
        check_range("ids", state["ids"], 0, MAX_SAMPLE_ID)
        check_range("left", state["left"], 0, maker.config.grid_steps)
        check_range("rows", state["rows"], 0, maker.num_prompts)
        check_range("cursor", state["cursor"], 0, self.groups - 1)
        check_range("filled", state["filled"], 0, self.groups)
        self.slots.copy_(torch.stack([state[name] for name in _COLUMNS], dim=1))
        self.x.copy_(state["x"])
        if self.final is not None:
            self.final.copy_(state["final"])
        self.cursor, self.filled = int(state["cursor"]), int(state["filled"])
        if self._ahead is not None:
            self._ahead.load(self.slots)
        self.maker.predictor.load_state_dict(state)
