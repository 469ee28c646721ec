"""The grid of a rollout: timesteps, coefficients, and how often each mode sees which of them.

A grid index i stands for the timestep grid[i]; index -1 stands for t = 0, the end of every trajectory. Shape letters:
B pairs, N grid steps, T training timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from selfnpo_fast.config import RolloutConfig
from selfnpo_fast.diffusion.schedule import (
    NoiseSchedule,
    ddim_coefficients,
    ddim_grid,
    forward_coefficients,
    renoise_coefficients,
)
from selfnpo_kernels import affine_noise


@dataclass(frozen=True)
class Grid:
    """Timesteps and coefficients of one rollout grid; row i + 1 of a table belongs to grid index i, row 0 to t = 0."""

    schedule: NoiseSchedule
    timesteps: torch.Tensor  # (N + 1,) int64: 0, then the grid in ascending order
    step: torch.Tensor  # (N + 1, 7) float32: guided DDIM steps; row 0 steps nowhere
    start: torch.Tensor  # (N + 1, 2) float32: forward diffusion to the grid
    renoise: torch.Tensor  # (N + 1, T, 2) float32: from x_t (Eq. 16), or from x_{t->0} (Eq. 15), to timestep s
    naive: bool  # whether it is Eq. 15

    @staticmethod
    def check(schedule: NoiseSchedule, grid_steps: int) -> None:
        """UserError where `grid_steps` do not divide the model's timesteps."""
        ddim_grid(schedule.num_train_timesteps, grid_steps)

    @classmethod
    def build(
        cls, schedule: NoiseSchedule, grid_steps: int, device: torch.device, *, omega: float, noising: str = "from_x_t"
    ) -> Grid:
        """The DDIM grid of `grid_steps` steps under guidance omega; the step from grid index 0 ends at timestep 0."""
        zero = torch.zeros(1, dtype=torch.int64)
        timesteps = torch.cat([zero, ddim_grid(schedule.num_train_timesteps, grid_steps)])
        previous = torch.cat([zero, timesteps[:-1]])
        every_s = torch.arange(schedule.num_train_timesteps).expand(grid_steps + 1, -1)
        naive = noising != "from_x_t"
        if naive:
            renoise = forward_coefficients(schedule, every_s)
        else:
            renoise = renoise_coefficients(schedule, timesteps[:, None].expand_as(every_s), every_s)
        tables = (
            ddim_coefficients(schedule, timesteps, previous, omega),
            forward_coefficients(schedule, timesteps),
            renoise,
        )
        return cls(schedule, timesteps.to(device), *(k.float().contiguous().to(device) for k in tables), naive)

    @property
    def steps(self) -> int:
        """N."""
        return len(self.timesteps) - 1

    def timestep(self, index: torch.Tensor) -> torch.Tensor:
        """Timesteps (B,) of grid indices (B,)."""
        return self.timesteps[index + 1]

    def noised(self, x_t: torch.Tensor, target: torch.Tensor, index: torch.Tensor, s: torch.Tensor, noise):
        """x_s (B, ...) for pairs taken at grid `index` (B,), by Eq. 16 from x_t or by Eq. 15 from the target."""
        rows = (index + 1) * self.renoise.shape[1] + s
        return affine_noise(target if self.naive else x_t, self.renoise.flatten(0, 1), noise, index=rows)


def lockstep_frequencies(config: RolloutConfig) -> torch.Tensor:
    """(N + 1,) float64: how often lockstep mode stops at t = 0 (entry 0) and at each grid index i (entry i + 1)."""
    n, k = config.grid_steps, config.max_steps
    out = torch.zeros(n + 1, dtype=torch.float64)
    if config.start == "data":
        starts, step_counts = range(n), [k]
    else:
        starts, step_counts = [n - 1], range(1, k + 1) if config.stop == "uniform" else [k]
    for start in starts:
        for steps in step_counts:
            out[max(start - steps, -1) + 1] += 1
    return out / out.sum()


def continuous_frequencies(config: RolloutConfig) -> torch.Tensor:
    """(N + 1,) float64: how often continuous mode gives a pair at t = 0 (entry 0) and at grid index i (entry i + 1)."""
    out = torch.zeros(config.grid_steps + 1, dtype=torch.float64)
    for _, index, _ in life_states(config):
        # From noise, the state at the last grid index has no s above it; the finished x at t = 0 takes its place.
        out[0 if index == config.grid_steps - 1 else index + 1] += 1
    return out / out.sum()


def life_states(config: RolloutConfig) -> list[tuple[int, int, int]]:
    """Every (start index, grid index, states left after this one) of a slot; all are equally frequent."""
    n = config.grid_steps
    if config.start == "noise":
        return [(n - 1, i, i) for i in range(n)]
    # The last grid index has no s above it, so data starts below it; t = 0 is a state like any other.
    ends = {start: max(start - config.max_steps, -1) for start in range(n - 1)}
    return [(start, i, i - end) for start, end in ends.items() for i in range(start, end - 1, -1)]
