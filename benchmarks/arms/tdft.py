"""The arms of `tdft_step` in `bench_ops.py`: ours, and the same step in eager PyTorch.

The step's formulas are written as the authors write theirs; continuous slots are ours alone, and there are two ways to
restart those that have ended. `eager` works on the whole batch with masks: a fresh start noise is drawn for all slots
and taken by those. `eager_by_rows` asks the host which slots they are and draws for them alone: less work, but a GPU
has to be waited for in every step, and torch.compile cannot take it. `ours_noise` and `ours_step` say what our own time
goes into: the normals of Eq. 16 alone, and the guided step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.arms.ops import GRID_STEPS, REFERENCE_ROWS, SEED, Comparison, Op, column, compile_plain, moments
from selfnpo_fast.rollout import Grid
from selfnpo_kernels import Draw, NoiseKey, TdftRules, TdftTables, backends, draw_id, guided_step, normal, tdft_step

ROLLOUT_W = -5.0  # the authors' for SDXL; both branches are live
DROPOUT = 0.1
ITEMS = 2333
TOP = GRID_STEPS - 1
PAIR = ("target", "x_s", "facts", "weight")


class TdftStep(Op):
    """`tdft_step` from noise, both branches live, slots spread over the grid."""

    training = True

    def build(self) -> None:
        self.pos, self.neg = self.random(self.low), self.random(self.low)
        self.cycle = GRID_STEPS if self.batch < GRID_STEPS else 1  # with few slots a step may end none
        grid = Grid.build(self.schedule, GRID_STEPS, self.device, omega=ROLLOUT_W)
        weight = torch.linspace(0.5, 1.5, GRID_STEPS + 1, device=self.device)
        self.tables = TdftTables(
            step=grid.step, start=grid.start, renoise=grid.renoise, timesteps=grid.timesteps, weight=weight
        )
        self.rules = TdftRules(num_prompts=ITEMS, stride=self.batch, max_steps=GRID_STEPS, seed=SEED, dropout=DROPOUT)
        self.order = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(0)).to(self.device)
        self.begin = self.random(torch.float32), self.random(torch.float32)

    def slots(self) -> torch.Tensor:
        """(4, B): slots spread over the grid, the first at its last step."""
        index = torch.arange(self.batch, device=self.device) * GRID_STEPS // self.batch
        return torch.stack([index, self.ids(), index, torch.ones_like(index)])

    def our_step(self, rows: slice = slice(None)) -> Callable[[], tuple[tuple[torch.Tensor, ...], tuple]]:
        """Steps of a new copy of the first slots: each call returns the pair and (x, final, slots)."""
        x, final = (t[rows].clone() for t in self.begin)
        pos, neg = self.pos[rows], self.neg[rows]
        slots = self.slots()[:, rows].contiguous()
        after = torch.empty_like(slots)

        def step():
            nonlocal slots, after
            pair = tdft_step(pos, neg, x, final, slots, after, self.tables, self.rules)
            slots, after = after, slots
            return pair, (x, final, slots)

        return step

    def chain(self, pos, neg, x, final, index, ids, left, by_rows=False, draws=None):
        """One step: the pair (target, x_s, facts, weight) and the next state (x, final, index, ids, left).

        `draws` are (noise, start noise, s, dropped) instead of fresh ones.
        """

        def put(mask, into, values):
            if not by_rows:
                return torch.where(column(mask, into), values(...), into)
            rows = mask.nonzero()[:, 0]
            if len(rows):
                into[rows] = values(rows)
            return into

        batch, grid = len(x), self.tables.timesteps
        t = grid[index + 1]
        a, a_prev = (column(self.alphas_cumprod[at], x) for at in (t, grid[index]))
        pred = pos + ROLLOUT_W * (pos - neg)
        x0 = (x - (1 - a).sqrt() * pred) / a.sqrt()
        moved = a_prev.sqrt() * x0 + (1 - a_prev).sqrt() * pred

        no_room = index == TOP
        state, target = (put(no_room, into, lambda rows: final[rows]) for into in (x, x0))
        t, pair_ids = torch.where(no_room, 0, t), torch.where(no_room, ids - batch, ids)
        first = None
        if draws is not None:
            noise, first, s, dropped = draws
        else:
            noise, s = torch.randn_like(x), t + 1 + (torch.rand(batch, device=x.device) * (999 - t)).long()
            dropped = torch.rand(batch, device=x.device) < DROPOUT
        ratio = column(self.alphas_cumprod[s] / self.alphas_cumprod[t], x)
        x_s = ratio.sqrt() * state + (1 - ratio).sqrt() * noise  # Eq. 16
        row = torch.where(dropped, 0, self.order[pair_ids % ITEMS] + 1)
        pair = target, x_s, torch.stack([t, s, pair_ids, row]), self.tables.weight[torch.where(no_room, 0, index + 1)]

        ended = left == 0
        final = put(ended, final, lambda rows: moved[rows])
        x = put(ended, moved, lambda rows: torch.randn_like(moved[rows]) if first is None else first[rows])
        index, left = torch.where(ended, TOP, index - 1), torch.where(ended, TOP, left - 1)
        return pair, (x, final, index, torch.where(ended, ids + batch, ids), left)

    def stepper(self, chain: Callable, dtype: torch.dtype | None = None, **options) -> Callable:
        """Steps of a new copy of all slots by a chain: each call returns the pair and the next state."""
        pos, neg = (t.to(dtype or self.low) for t in (self.pos, self.neg))
        state = *(t.clone() for t in self.begin), *self.slots()[:3].clone()

        def step(**more):
            nonlocal state
            pair, state = chain(pos, neg, *state, **options, **more)
            return pair, state

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
        return self.stepper(compile_plain(self.chain, self.device))

    def draws_of(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise of Eq. 16 and the start noise that our op draws from these slots."""
        index, ids, left, _ = slots
        no_room, ended = index == TOP, left == 0
        pair_ids, at = torch.where(no_room, ids - self.batch, ids), torch.where(no_room, -1, index)
        keys = (Draw.RENOISE, pair_ids, at), (Draw.START_NOISE, torch.where(ended, ids + self.batch, ids), -1)
        return tuple(normal(NoiseKey(SEED, who, draw_id(kind, i)), self.shape[1:]) for kind, who, i in keys)

    def check(self) -> Iterator[Comparison]:
        """Three steps, in which slot 0 ends, begins and goes on: every chain with our draws, and the reference."""
        rows, slots = slice(REFERENCE_ROWS), self.slots()
        ours, reference = self.our_step(), self.our_step(rows)
        exact = self.stepper(self.chain, torch.float32)
        others = {"eager": self.stepper(self.chain), "eager_by_rows": self.stepper(self.chain, by_rows=True)}
        for number in range(3):
            noise, first = self.draws_of(slots)
            pair, (x, final, slots) = ours()
            with backends.use("reference"):
                known, (known_x, known_final, known_slots) = reference()
            found = [*pair, x, final, slots]
            for name, tensor, truth in zip(
                (*PAIR, "x", "final", "slots"), found, (*known, known_x, known_final, known_slots), strict=True
            ):
                some = (slice(None), rows) if name in ("facts", "slots") else rows
                yield Comparison(f"{name} of step {number} (reference)", tensor[some], truth)

            draws = {"draws": (noise, first, pair[2][1], pair[2][3] == 0)}
            right = self.named(*exact(**draws))
            for who, arm in {"": (pair, (x, final, *slots[:3])), **{k: v(**draws) for k, v in others.items()}}.items():
                for name, tensor in self.named(*arm).items():
                    yield Comparison(f"{who} {name} of step {number}".strip(), tensor, right[name], coarse=bool(who))

    @staticmethod
    def named(pair, state) -> dict[str, torch.Tensor]:
        """What all chains have in common; the prompts' order is ours alone."""
        target, x_s, facts, weight = pair
        return {"target": target, "x_s": x_s, "facts": facts[:3], "weight": weight} | dict(
            zip(("x", "final", "index", "ids", "left"), state, strict=True)
        )

    def check_compiled(self, compiled) -> Iterator[Comparison]:
        """Its first step: what is not drawn, and the moments of what is."""
        (target, x_s, facts, weight), (x, *_) = compiled()
        (known, _, known_facts, known_weight), (known_x, *_) = self.stepper(self.chain, torch.float32)()
        yield Comparison("compiled target", target, known, coarse=True)
        yield Comparison("compiled weight", weight, known_weight)
        yield Comparison("compiled t", facts[0], known_facts[0])
        going = self.slots()[2] != 0
        if going.any():
            yield Comparison("compiled x", x[going], known_x[going], coarse=True)
        yield from moments("compiled start", x[~going])
        ratio = column(self.alphas_cumprod[facts[1]] / self.alphas_cumprod[facts[0]], x_s)
        state = torch.where(column(self.slots()[0] == TOP, x_s), self.begin[1], self.begin[0])
        yield from moments("compiled", (x_s - ratio.sqrt() * state) / (1 - ratio).sqrt())
