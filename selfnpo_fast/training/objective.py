"""From a training pair to the student's loss (Eq. 17)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from selfnpo_fast.config import LossConfig
from selfnpo_fast.diffusion.schedule import NoiseSchedule, x0_coefficients
from selfnpo_kernels import x0_loss


@dataclass(frozen=True)
class Objective:
    """The loss of one run; `k` (T, 2) float32 turns the student's output at timestep s into its x0."""

    kind: str
    c: float
    k: torch.Tensor

    @classmethod
    def build(cls, config: LossConfig, schedule: NoiseSchedule, device: torch.device) -> Objective:
        """Reads the parameterisation from the schedule."""
        k = x0_coefficients(schedule, torch.arange(schedule.num_train_timesteps))
        return cls(config.kind, config.c, k.float().to(device))

    def __call__(
        self, pred: torch.Tensor, x_s: torch.Tensor, s: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted mean loss (scalar, with gradient) and the loss per pair (B,) for raw outputs pred (B, ...)."""
        return x0_loss(pred, x_s, target, self.k, self.kind, weight, self.c, index=s)
