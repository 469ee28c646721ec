"""Noise schedules, timestep grids and coefficients of steps; pure functions in float64.

x_t = alpha_t x_0 + sigma_t eps with alpha^2 + sigma^2 = 1. Every prediction type is linear in the
state x and the raw network output p, so x0 = k0 x + k1 p, and a DDIM step is x_next = k2 x + k3 p.
These functions compute the coefficients once; later they are gathered by timestep or grid index.
The docstring of `selfnpo_fast.diffusion` tells which paper equation numbers belong to.

Shape letters: T training timesteps, N grid steps, n timesteps of one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from selfnpo_fast.diffusion.predictions import output_as_x0_eps
from selfnpo_fast.runtime.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels of a model and its prediction type.

    Raises UserError for a prediction type that is unknown, or that leaves x0 undetermined at the
    last timestep.
    """

    alphas_cumprod: torch.Tensor
    """(T,) float64: alpha_t^2."""
    prediction_type: str
    """What the network predicts: epsilon, v_prediction or sample."""

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"prediction_type: {self.prediction_type!r} is not supported; expected one of "
                f"{', '.join(PREDICTION_TYPES)}"
            )
        if self.prediction_type == "epsilon" and self.alphas_cumprod[-1] == 0:
            raise UserError(
                "prediction_type: 'epsilon' says nothing about x0 at zero terminal SNR; use a v_prediction model"
            )

    @classmethod
    def from_scheduler(cls, scheduler) -> NoiseSchedule:
        """The schedule of a diffusers scheduler, with its beta options.

        Raises UserError for a scheduler without alphas_cumprod.
        """
        if not hasattr(scheduler, "alphas_cumprod"):
            raise UserError(
                f"scheduler: {type(scheduler).__name__} has no alphas_cumprod; expected a DDPM-style noise schedule"
            )
        return cls(scheduler.alphas_cumprod.detach().double().cpu(), scheduler.config.prediction_type)

    def check(self) -> None:
        """ValueError where a level is no number from 0 to 1."""
        if not ((self.alphas_cumprod >= 0) & (self.alphas_cumprod <= 1)).all():  # also where one is not a number
            raise ValueError("its betas give an alphas_cumprod outside of 0 to 1")

    def to(self, device: torch.device) -> NoiseSchedule:
        """The same schedule on `device`, where its coefficients are then computed."""
        return NoiseSchedule(self.alphas_cumprod.to(device), self.prediction_type)

    @property
    def num_train_timesteps(self) -> int:
        """The number T of training timesteps, usually 1000."""
        return len(self.alphas_cumprod)

    def alpha_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t, float64, for int64 timesteps of any shape."""
        a = self.alphas_cumprod[t]
        return a.sqrt(), (1 - a).sqrt()


def ddim_grid(num_train_timesteps: int, grid_steps: int) -> torch.Tensor:
    """The timesteps of a DDIM grid in ascending order, (N,) int64: 39, 79, ..., 999 for N = 25.

    Raises UserError unless N divides T, since the last grid timestep has to be the noisiest one.
    """
    if grid_steps < 1 or num_train_timesteps % grid_steps:
        raise UserError(
            f"rollout.grid_steps: {grid_steps} does not divide the model's {num_train_timesteps} timesteps; "
            "try 10, 20, 25, 40 or 50"
        )
    return torch.arange(1, grid_steps + 1) * (num_train_timesteps // grid_steps) - 1


def _output_as_x0_eps(schedule: NoiseSchedule, t: torch.Tensor) -> torch.Tensor:
    """(n, 4) float64 for timesteps t (n,): x0 = c0 x_t + c1 p and eps = c2 x_t + c3 p."""
    return output_as_x0_eps(schedule.prediction_type, *schedule.alpha_sigma(t))


def x0_coefficients(schedule: NoiseSchedule, t: torch.Tensor) -> torch.Tensor:
    """(n, 2) float64 for timesteps t (n,): x0 = k0 x_t + k1 p, Tweedie's estimate (Eq. 2, 12)."""
    return _output_as_x0_eps(schedule, t)[:, :2]


def ddim_coefficients(schedule: NoiseSchedule, t: torch.Tensor, t_prev: torch.Tensor, w: float = 0.0) -> torch.Tensor:
    """(n, 8) float64 for steps from timesteps t (n,) to t_prev (n,): rows of `guided_step`.

    k0 and k1 give x0 as in `x0_coefficients`. k2 and k3 give the DDIM step without noise (eta = 0),
    x_{t_prev} = k2 x_t + k3 p. The entry after k5 is w. k4, k5 and k7, for x0_prev, noise and
    x0_prev2, are 0.
    """
    c0, c1, c2, c3 = _output_as_x0_eps(schedule, t).unbind(-1)
    alpha, sigma = schedule.alpha_sigma(t_prev)
    zero = torch.zeros_like(alpha)
    return torch.stack([c0, c1, alpha * c0 + sigma * c2, alpha * c1 + sigma * c3, zero, zero, zero + w, zero], dim=-1)


def forward_coefficients(schedule: NoiseSchedule, t: torch.Tensor) -> torch.Tensor:
    """(..., 2) float64 for timesteps t (...): x_t = k0 x_0 + k1 noise.

    With Tweedie's estimate for x_0 this is Eq. 15.
    """
    return torch.stack(schedule.alpha_sigma(t), dim=-1)


def renoise_coefficients(schedule: NoiseSchedule, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """(..., 2) float64 for timesteps t and s of one shape (...): x_s = k0 x_t + k1 noise (Eq. 16).

    Entries are 0 where s <= t, since adding noise does not lead to a lower noise level. Elsewhere
    alpha_t is not 0, since t is not the last timestep.
    """
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    ratio = torch.where(s > t, alpha_s / alpha_t, 0)
    added = (sigma_s.square() - (sigma_t * ratio).square()).clamp(min=0).sqrt()
    return torch.stack([ratio, torch.where(s > t, added, 0)], dim=-1)
