"""Noise levels, grids of them and coefficients of steps; pure functions in float64.

The state at level i is x_i = alpha_i x_0 + sigma_i eps. Level 0 is the cleanest, T - 1 the noisiest.
A variance preserving schedule has alpha^2 + sigma^2 = 1, a flow alpha + sigma = 1. Every prediction
is linear in the state x and the raw network output p, so x0 = c0 x + c1 p and eps = c2 x + c3 p,
and a DDIM step, which is the Euler step of a flow, is x_next = k2 x + k3 p. These functions compute
the coefficients once; later they are gathered by level or grid index. The docstring of
`selfnpo_fast.diffusion` tells which paper equation numbers belong to.

Shape letters: T levels, N grid steps, n levels of one call.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from selfnpo_fast.diffusion.flow_levels import flow_sigmas, has_flow_sigmas
from selfnpo_fast.diffusion.predictions import output_as_x0_eps
from selfnpo_fast.runtime.errors import UserError, shortened

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
"""What the networks of variance preserving schedules predict."""
FLOWS = ("flow", "-flow")
"""What the networks of flows predict: eps - x_0, or x_0 - eps."""


@dataclass(frozen=True, kw_only=True)
class Levels:
    """The noise levels of a model, and what its network predicts.

    Raises UserError for a prediction that is unknown, or that leaves x0 undetermined at the noisiest
    level.
    """

    alpha: torch.Tensor
    """(T,) float64: the share of x_0 in a state."""
    sigma: torch.Tensor
    """(T,) float64: the share of noise in a state."""
    time: torch.Tensor
    """(T,) float64: what the network is given as time."""
    prediction: str
    """What the network predicts: epsilon, v_prediction, sample, flow (eps - x_0) or -flow."""
    alphas_cumprod: torch.Tensor | None = None
    """(T,) float64, alpha^2 of a variance preserving schedule as it was given; None of a flow."""

    def __post_init__(self) -> None:
        possible = FLOWS if self.is_flow else PREDICTION_TYPES
        if self.prediction not in possible:
            raise UserError(
                f"prediction_type: {shortened(self.prediction)} is not supported; expected one of {', '.join(possible)}"
            )
        if self.prediction == "epsilon" and self.alpha[-1] == 0:
            raise UserError(
                "prediction_type: 'epsilon' says nothing about x0 at zero terminal SNR; use a v_prediction model"
            )

    @classmethod
    def variance_preserving(cls, alphas_cumprod: torch.Tensor, prediction: str) -> Levels:
        """The levels of `alphas_cumprod` (T,) float64, alpha^2. The network is given the index."""
        time = torch.arange(len(alphas_cumprod), dtype=torch.float64, device=alphas_cumprod.device)
        return cls(
            alpha=alphas_cumprod.sqrt(),
            sigma=(1 - alphas_cumprod).sqrt(),
            time=time,
            prediction=prediction,
            alphas_cumprod=alphas_cumprod,
        )

    @classmethod
    def flow(cls, sigma: torch.Tensor, prediction: str = "flow", time: torch.Tensor | None = None) -> Levels:
        """The levels x = (1 - sigma) x_0 + sigma eps of sigma (T,) float64, ascending from 0.

        `time` (T,) is by default T sigma, as diffusers' schedulers have it.
        """
        time = sigma * len(sigma) if time is None else time
        return cls(alpha=1 - sigma, sigma=sigma, time=time, prediction=prediction)

    @classmethod
    def of(cls, scheduler: Any, tokens: int | None = None) -> Levels:
        """The levels of a diffusers scheduler as it is configured; how it spaces the steps of
        sampling does not matter.

        DDPM-style schedulers have alphas_cumprod: zero terminal SNR and CogVideoX's snr_shift_scale
        are in it. For flows see `flow_levels.flow_sigmas`, which also says what `tokens` is; a
        scheduler with invert_sigmas counts time and output from the clean end.

        Raises UserError for a scheduler that is neither.
        """
        if has_flow_sigmas(scheduler):
            sigma = flow_sigmas(scheduler, tokens)
            if scheduler.config.get("invert_sigmas"):
                return cls.flow(sigma, "-flow", (1 - sigma) * len(sigma))
            return cls.flow(sigma)
        if not hasattr(scheduler, "alphas_cumprod"):
            raise UserError(
                f"scheduler: {type(scheduler).__name__} has no alphas_cumprod and no flow that is known; expected a "
                "DDPM-style noise schedule or a FlowMatchEulerDiscreteScheduler"
            )
        alphas_cumprod = scheduler.alphas_cumprod.detach().double().cpu()
        return cls.variance_preserving(alphas_cumprod, scheduler.config.prediction_type)

    def check(self) -> None:
        """ValueError where a level is no number from 0 to 1."""
        if self.is_flow:
            if not ((self.sigma >= 0) & (self.sigma <= 1)).all() or not (self.sigma.diff() >= 0).all():
                raise ValueError("its shift gives noise levels that do not rise from 0 to 1")
            return
        a = self.alphas_cumprod
        if not ((a >= 0) & (a <= 1)).all():  # also where one is not a number
            raise ValueError("its betas give an alphas_cumprod outside of 0 to 1")

    def to(self, device: torch.device) -> Levels:
        """The same levels on `device`, where their coefficients are then computed."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **moved)

    @property
    def is_flow(self) -> bool:
        """Whether these are the levels of a flow."""
        return self.alphas_cumprod is None

    @property
    def num_train_timesteps(self) -> int:
        """The number T of levels, usually 1000."""
        return len(self.alpha)

    def identity(self) -> dict:
        """What tells these levels from others, for a digest."""
        if self.is_flow:
            return {"sigma": self.sigma, "time": self.time, "prediction": self.prediction}
        return {"alphas_cumprod": self.alphas_cumprod, "prediction_type": self.prediction}

    def alpha_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t, float64, for int64 levels of any shape."""
        return self.alpha[t], self.sigma[t]

    def grid(self, steps: int) -> torch.Tensor:
        """The levels of a grid in ascending order, (N,) int64: 39, 79, ..., 999 for N = 25.

        Raises UserError unless N divides T, since the last one has to be the noisiest.
        """
        count = self.num_train_timesteps
        if steps < 1 or count % steps:
            raise UserError(
                f"rollout.grid_steps: {steps} does not divide the model's {count} timesteps; try 10, 20, 25, 40 or 50"
            )
        return torch.arange(1, steps + 1) * (count // steps) - 1


def output_coefficients(levels: Levels, t: torch.Tensor) -> torch.Tensor:
    """(n, 4) float64 for levels t (n,): x0 = c0 x_t + c1 p and eps = c2 x_t + c3 p."""
    return output_as_x0_eps(levels.prediction, *levels.alpha_sigma(t))


def x0_coefficients(levels: Levels, t: torch.Tensor) -> torch.Tensor:
    """(n, 2) float64 for levels t (n,): x0 = k0 x_t + k1 p, Tweedie's estimate (Eq. 2, 12)."""
    return output_coefficients(levels, t)[:, :2]


def ddim_coefficients(levels: Levels, t: torch.Tensor, t_prev: torch.Tensor, w: float = 0.0) -> torch.Tensor:
    """(n, 8) float64 for steps from levels t (n,) to t_prev (n,): rows of `guided_step`.

    k0 and k1 give x0 as in `x0_coefficients`. k2 and k3 give the DDIM step without noise (eta = 0),
    x_{t_prev} = k2 x_t + k3 p: of a flow they are 1 and the difference of the sigmas. The entry
    after k5 is w. k4, k5 and k7, for x0_prev, noise and x0_prev2, are 0.
    """
    c0, c1, c2, c3 = output_coefficients(levels, t).unbind(-1)
    alpha, sigma = levels.alpha_sigma(t_prev)
    zero = torch.zeros_like(alpha)
    return torch.stack([c0, c1, alpha * c0 + sigma * c2, alpha * c1 + sigma * c3, zero, zero, zero + w, zero], dim=-1)


def forward_coefficients(levels: Levels, t: torch.Tensor) -> torch.Tensor:
    """(..., 2) float64 for levels t (...): x_t = k0 x_0 + k1 noise.

    With Tweedie's estimate for x_0 this is Eq. 15.
    """
    return torch.stack(levels.alpha_sigma(t), dim=-1)


def renoise_coefficients(levels: Levels, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """(..., 2) float64 for levels t and s of one shape (...): x_s = k0 x_t + k1 noise (Eq. 16).

    Entries are 0 where s <= t, since adding noise does not lead to a lower noise level. From a
    state without x_0, alpha_t = 0, none of it is kept.
    """
    alpha_t, sigma_t = levels.alpha_sigma(t)
    alpha_s, sigma_s = levels.alpha_sigma(s)
    kept = alpha_s / torch.where(alpha_t == 0, torch.inf, alpha_t)
    ratio = torch.where(s > t, kept, 0)
    added = (sigma_s.square() - (sigma_t * ratio).square()).clamp(min=0).sqrt()
    return torch.stack([ratio, torch.where(s > t, added, 0)], dim=-1)
