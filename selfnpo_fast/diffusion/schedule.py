"""Noise schedules, timestep grids and solver coefficients; pure functions in float64.

x_t = alpha_t x_0 + sigma_t eps with alpha^2 + sigma^2 = 1. Every prediction type is linear in the state x and the raw
network output p, so x0 = k0 x + k1 p and a solver step is x_next = k2 x + k3 p. Coefficients are made here, once, and
gathered by timestep or grid index later. T is the number of training timesteps, N the number of grid steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from selfnpo_fast.runtime.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class NoiseSchedule:
    """alphas_cumprod (T,) float64, and what the network predicts: epsilon, v_prediction or sample."""

    alphas_cumprod: torch.Tensor
    prediction_type: str

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
        """Reads a diffusers scheduler instance (which has already applied its beta options)."""
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
        """The same schedule with its table on `device`, where coefficients are then computed."""
        return NoiseSchedule(self.alphas_cumprod.to(device), self.prediction_type)

    @property
    def num_train_timesteps(self) -> int:
        """T, usually 1000."""
        return len(self.alphas_cumprod)

    def alpha_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t, float64, of int64 timesteps of any shape."""
        a = self.alphas_cumprod[t]
        return a.sqrt(), (1 - a).sqrt()


def ddim_grid(num_train_timesteps: int, grid_steps: int) -> torch.Tensor:
    """The N grid timesteps in ascending order, (N,) int64: {39, 79, ..., 999} for N = 25, T = 1000.

    N has to divide T, so that the last grid point is the noisiest timestep.
    """
    if grid_steps < 1 or num_train_timesteps % grid_steps:
        raise UserError(
            f"rollout.grid_steps: {grid_steps} does not divide the model's {num_train_timesteps} timesteps; "
            "try 10, 20, 25, 40 or 50"
        )
    return torch.arange(1, grid_steps + 1) * (num_train_timesteps // grid_steps) - 1


def _output_as_x0_eps(schedule: NoiseSchedule, t: torch.Tensor) -> torch.Tensor:
    """(n, 4) float64: x0 = c0 x + c1 p and eps = c2 x + c3 p."""
    alpha, sigma = schedule.alpha_sigma(t)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if schedule.prediction_type == "epsilon":
        return torch.stack([1 / alpha, -sigma / alpha, zero, one], dim=-1)
    if schedule.prediction_type == "v_prediction":
        return torch.stack([alpha, -sigma, sigma, alpha], dim=-1)
    return torch.stack([zero, one, 1 / sigma, -alpha / sigma], dim=-1)


def x0_coefficients(schedule: NoiseSchedule, t: torch.Tensor) -> torch.Tensor:
    """(n, 2) float64 for timesteps t (n,): x0 = k0 x_t + k1 p."""
    return _output_as_x0_eps(schedule, t)[:, :2]


def ddim_coefficients(schedule: NoiseSchedule, t: torch.Tensor, t_prev: torch.Tensor, w: float = 0.0) -> torch.Tensor:
    """(n, 7) float64, the rows of `guided_step`: x0 as above, the deterministic DDIM step (eta = 0)
    x_{t_prev} = k2 x_t + k3 p, nothing of x0_prev and noise, and guidance w.
    """
    c0, c1, c2, c3 = _output_as_x0_eps(schedule, t).unbind(-1)
    alpha, sigma = schedule.alpha_sigma(t_prev)
    zero = torch.zeros_like(alpha)
    return torch.stack([c0, c1, alpha * c0 + sigma * c2, alpha * c1 + sigma * c3, zero, zero, zero + w], dim=-1)


def forward_coefficients(schedule: NoiseSchedule, t: torch.Tensor) -> torch.Tensor:
    """(n, 2) float64: x_t = k0 x_0 + k1 noise (also Eq. 15, with the Tweedie estimate in place of x_0)."""
    return torch.stack(schedule.alpha_sigma(t), dim=-1)


def renoise_coefficients(schedule: NoiseSchedule, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """(..., 2) float64 for s > t of equal shapes (...): x_s = k0 x_t + k1 noise (Eq. 16).

    alpha_t is never 0, since t is not the last step. Entries where s <= t are 0: no noise leads there.
    """
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    ratio = torch.where(s > t, alpha_s / alpha_t, 0)
    added = (sigma_s.square() - (sigma_t * ratio).square()).clamp(min=0).sqrt()
    return torch.stack([ratio, torch.where(s > t, added, 0)], dim=-1)
