"""Trajectories from noise to latents: static buffers for one shape, and steps that can be captured.

Shape letters: B pictures of a batch, n solver steps.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from selfnpo_fast.diffusion.solvers import SolverSteps
from selfnpo_fast.guidance.branches import Branches, halves
from selfnpo_fast.models.base import Conditioning
from selfnpo_fast.models.size import Size
from selfnpo_fast.runtime.batch_or_split import BatchOrSplit
from selfnpo_fast.runtime.capture import Capture, Step, no_capture
from selfnpo_kernels import Draw, NoiseKey, draw_id, guidance_rescale, guided_step
from selfnpo_kernels.schemas import STEP_COLUMNS


class Trajectory:
    """The buffers of one shape, and its steps, with and without the negative branch."""

    def __init__(
        self,
        branches: Branches,
        choice: str,
        capture: Capture,
        x: torch.Tensor,
        rows: Conditioning,
        solver: SolverSteps,
        rescale: float,
        most_steps: int,
        size: Size,
    ) -> None:
        """Allocates buffers like x and rows, without their values.

        `choice` is one of `BRANCHES`, `rescale` is diffusers' guidance_rescale, `size` that of the
        states. Of `solver` only
        what its steps need besides x and p counts: the x0 of the steps before, and noise.

        Shapes:
        - x: (B, ...) float32.
        - rows: (2 B, ...) in the network's dtype.
        """
        self.branches, self.rescale, self.size = branches, rescale, size
        self.adds_noise, self.x = solver.adds_noise, torch.empty_like(x)
        # The x0 of the step before, and of two steps before.
        self.previous = {
            name: torch.zeros_like(x)
            for name, kept in (("x0_prev", solver.keeps_x0), ("x0_prev2", solver.keeps_two_x0))
            if kept
        }
        self.rows = {name: torch.empty_like(value) for name, value in rows.items()}
        self.index = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.seeds = torch.zeros_like(self.index)
        # As long as the longest trajectory, so that one captured step serves all lengths.
        self.k = torch.zeros(most_steps, STEP_COLUMNS, device=x.device)
        # float32 for every solver, since networks embed timesteps in float32.
        self.timesteps = torch.zeros(most_steps, device=x.device)
        self.batched = BatchOrSplit(choice if branches.one_network else "split", f"{len(x)} x {tuple(x.shape[1:])}")
        self._capture = capture
        self._captured: dict[bool, Step] = {}

    def begin(self, x: torch.Tensor, rows: Conditioning, solver: SolverSteps, seeds: torch.Tensor) -> None:
        """Start a trajectory.

        Shapes:
        - x: (B, ...) float32, the noise.
        - seeds: (B,) int64, the pictures' own: they key the noise of stochastic steps.
        - rows: (2 B, ...), the negative branch's conditioning rows, then the prompts'.
        """
        self.x.copy_(x)
        for x0 in self.previous.values():
            x0.zero_()
        for name, value in rows.items():
            self.rows[name].copy_(value)
        self.index.zero_()
        self.seeds.copy_(seeds)
        n = len(solver.k)
        self.k[:n].copy_(solver.k)
        self.timesteps[:n].copy_(solver.timesteps)

    def step(self, guided: bool) -> None:
        """One solver step of all pictures, captured once it is decided how the branches run."""
        if guided and not self.batched.decided:
            self.batched.run(lambda batched: self._step(True, batched), self.x.device)
            return
        if guided not in self._captured:
            state = (self.x, *self.previous.values(), self.index)
            self._captured[guided] = self._capture(lambda: self._step(guided, bool(self.batched.batched)), state)
        self._captured[guided]()

    def release(self) -> None:
        """Drop the captured steps.

        They refer back to this object: its buffers, and the graphs' memory, would stay until
        Python's next full collection.
        """
        self._captured.clear()

    def _step(self, guided: bool, batched: bool) -> tuple:
        """The step itself, which reads and overwrites buffers only."""
        neg: torch.Tensor | None
        scale: torch.Tensor | None
        t, scale = self.timesteps[self.index], None
        if guided:
            pos, neg = self.branches.both(self.x, t, self.rows, batched, self.size)
            if self.rescale:
                scale = guidance_rescale(pos, neg, self.k, self.rescale, index=self.index)
        else:
            pos, neg = self.branches.single(self.x, t, halves(self.rows)[1], self.size), None
        noise = NoiseKey(0, self.seeds, draw_id(Draw.SAMPLE, self.index)) if self.adds_noise else None
        x, x0 = guided_step(pos, neg, self.x, self.k, index=self.index, scale=scale, noise=noise, **self.previous)
        self.x.copy_(x)
        if "x0_prev2" in self.previous:
            self.previous["x0_prev2"].copy_(self.previous["x0_prev"])
        if "x0_prev" in self.previous:
            self.previous["x0_prev"].copy_(x0)
        self.index.add_(1)
        return ()


class Trajectories:
    """The trajectories of the shapes that were used last, at most `most` of them."""

    def __init__(self, branches: Branches, choice: str, capture: Capture, *, most: int, most_steps: int) -> None:
        self.branches, self.choice, self.capture = branches, choice, capture
        self.most, self.most_steps = most, most_steps
        self._by_shape: OrderedDict[tuple, Trajectory] = OrderedDict()
        self._addresses: tuple[int, ...] | None = None

    def follow(self) -> None:
        """Drop all trajectories where the networks are no longer where captured steps read them."""
        if self.capture is no_capture:
            return  # nothing is read at an address; and under ZeRO 3 weights have none
        addresses = self.branches.addresses()
        if self._addresses not in (None, addresses):
            self.clear()
        self._addresses = addresses

    def of(self, x: torch.Tensor, rows: Conditioning, solver: SolverSteps, rescale: float, size: Size) -> Trajectory:
        """The trajectory for states (B, ...) and rows (2 B, ...) of these shapes, and of a size.

        A new one evicts the one that was used longest ago.
        """
        shapes = tuple((name, tuple(value.shape)) for name, value in sorted(rows.items()))
        key = (tuple(x.shape), shapes, solver.keeps_x0, solver.keeps_two_x0, solver.adds_noise, rescale, size)
        trajectory = self._by_shape.pop(key, None)
        if trajectory is None:
            while len(self._by_shape) >= self.most:
                self._by_shape.popitem(last=False)[1].release()
            trajectory = Trajectory(
                self.branches, self.choice, self.capture, x, rows, solver, rescale, self.most_steps, size
            )
        self._by_shape[key] = trajectory
        return trajectory

    def __len__(self) -> int:
        return len(self._by_shape)

    def clear(self) -> None:
        """Drop all trajectories."""
        for trajectory in self._by_shape.values():
            trajectory.release()
        self._by_shape.clear()
