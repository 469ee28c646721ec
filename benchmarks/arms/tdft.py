"""The arms of `tdft_step` in `bench_ops.py`: ours, and the same step in eager PyTorch.

The step's formulas are written as in the authors' code. Continuous slots are not in their code, and
eager PyTorch has two ways to restart the slots that have ended. `eager` works on the whole batch
with masks: it draws new start noise for all slots, and those that have ended take theirs.
`eager_by_rows` asks the host which slots have ended and draws noise only for them. That is less
work, but every step has to wait for the GPU, and torch.compile cannot compile it.

`ours_noise` and `ours_step` time parts of our step: the normals of Eq. 16, and the guided step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.arms.ops import GRID_STEPS, REFERENCE_ROWS, SEED, Comparison, Op, column, moments
from selfnpo_fast.rollout import Grid
from selfnpo_kernels import Draw, NoiseKey, TdftRules, TdftTables, backends, draw_id, guided_step, normal, tdft_step

ROLLOUT_W = -5.0
"""The authors' value for SDXL, at which both branches are needed."""
DROPOUT = 0.1
ITEMS = 2333
TOP = GRID_STEPS - 1
"""The last grid index, where trajectories from noise start."""
PAIR = ("target", "x_s", "facts", "weight")
"""Names of the tensors of a pair; facts (4, B) int64 are t, s, sample id and row of the prompt."""


class TdftStep(Op):
    """`tdft_step` from noise with both branches; the slots are spread over the grid."""

    reads_back = ("eager_by_rows",)

    def build(self) -> None:
        self.pos, self.neg = self.random(self.torch_dtype), self.random(self.torch_dtype)
        self.cycle = GRID_STEPS if self.batch < GRID_STEPS else 1  # with few slots not every step ends one
        grid = Grid.build(self.schedule, GRID_STEPS, self.device, omega=ROLLOUT_W)
        weight = torch.linspace(0.5, 1.5, GRID_STEPS + 1, device=self.device)
        self.tables = TdftTables(
            step=grid.step, start=grid.start, renoise=grid.renoise, timesteps=grid.timesteps, weight=weight
        )
        self.rules = TdftRules(num_prompts=ITEMS, stride=self.batch, max_steps=GRID_STEPS, seed=SEED, dropout=DROPOUT)
        self.order = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(0)).to(self.device)
        self.begin = self.random(torch.float32), self.random(torch.float32)

    def slots(self) -> torch.Tensor:
        """Slots (4, B) int64 that are spread over the grid; the first one is at its last step.

        Rows are grid index, sample id, states left after this one, row of the prompt.
        """
        index = torch.arange(self.batch, device=self.device) * GRID_STEPS // self.batch
        return torch.stack([index, self.ids(), index, torch.ones_like(index)])

    def our_step(self, rows: slice = slice(None)) -> Callable[[], tuple[tuple[torch.Tensor, ...], tuple]]:
        """Our step on a new copy of the slots in `rows`.

        Each call makes one step and returns the pair and (x, final, slots).
        """
        x, final = (t[rows].clone() for t in self.begin)
        pos, neg = self.pos[rows], self.neg[rows]
        slots = self.slots()[:, rows].contiguous()
        next_slots = torch.empty_like(slots)

        def step():
            nonlocal slots, next_slots
            pair = tdft_step(pos, neg, x, final, slots, next_slots, self.tables, self.rules)
            slots, next_slots = next_slots, slots
            return pair, (x, final, slots)

        return step

    def chain(self, pos, neg, x, final, index, ids, left, by_rows=False, draws=None):
        """One step in eager PyTorch.

        Returns the pair (target, x_s, facts, weight) and the next state (x, final, index, ids,
        left). pos, neg, x and final are (B, ...); index, ids and left (B,). `by_rows` selects the
        way of `eager_by_rows`. `draws` (noise, start noise, s, dropped) take the place of random
        draws.
        """

        def put(mask, into, values):
            """`into`, with `values(rows)` in the rows where the mask is set."""
            if not by_rows:
                return torch.where(column(mask, into), values(...), into)
            rows = mask.nonzero()[:, 0]
            if len(rows):
                into[rows] = values(rows)
            return into

        # The guided DDIM step of every slot.
        batch, grid = len(x), self.tables.timesteps
        t = grid[index + 1]
        a, a_prev = (column(self.alphas_cumprod[at], x) for at in (t, grid[index]))
        pred = pos + ROLLOUT_W * (pos - neg)
        x0 = (x - (1 - a).sqrt() * pred) / a.sqrt()
        moved = a_prev.sqrt() * x0 + (1 - a_prev).sqrt() * pred

        # The pair of each slot's state. At the last grid index there is no s above t, and the
        # previous sample of the slot gives its final x at t = 0.
        at_top = index == TOP
        state, target = (put(at_top, into, lambda rows: final[rows]) for into in (x, x0))
        t, pair_ids = t.masked_fill(at_top, 0), torch.where(at_top, ids - batch, ids)
        first = None
        if draws is not None:
            noise, first, s, dropped = draws
        else:
            noise, s = torch.randn_like(x), t + 1 + (torch.rand(batch, device=x.device) * (999 - t)).long()
            dropped = torch.rand(batch, device=x.device) < DROPOUT
        ratio = column(self.alphas_cumprod[s] / self.alphas_cumprod[t], x)
        x_s = ratio.sqrt() * state + (1 - ratio).sqrt() * noise  # Eq. 16
        row = (self.order[pair_ids % ITEMS] + 1).masked_fill(dropped, 0)
        weight = self.tables.weight[(index + 1).masked_fill(at_top, 0)]
        pair = target, x_s, torch.stack([t, s, pair_ids, row]), weight

        # The next state: slots that have ended keep the final x and start a sample from noise.
        ended = left == 0
        final = put(ended, final, lambda rows: moved[rows])
        x = put(ended, moved, lambda rows: torch.randn_like(moved[rows]) if first is None else first[rows])
        index, left = ((n - 1).masked_fill(ended, TOP) for n in (index, left))
        return pair, (x, final, index, torch.where(ended, ids + batch, ids), left)

    plain = chain

    def stepper(self, chain: Callable, dtype: torch.dtype | None = None, **options) -> Callable:
        """Steps of a new copy of all slots by a function such as `chain`.

        Each call makes one step and returns the pair and the next state. `dtype` is that of the
        network outputs.
        """
        pos, neg = (t.to(dtype or self.torch_dtype) for t in (self.pos, self.neg))
        begin = state = *(t.clone() for t in self.begin), *self.slots()[:3].clone()

        def step(**more):
            nonlocal state
            pair, state = chain(pos, neg, *state, **options, **more)
            return pair, state

        step.begin = begin  # kept: every replay of a captured step reads it again
        return step

    def arms(self) -> dict[str, Callable[[], object]]:
        x, index = self.begin[0], self.slots()[0] + 1
        key = NoiseKey(SEED, self.ids(), draw_id(Draw.RENOISE))
        return {
            "ours": self.our_step(),
            "eager": self.stepper(self.chain),
            "eager_by_rows": self.stepper(self.chain, by_rows=True),
            "ours_noise": lambda: normal(key, self.shape[1:]),
            "ours_step": lambda: guided_step(self.pos, self.neg, x, self.tables.step, index=index),
        }

    def compiled(self) -> Callable[[], object]:
        return self.stepper(self.plain_compiled)

    def draws_of(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise of Eq. 16 and the start noise, each (B, ...), that our op draws."""
        index, ids, left, _ = slots
        at_top, ended = index == TOP, left == 0
        pair_ids, pair_index = torch.where(at_top, ids - self.batch, ids), torch.where(at_top, -1, index)
        start_ids = torch.where(ended, ids + self.batch, ids)
        keys = (Draw.RENOISE, pair_ids, pair_index), (Draw.START_NOISE, start_ids, -1)
        return tuple(
            normal(NoiseKey(SEED, sample_ids, draw_id(kind, i)), self.shape[1:]) for kind, sample_ids, i in keys
        )

    def check(self) -> Iterator[Comparison]:
        """Compares three steps, in which slot 0 ends a sample, starts one and continues it.

        Ours is compared with the reference backend on a few slots, and with eager in float32 on
        all. Both eager arms are compared with eager in float32. Every chain takes the draws of our
        op.
        """
        rows, slots = slice(REFERENCE_ROWS), self.slots()
        ours, reference = self.our_step(), self.our_step(rows)
        exact = self.stepper(self.chain, torch.float32)
        others = {"eager": self.stepper(self.chain), "eager_by_rows": self.stepper(self.chain, by_rows=True)}
        for number in range(3):
            noise, first = self.draws_of(slots)
            pair, (x, final, slots) = ours()
            with backends.use("reference"):
                known, (known_x, known_final, known_slots) = reference()
            # Ours against the reference.
            found = [*pair, x, final, slots]
            for name, tensor, truth in zip(
                (*PAIR, "x", "final", "slots"), found, (*known, known_x, known_final, known_slots), strict=True
            ):
                selected = (slice(None), rows) if name in ("facts", "slots") else rows
                yield Comparison(f"{name} of step {number} (reference)", tensor[selected], truth)

            # Ours and both eager arms against eager in float32, all with the same draws.
            draws = {"draws": (noise, first, pair[2][1], pair[2][3] == 0)}
            truths = self.named(*exact(**draws))
            arms = {"": (pair, (x, final, *slots[:3])), **{name: step(**draws) for name, step in others.items()}}
            for arm, results in arms.items():
                for name, tensor in self.named(*results).items():
                    yield Comparison(f"{arm} {name} of step {number}".strip(), tensor, truths[name], coarse=bool(arm))

    @staticmethod
    def named(pair, state) -> dict[str, torch.Tensor]:
        """The results that all arms share, by name: all except the prompts' rows."""
        target, x_s, facts, weight = pair
        return {"target": target, "x_s": x_s, "facts": facts[:3], "weight": weight} | dict(
            zip(("x", "final", "index", "ids", "left"), state, strict=True)
        )

    def check_compiled(self, compiled) -> Iterator[Comparison]:
        """Compares the first step's results that are not drawn, and the moments of its draws."""
        (target, x_s, facts, weight), (x, *_) = compiled()
        (known, _, known_facts, known_weight), (known_x, *_) = self.stepper(self.chain, torch.float32)()
        yield Comparison("compiled target", target, known, coarse=True)
        yield Comparison("compiled weight", weight, known_weight)
        yield Comparison("compiled t", facts[0], known_facts[0])
        continuing = self.slots()[2] != 0
        if continuing.any():
            yield Comparison("compiled x", x[continuing], known_x[continuing], coarse=True)
        yield from moments("compiled start", x[~continuing])
        # The noise of Eq. 16, solved for.
        ratio = column(self.alphas_cumprod[facts[1]] / self.alphas_cumprod[facts[0]], x_s)
        state = torch.where(column(self.slots()[0] == TOP, x_s), self.begin[1], self.begin[0])
        yield from moments("compiled", (x_s - ratio.sqrt() * state) / (1 - ratio).sqrt())
