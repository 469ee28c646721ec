"""The loss of a training pair (Eq. 17).

Shape letters: B pairs of one micro-batch, T training timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from selfnpo_fast.config import LossConfig
from selfnpo_fast.diffusion.levels import Levels, x0_coefficients
from selfnpo_kernels import x0_loss


@dataclass(frozen=True)
class Objective:
    """The loss of one run."""

    kind: str
    """`l2` (Eq. 17) or `huber`, its pseudo-Huber form."""
    c: float
    """The constant of the pseudo-Huber form."""
    k: torch.Tensor
    """(T, 2) float32: x0 = k0 x_s + k1 output, for the student's output at timestep s."""

    @classmethod
    def build(cls, config: LossConfig, schedule: Levels, device: torch.device) -> Objective:
        """The loss of a config; the schedule says what the student's output stands for."""
        k = x0_coefficients(schedule, torch.arange(schedule.num_train_timesteps))
        return cls(config.kind, config.c, k.float().to(device))

    def __call__(
        self, pred: torch.Tensor, x_s: torch.Tensor, s: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted mean loss, a scalar with gradient, and the loss of each pair (B,).

        pred           (B, ...), the student's raw output at x_s and s
        x_s, target    (B, ...)
        s              (B,) int64
        weight         (B,) float32
        """
        return x0_loss(pred, x_s, target, self.k, self.kind, weight, self.c, index=s)
