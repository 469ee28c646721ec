"""The grid of a rollout: its timesteps, its coefficients, and how often each mode visits them.

A grid index i stands for the timestep grid[i]. Index -1 stands for t = 0, the end of every
trajectory.

Shape letters: B pairs, N grid steps, T training timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from selfnpo_fast.config import RolloutConfig
from selfnpo_fast.diffusion.levels import (
    Levels,
    ddim_coefficients,
    forward_coefficients,
    renoise_coefficients,
)
from selfnpo_fast.runtime.errors import UserError
from selfnpo_kernels import NoiseKey, affine_noise


@dataclass(frozen=True)
class Grid:
    """Timesteps and coefficients of one rollout grid, as tables on the device.

    Row i + 1 of a table belongs to grid index i, and row 0 to t = 0.
    """

    schedule: Levels
    """The noise levels from which the tables were computed."""
    timesteps: torch.Tensor
    """(N + 1,) int64: 0, then the grid in ascending order."""
    step: torch.Tensor
    """(N + 1, 8) float32: the coefficients of guided DDIM steps. Row 0 stays at t = 0."""
    start: torch.Tensor
    """(N + 1, 2) float32: forward diffusion from x_0 to the grid."""
    renoise: torch.Tensor
    """(N + 1, T, 2) float32: noising to timestep s, from x_t (Eq. 16) or x_{t->0} (Eq. 15)."""
    naive: bool
    """Whether `renoise` is made for Eq. 15."""
    moved: torch.Tensor | None = None
    """(N + 1, T) int64: the s that each uniformly drawn s stands for (`moved_levels`); None where a
    drawn s is what it says."""
    drawn_above: torch.Tensor | None = None
    """(N + 1,) int64: s is drawn from {drawn_above + 1, ..., T - 1}; None where that is above t."""
    without_s: torch.Tensor | None = None
    """(N + 1,) bool: states with no s above them that a pair may have, whose pairs weigh 0; None
    where a pair may have any s."""

    @staticmethod
    def check(schedule: Levels, grid_steps: int) -> None:
        """Raises UserError where `grid_steps` does not divide the model's timesteps."""
        schedule.grid(grid_steps)

    @classmethod
    def build(
        cls,
        schedule: Levels,
        grid_steps: int,
        device: torch.device,
        *,
        omega: float,
        noising: str = "from_x_t",
        s_shift: float = 1.0,
        levels: range | None = None,
    ) -> Grid:
        """The DDIM grid of `grid_steps` steps under guidance `omega`, with its tables on `device`.

        The step from grid index 0 ends at timestep 0. `noising` is from_x_t (Eq. 16) or naive
        (Eq. 15); `s_shift` is the config's. `levels` are the s that pairs may have, by default all.
        Raises UserError where `grid_steps` does not divide the model's timesteps.
        """
        zero = torch.zeros(1, dtype=torch.int64)
        timesteps = torch.cat([zero, schedule.grid(grid_steps)])
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
        count = schedule.num_train_timesteps
        extra: dict[str, torch.Tensor] = {}
        if levels not in (None, range(count)):
            extra = {"drawn_above": drawn_above(timesteps, count, levels), "without_s": timesteps + 1 >= levels.stop}
        if extra or s_shift != 1:
            extra["moved"] = moved_levels(timesteps, count, s_shift, levels)
        tables = tuple(k.float().contiguous().to(device) for k in tables)
        extra = {name: table.to(device) for name, table in extra.items()}
        return cls(schedule, timesteps.to(device), *tables, naive, **extra)

    @property
    def steps(self) -> int:
        """N."""
        return len(self.timesteps) - 1

    def timestep(self, index: torch.Tensor) -> torch.Tensor:
        """Timesteps (B,) int64 of grid indices (B,)."""
        return self.timesteps[index + 1]

    @property
    def draws_above(self) -> torch.Tensor:
        """(N + 1,) int64: s is drawn uniformly from what is above these, for a state of each row."""
        return self.timesteps if self.drawn_above is None else self.drawn_above

    def level_of(self, index: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """s (B,) int64 of pairs whose states are at grid indices `index` (B,), where `drawn` (B,) is
        uniform in {draws_above + 1, ..., T - 1}."""
        return drawn if self.moved is None else self.moved[index + 1, drawn]

    def drawn_renoise(self) -> torch.Tensor:
        """`renoise` by the drawn s instead of the s that it stands for."""
        if self.moved is None:
            return self.renoise
        return self.renoise.gather(1, self.moved[..., None].expand_as(self.renoise))

    def noised(
        self,
        x_t: torch.Tensor,
        target: torch.Tensor,
        index: torch.Tensor,
        s: torch.Tensor,
        noise: torch.Tensor | NoiseKey,
    ) -> torch.Tensor:
        """x_s (B, ...) of pairs: by Eq. 16 from x_t, or by Eq. 15 from the target.

        x_t, target    (B, ...)
        index          (B,) int64, the grid indices of x_t
        s              (B,) int64, the timesteps of the results
        noise          (B, ...), or its key
        """
        flat_index = (index + 1) * self.renoise.shape[1] + s
        return affine_noise(target if self.naive else x_t, self.renoise.flatten(0, 1), noise, index=flat_index)


def _ranges(timesteps: torch.Tensor, count: int, levels: range | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest s (N + 1,) of a state at each of the timesteps (N + 1,): those of
    `levels` above it, or where there is none all that are above it."""
    first, last = timesteps + 1, torch.full_like(timesteps, count - 1)
    if levels is None:
        return first, last
    some = first < levels.stop
    return torch.where(some, first.clamp(min=levels.start), first), torch.where(some, levels.stop - 1, last)


def drawn_above(timesteps: torch.Tensor, count: int, levels: range) -> torch.Tensor:
    """`Grid.drawn_above` for the s in `levels`, of the `count` levels: as many are drawn from as
    there are s above a state."""
    first, last = _ranges(timesteps, count, levels)
    return count - 1 - (last - first + 1)


def moved_levels(timesteps: torch.Tensor, count: int, shift: float, levels: range | None = None) -> torch.Tensor:
    """The s that each uniformly drawn s stands for under `rollout.s_shift`, (N + 1, T) int64.

    A share u of the T = `count` levels becomes f(u) = shift u / (1 + (shift - 1) u), which is how flow
    schedulers shift sigma. From the state at level t, s has the distribution of f(u) above the share
    of t, for a uniform u: the levels t + 1, ..., T - 1 stay the range, and a shift of 1 changes
    nothing. With `levels`, s is one of those of them that are above t, if there are any; with a shift
    of 1 each is as likely as the others. Entries of what is never drawn stay as they are.

    timesteps    (N + 1,) int64, those of the grid
    """
    drawn = torch.arange(count).expand(len(timesteps), -1)
    first, last = (bound[:, None] for bound in _ranges(timesteps, count, levels))
    above = count - 1 - (last - first + 1)

    def inverse(share: torch.Tensor) -> torch.Tensor:
        return share / (shift - (shift - 1) * share)

    lowest, highest = inverse(first.double() / count), inverse((last.double() + 1) / count)
    # The middle of each of the equal parts of the range.
    part = (drawn - above - 0.5) / (last - first + 1).clamp(min=1)
    u = lowest + (highest - lowest) * part
    s = (count * shift * u / (1 + (shift - 1) * u)).ceil().long() - 1
    s = torch.minimum(torch.maximum(s, first), last)
    return torch.where(drawn > above, s, drawn)


def pair_weights(config: RolloutConfig, grid: Grid) -> tuple[torch.Tensor, float]:
    """The weight of a pair at each grid index, and the share of pairs that weigh 0 since no s is
    above their states.

    (N + 1,) float64: entry 0 is t = 0, and entry i + 1 is grid index i. The mean over all pairs is 1.
    Raises UserError where all of them weigh 0.
    """
    lockstep = config.mode == "lockstep"
    frequencies = lockstep_frequencies(config) if lockstep else continuous_frequencies(config)
    weight = torch.ones(config.grid_steps + 1, dtype=torch.float64)
    if config.pair_weight == "lockstep":
        ratio = lockstep_frequencies(config) / frequencies.clamp(min=1e-12)
        weight = torch.where(frequencies > 0, ratio, 0)
    if grid.without_s is None:
        return weight, 0.0
    without = grid.without_s.cpu()
    weight = torch.where(without, 0, weight)
    mean = (frequencies * weight).sum()
    if not mean > 0:
        raise UserError(
            "model.expert: low learns nothing of these rollouts: all their pairs are at noise levels of the other "
            "expert; give a larger rollout.k, or rollout.mode continuous"
        )
    return weight / mean, (frequencies * without).sum().item()


def lockstep_frequencies(config: RolloutConfig) -> torch.Tensor:
    """How often lockstep rollouts stop at each grid index, as shares that sum to 1.

    (N + 1,) float64: entry 0 is t = 0, and entry i + 1 is grid index i.
    """
    n, k = config.grid_steps, config.max_steps
    counts = torch.zeros(n + 1, dtype=torch.float64)
    if config.start == "data":
        starts, step_counts = range(n), [k]
    else:
        starts, step_counts = [n - 1], range(1, k + 1) if config.stop == "uniform" else [k]
    for start in starts:
        for steps in step_counts:
            counts[max(start - steps, -1) + 1] += 1
    return counts / counts.sum()


def continuous_frequencies(config: RolloutConfig) -> torch.Tensor:
    """How often continuous rollouts give a pair at each grid index, as shares that sum to 1.

    (N + 1,) float64: entry 0 is t = 0, and entry i + 1 is grid index i.
    """
    counts = torch.zeros(config.grid_steps + 1, dtype=torch.float64)
    for _, index, _ in life_states(config):
        # From noise, the state at the last grid index has no s above it: the pair at t = 0 of the
        # sample before replaces it.
        counts[0 if index == config.grid_steps - 1 else index + 1] += 1
    return counts / counts.sum()


def life_states(config: RolloutConfig) -> list[tuple[int, int, int]]:
    """Every state that a slot of a continuous rollout can be in; all are equally frequent.

    A state is (start index of the sample, present grid index, states left after this one).
    """
    n = config.grid_steps
    if config.start == "noise":
        return [(n - 1, i, i) for i in range(n)]
    # The last grid index has no s above it, so data starts below it. t = 0 is a state like others.
    ends = {start: max(start - config.max_steps, -1) for start in range(n - 1)}
    return [(start, i, i - end) for start, end in ends.items() for i in range(start, end - 1, -1)]
