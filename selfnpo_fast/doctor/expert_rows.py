"""How many samples the student of a model of two experts computes."""

from __future__ import annotations

import torch

from selfnpo_fast.config import RolloutConfig
from selfnpo_fast.models import Adapter
from selfnpo_fast.rollout.grid import Grid, continuous_frequencies, lockstep_frequencies, pair_weights


def rows_per_pair(adapter: Adapter, rollout: RolloutConfig, micro_batch: int) -> float:
    """Expected samples that the student computes for a pair; 1 for a model with one denoiser.

    Pairs that weigh 0 are not computed. A trained expert that no pair of a micro-batch belongs to
    computes one sample (`experts.Experts.forward`). Raises UserError where no pair counts.
    """
    if adapter.boundary is None:
        return 1.0
    options = {"omega": rollout.omega, "s_shift": rollout.s_shift, "levels": adapter.trained_levels}
    grid = Grid.build(adapter.schedule, rollout.grid_steps, torch.device("cpu"), **options)
    _, lost = pair_weights(rollout, grid)
    if len(adapter.trained_denoisers) == 1:
        return 1 - lost + lost**micro_batch / micro_batch
    first = _share_of_first(adapter, rollout, grid)
    return 1 + (first**micro_batch + (1 - first) ** micro_batch) / micro_batch


def _share_of_first(adapter: Adapter, rollout: RolloutConfig, grid: Grid) -> float:
    """The share of pairs whose s the expert of high noise owns."""
    frequencies = (lockstep_frequencies if rollout.mode == "lockstep" else continuous_frequencies)(rollout)
    total = grid.schedule.num_train_timesteps
    share = 0.0
    for row, frequency in enumerate(frequencies.tolist()):
        if frequency:
            drawn = torch.arange(int(grid.draws_above[row]) + 1, total)
            share += (
                frequency * (adapter.expert(grid.level_of(torch.tensor(row - 1), drawn)) == 0).double().mean().item()
            )
    return share
