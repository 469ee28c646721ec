"""In-flight batching: every slot at its own grid step, every state a pair, finished slots started anew in the kernel.

Shape letters: B pairs of one micro-batch, and slots of one group.
"""

from __future__ import annotations

import torch

from selfnpo_fast.rollout.grid import continuous_frequencies, life_states, lockstep_frequencies
from selfnpo_fast.rollout.lockstep import walk
from selfnpo_fast.rollout.pairs import PairMaker, Pairs
from selfnpo_fast.runtime.capture import Capture, Step, no_capture
from selfnpo_fast.runtime.compiling import compiled
from selfnpo_kernels import Draw, TdftTables, affine_noise, normal, randint, tdft_step


class ContinuousRollout:
    """In-flight batching: each slot is at its own grid index, one forward moves a group of slots, every state gives a
    pair, and a slot that ends its trajectory starts a new one. A group has as many slots as a micro-batch has pairs.

    From noise, the state at the last grid index has no s above it; in its stead the sample that just ended in that slot
    gives its final x as a pair at t = 0, so N forwards give N pairs.
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
        self._capture, self._compiled = capture, compiled(self._advance, compile)
        self._steps: list[Step | None] = [None] * groups  # made when each is first needed
        self.maker, self.batch, self.groups, self.cursor = maker, batch, groups, 0
        self.total_slots = batch * groups * world_size
        group = torch.arange(groups, device=maker.device)[:, None]
        lane = torch.arange(batch, device=maker.device)[None] + rank * batch
        # One table a group: grid index, sample id, states left in this life after the present one, prompt row.
        self.slots = torch.zeros(groups, 4, batch, dtype=torch.int64, device=maker.device)
        # Ids start at one whole set of slots: the set below it are the samples that ended just before the run began.
        self.slots[:, 1] = self.total_slots + group * batch * world_size + lane
        self._next_slots = torch.zeros_like(self.slots[0])
        self.x = torch.zeros(groups, batch, *maker.latent_shape, device=maker.device)
        from_noise = maker.config.start == "noise"
        self.final = torch.zeros_like(self.x) if from_noise else None  # where this slot's previous sample ended
        self.latents = None if from_noise else maker.latents.to(maker.device)
        weight = torch.ones(maker.config.grid_steps + 1, dtype=torch.float64)
        if maker.config.pair_weight == "lockstep":
            ours = continuous_frequencies(maker.config)
            weight = torch.where(ours > 0, lockstep_frequencies(maker.config) / ours.clamp(min=1e-12), 0)
        grid = maker.grid
        self.tables = TdftTables(
            step=grid.step,
            start=grid.start,
            renoise=grid.renoise,
            timesteps=grid.timesteps,
            weight=weight.float().to(maker.device),
        )
        self.rules = maker.rules(self.total_slots)
        self.filled = 0  # groups whose slots hold samples: the first ones

    @property
    def index(self) -> torch.Tensor:
        """Grid indices of all slots, (groups, B)."""
        return self.slots[:, 0]

    @property
    def ids(self) -> torch.Tensor:
        """Sample ids of all slots, (groups, B)."""
        return self.slots[:, 1]

    def _begin(self, ids: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """First state (B, ...) of samples that start at grid indices (B,)."""
        maker = self.maker
        key = maker.key(Draw.START_NOISE, ids)
        if self.latents is None:
            return normal(key, maker.latent_shape)
        return affine_noise(maker.start_latents(ids), maker.grid.start, key, index=start + 1)

    @torch.no_grad()
    def _stagger(self, group: int) -> None:
        """Fill the slots of a group and walk each to a state drawn from the long-run distribution of states."""
        maker, slots = self.maker, self.slots[group]
        states = torch.tensor(life_states(maker.config), device=maker.device)
        ids = slots[1]
        start, index, left = states[randint(maker.key(Draw.STAGGER, ids), len(states))].unbind(1)
        slots[0], slots[2], slots[3] = index, left, maker.rows(ids)
        # A slot at the very start of a sample needs the end of the one before it, for the pair at t = 0.
        fresh = (index == start) & (self.final is not None)
        walkers = torch.where(fresh, ids - self.total_slots, ids)
        first = self._begin(walkers, start)
        stop = torch.where(fresh, -1, index)
        x = walk(maker.predictor, maker.grid, first, start.cpu(), stop.cpu(), maker.rows(walkers))
        self.x[group] = x
        if self.final is not None:
            self.final[group] = x
            self.x[group][fresh] = self._begin(ids, start)[fresh]

    def fill(self) -> None:
        """Fill the groups that are still empty now, and not each when it is first needed."""
        for group in range(self.filled, self.groups):
            self._stagger(group)
        self.filled = self.groups

    @torch.no_grad()
    def next_pairs(self) -> Pairs:
        """Advance one group of slots by one grid step and return the pairs of the states they were in.

        A group is filled on its first turn: the first update need not wait for the slots of the others.
        """
        group = self.cursor
        if group == self.filled:
            self._stagger(group)
            self.filled += 1
        step = self._step_of(group)
        self.cursor = (group + 1) % self.groups
        self.maker.predictor.forwards += self.maker.predictor.forwards_per_state * self.batch
        target, x_s, pairs, weight = step()
        t, s, sample_ids, rows = pairs
        return Pairs(x_s=x_s, s=s, target=target, t=t, rows=rows, weight=weight, sample_ids=sample_ids)

    def _step_of(self, group: int) -> Step:
        """One grid step of a group: a function of nothing, on tensors that stay where they are.

        It is compiled and captured once it is settled how the branches run.
        """
        if self._steps[group] is not None:
            return self._steps[group]
        x, slots = self.x[group], self.slots[group]
        final = None if self.final is None else self.final[group]
        if not self.maker.predictor.decided:
            return lambda: self._advance(x, final, slots)
        self._steps[group] = self._capture(lambda: self._compiled(x, final, slots))
        return self._steps[group]

    def _advance(self, x: torch.Tensor, final: torch.Tensor | None, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Reference forward and `tdft_step`: (target, x_s, pairs, weight); x, final and slots become the next ones."""
        maker = self.maker
        pos, neg = maker.predictor.outputs(x, maker.grid.timestep(slots[0]), slots[3])
        out = tdft_step(pos, neg, x, final, slots, self._next_slots, self.tables, self.rules, self.latents)
        slots.copy_(self._next_slots)
        return out

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All slots of this rank as (groups, lanes, ...); the lanes of all ranks side by side are those of one."""
        names = ("index", "ids", "left", "rows")
        state = {name: column.contiguous() for name, column in zip(names, self.slots.unbind(1), strict=True)}
        state |= {"cursor": torch.tensor(self.cursor), "filled": torch.tensor(self.filled)}
        state |= {"x": self.x, **self.maker.predictor.state_dict()}
        return state if self.final is None else state | {"final": self.final}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state_dict()`."""
        self.slots.copy_(torch.stack([state[name] for name in ("index", "ids", "left", "rows")], dim=1))
        self.x.copy_(state["x"])
        if self.final is not None:
            self.final.copy_(state["final"])
        self.cursor, self.filled = int(state["cursor"]), int(state["filled"])
        self.maker.predictor.load_state_dict(state)
