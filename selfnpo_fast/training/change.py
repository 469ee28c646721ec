"""How far a negative moves guided predictions: too little, and pictures stay as they are.

Guidance at scale s predicts n + s (p - n). With the negative's n' instead of the base's n it moves
by (1 - s) (n' - n).

Shape letter: B prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from selfnpo_fast.config import LogConfig
from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.guidance.sampler import start_noise
from selfnpo_fast.models import Adapter
from selfnpo_fast.models.base import Conditioning, Predict
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.rollout import Grid
from selfnpo_fast.runtime.console import logger, say_once
from selfnpo_fast.runtime.errors import RunError
from selfnpo_fast.runtime.world import World
from selfnpo_fast.training.engine import StudentEngine
from selfnpo_fast.training.samples import evaluating, noted
from selfnpo_kernels import guided_step

LEAST_CHANGE = 0.01
"""The relative change of guided predictions below which a line warns."""
PROMPTS = 2
"""Prompts that are measured on."""
STEPS = 5
"""Most noise levels that are measured at."""


@dataclass(frozen=True)
class _State:
    """A state on the way of guided sampling with the base, and what the base predicts there."""

    x: torch.Tensor
    """(B, ...) float32."""
    t: torch.Tensor
    """(B,) int64 timesteps."""
    negative: torch.Tensor
    """(B, ...), n: the base's output under the negative branch's prompt."""
    guided: torch.Tensor
    """(B, ...) float32, n + s (p - n)."""


def coarse_steps(schedule: Levels, grid_steps: int) -> int:
    """The steps of a grid that is as coarse as the measurement may be; `grid_steps` is one that
    fits."""
    total = schedule.num_train_timesteps
    return next((steps for steps in range(STEPS, 1, -1) if total % steps == 0), grid_steps)


@torch.no_grad()
def visited(
    predict: Predict, grid: Grid, x: torch.Tensor, rows: Conditioning, negative_rows: Conditioning, scale: float
) -> list[_State]:
    """The states of guided DDIM sampling with one network, from the noisiest on.

    predict          the network
    grid             made for omega = scale - 1
    x                (B, ...) float32, the noise
    rows             (B, ...), the prompts' conditioning rows
    negative_rows    (B, ...), those of the negative branch
    """
    states = []
    for i in range(grid.steps - 1, -1, -1):
        index = torch.full((len(x),), i, device=x.device)
        t = grid.timestep(index)
        p, n = predict(x, t, rows), predict(x, t, negative_rows)
        states.append(_State(x, t, n, n.float() + scale * (p.float() - n.float())))
        x, _ = guided_step(p, n, x, grid.step, index=index + 1)
    return states


@torch.no_grad()
def relative_change(states: list[_State], predict: Predict, negative_rows: Conditioning, scale: float) -> float:
    """The root mean square of how far guided predictions move with another network's negative
    branch, over that of the base's guided predictions."""
    moved = total = torch.zeros((), dtype=torch.float64)
    for state in states:
        n = predict(state.x, state.t, negative_rows).float()
        moved = moved + ((1 - scale) * (n - state.negative.float())).double().square().sum().cpu()
        total = total + state.guided.double().square().sum().cpu()
    return (moved / total).sqrt().item()


class GuidedChange:
    """Measures what the student, as the negative, changes in the guided predictions of a run.

    Rank 0 measures. With ZeRO 3 a forward of the student needs all ranks, which measure the same.
    What goes wrong costs a warning, as with `samples.SampleGrids`.
    """

    def __init__(
        self,
        adapter: Adapter,
        base: Callable[[], Callable],
        engine: StudentEngine,
        table: ConditioningTable,
        log: LogConfig,
        grid_steps: int,
        world: World,
    ) -> None:
        """Nothing is computed yet.

        base          returns the network as it was before training
        engine        the student, which is the negative
        grid_steps    a number of DDIM steps that the model's timesteps can be divided by
        """
        self.adapter, self.base, self.engine, self.table, self.world = adapter, base, engine, table, world
        self.scale, self.same = log.sample_guidance_scale, log.negative_prompt == "same"
        self.steps = coarse_steps(adapter.schedule, grid_steps)
        self._states: list[_State] | None = None
        """Those of the base, which stay the same."""

    def measure(self) -> float | None:
        """The relative change; all ranks take part. None on ranks that do not measure, and where it
        cannot be measured or guidance is off (scale 1)."""
        together = self.engine.stage == 3
        if self.scale == 1 or not (together or self.world.is_main):
            return None
        failures: list[str] = []
        base = change = None
        if self._states is None:
            with noted(failures):
                base = self.base()
        # Where all ranks measure, none begins unless all can.
        if together:
            failures = [line for of_rank in self.world.gather(failures) for line in of_rank]
        if not failures:
            with noted(failures, RunError if together else Exception):
                change = self._change(base)
        for line in failures[:1]:
            say_once(f"how far the negative moves guidance could not be measured: {line}; training goes on")
        return change

    def _change(self, base: Callable | None) -> float:
        count = min(PROMPTS, self.table.prompts)
        index = torch.arange(1, count + 1, device=self.engine.device)
        rows = self.table.gather(index)
        negative_rows = rows if self.same else self.table.empty(count)
        student = self.engine if self.engine.stage == 3 else self.engine.module
        with evaluating(self.engine.module):
            if base is not None:
                grid = Grid.build(self.adapter.schedule, self.steps, self.engine.device, omega=self.scale - 1)
                noise = start_noise(range(count), self.adapter.latent_shape, self.engine.device)
                self._states = visited(self._predict(base), grid, noise, rows, negative_rows, self.scale)
            assert self._states is not None, "they are made once"
            return relative_change(self._states, self._predict(student), negative_rows, self.scale)

    def _predict(self, network: Callable) -> Predict:
        return lambda x, t, cond: self.adapter.predict_level(network, x, t, cond)

    def report(self) -> None:
        """Measure, and log the change in one line; a warning where it is too small to be seen."""
        change = self.measure()
        if change is None or not self.world.is_main:
            return
        text = f"the negative moves guided predictions by {change:.2%} at guidance_scale {self.scale:g}"
        if change < LEAST_CHANGE:
            logger.warning(
                "%s: less than %.0f%%, which is hardly seen in pictures; raise optimizer.lr or updates, or give more "
                "layers in lora.targets where lora.rank is set",
                text, 100 * LEAST_CHANGE,
            )  # fmt: skip
        else:
            logger.info("%s", text)
