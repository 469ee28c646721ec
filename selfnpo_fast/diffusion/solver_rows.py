"""The steps of each solver of diffusers as rows of `selfnpo_kernels.guided_step`, float64.

The noise levels of a trajectory are points (alpha, sigma) of x = alpha x0 + sigma eps: alpha^2 +
sigma^2 = 1 on a diffusion schedule, alpha + sigma = 1 on a flow. lambda is log(alpha / sigma), and
h the difference of lambda over a step. diffusers' `sigmas` are sigma / alpha on a diffusion
schedule and sigma on a flow.

All solvers are made of one step, from a point to a point without noise:

- DDIM and flow Euler are that step. With noise of their own (eta; stochastic_sampling) the step
  goes to a point of less noise, from which the noise leads to the one that is wanted.
- Euler is that step on x / sqrt(1 + sigma^2), the scaled input that diffusers gives the network.
- DPM-Solver++ of first order is that step, and its SDE variant is the step with noise. The second
  order (2M) adds a multiple of x0 - x0_prev; so does CogVideoX's DPM, by a rule of its own.
- UniPC's predictor is DPM-Solver++ (2M) with other multiples. Its corrector changes the state that
  the network has read by multiples of x0, x0_prev and x0_prev2: both are one row.

n is the number of solver steps. Every function here returns k (n, 8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from selfnpo_fast.diffusion.predictions import output_as_x0_eps
from selfnpo_fast.runtime.errors import UserError
from selfnpo_kernels.schemas import STEP_COLUMNS


@dataclass(frozen=True)
class _Points:
    """Noise levels, one after another."""

    alpha: torch.Tensor
    """(n,) float64, the share of x0 in a state."""
    sigma: torch.Tensor
    """(n,) float64, the share of noise."""

    @classmethod
    def diffusion(cls, alphas_cumprod: torch.Tensor) -> _Points:
        """From alpha^2 (n,)."""
        return cls(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())

    @classmethod
    def of_sigmas(cls, scheduler) -> _Points:
        """From a scheduler's `sigmas` (n,)."""
        sigmas = scheduler.sigmas.double().cpu()
        if scheduler.config.get("use_flow_sigmas"):
            return cls(1 - sigmas, sigmas)
        norm = (1 + sigmas.square()).sqrt()
        return cls(1 / norm, sigmas / norm)

    def __getitem__(self, part: slice) -> _Points:
        return _Points(self.alpha[part], self.sigma[part])

    def log_ratio(self) -> torch.Tensor:
        """(n,) lambda; infinite without noise, and minus infinity without signal."""
        return self.alpha.log() - self.sigma.log()


def _level_step(prediction_type: str, now: _Points, after: _Points, noise: torch.Tensor | None = None) -> torch.Tensor:
    """The noiseless steps from points `now` (n,) to points `after` (n,).

    noise (n,) is the standard deviation of the noise that is added then.
    """
    c0, c1, c2, c3 = output_as_x0_eps(prediction_type, now.alpha, now.sigma).unbind(-1)
    k = torch.zeros(len(c0), STEP_COLUMNS, dtype=torch.float64)
    k[:, 0], k[:, 1] = c0, c1
    k[:, 2] = after.alpha * c0 + after.sigma * c2
    k[:, 3] = after.alpha * c1 + after.sigma * c3
    if noise is not None:
        k[:, 5] = noise
    return k


def _add_x0(k: torch.Tensor, factor: torch.Tensor) -> None:
    """Add factor (n,) times x0 to the next state of rows k (n, 8)."""
    k[:, 2:4] += factor[:, None] * k[:, :2]


def _of_training_timesteps(scheduler, timesteps: torch.Tensor) -> tuple[_Points, _Points, torch.Tensor]:
    """(now, after, whether a step ends at the end of the schedule) of a DDIM-like scheduler."""
    levels = scheduler.alphas_cumprod.double().cpu()
    if timesteps.min() < 0 or timesteps.max() >= len(levels):
        outside = timesteps[(timesteps < 0) | (timesteps >= len(levels))][0].item()
        raise UserError(
            f"scheduler: {scheduler.num_inference_steps} steps with {scheduler.config.timestep_spacing} spacing lead "
            f"to timestep {outside}, outside of 0 to {len(levels) - 1}; take another number of steps or another "
            "steps_offset"
        )
    # diffusers steps back by this much for all spacings.
    before = timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    final = scheduler.final_alpha_cumprod.double().cpu()
    after = torch.where(before >= 0, levels[before.clamp(min=0)], final)
    return _Points.diffusion(levels[timesteps]), _Points.diffusion(after), before < 0


def ddim(scheduler, prediction_type: str, timesteps: torch.Tensor, eta: float) -> torch.Tensor:
    """DDIMScheduler, and CogVideoXDDIMScheduler, which takes no eta."""
    now, after, _ = _of_training_timesteps(scheduler, timesteps)
    if not eta:
        return _level_step(prediction_type, now, after)
    # Eq. 16 of Song et al., DDIM, arXiv:2010.02502.
    a, b = now.alpha.square(), after.alpha.square()
    noise = eta * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
    without = _Points(after.alpha, (after.sigma.square() - noise.square()).clamp(min=0).sqrt())
    return _level_step(prediction_type, now, without, noise)


def euler(scheduler, prediction_type: str, timesteps: torch.Tensor, _: float) -> torch.Tensor:
    """EulerDiscreteScheduler."""
    # interpolation_type log_linear leaves one sigma more.
    points = _Points.of_sigmas(scheduler)[: len(timesteps) + 1]
    k = _level_step(prediction_type, points[:-1], points[1:])
    k[-1, 2:4] /= points.alpha[-1]  # diffusers returns the last state without the scaling of an input
    return k


def flow_euler(scheduler, prediction_type: str, timesteps: torch.Tensor, _: float) -> torch.Tensor:
    """FlowMatchEulerDiscreteScheduler."""
    sigmas = scheduler.sigmas.double().cpu()
    if scheduler.config.get("invert_sigmas"):  # its sigmas are shares of x0
        sigmas = 1 - sigmas
    now, after = _Points(1 - sigmas[:-1], sigmas[:-1]), _Points(1 - sigmas[1:], sigmas[1:])
    if not scheduler.config.get("stochastic_sampling"):
        return _level_step(prediction_type, now, after)
    return _level_step(prediction_type, now, _Points(after.alpha, torch.zeros_like(after.sigma)), after.sigma)


def _dpm_step(
    prediction_type: str, now: _Points, after: _Points, h_last: torch.Tensor, *, sde: bool, heun: bool = False
) -> torch.Tensor:
    """DPM-Solver++ of second order (Lu et al., arXiv:2211.01095) for steps from `now` to `after`.

    h_last (n,) is what separates a step from the x0 of the step before it in lambda. Where it is
    infinite the step is of first order.
    """
    h = after.log_ratio() - now.log_ratio()  # infinite where `after` is without noise
    reach = 2 * h if sde else h
    noise, lower = None, after
    if sde:
        noise = after.sigma * (-torch.expm1(-reach)).sqrt()
        lower = _Points(after.alpha, after.sigma * (-h).exp())
    k = _level_step(prediction_type, now, lower, noise)
    decay = -torch.expm1(-reach)
    factor = 1 - decay / reach if heun else decay / 2
    curvature = torch.where(h_last.isinf(), 0, after.alpha * factor * h / h_last)
    _add_x0(k, curvature)
    k[:, 4] = -curvature
    return k


def dpm_solver(scheduler, prediction_type: str, timesteps: torch.Tensor, _: float) -> torch.Tensor:
    """DPMSolverMultistepScheduler, orders 1 and 2, ODE and SDE."""
    config, n = scheduler.config, len(timesteps)
    points = _Points.of_sigmas(scheduler)
    h_last = torch.full((n,), torch.inf, dtype=torch.float64)
    if config.solver_order == 2:
        h_last[1:] = points.log_ratio()[:-1].diff()
    if config.euler_at_final or config.final_sigmas_type == "zero" or (config.lower_order_final and n < 15):
        h_last[-1] = torch.inf
    sde = config.algorithm_type == "sde-dpmsolver++"
    return _dpm_step(prediction_type, points[:-1], points[1:], h_last, sde=sde, heun=config.solver_type == "heun")


def cogvideox_dpm(scheduler, prediction_type: str, timesteps: torch.Tensor, _: float) -> torch.Tensor:
    """CogVideoXDPMScheduler, as its pipelines call it: with the timestep of the step before."""
    now, after, at_end = _of_training_timesteps(scheduler, timesteps)
    h_last = torch.full((len(timesteps),), torch.inf, dtype=torch.float64)
    h_last[1:] = now.log_ratio().diff()
    h_last[at_end] = torch.inf
    return _dpm_step(prediction_type, now, after, h_last, sde=True)


def unipc(scheduler, prediction_type: str, timesteps: torch.Tensor, _: float) -> torch.Tensor:
    """UniPCMultistepScheduler, orders 1 and 2 (Zhao et al., UniPC, arXiv:2302.04867).

    A row does what diffusers does between two calls of the network: the corrector of the step that
    led here, then the predictor of the next one.
    """
    config, n = scheduler.config, len(timesteps)
    points = _Points.of_sigmas(scheduler)
    steps = points.log_ratio().diff()
    k = _level_step(prediction_type, points[:-1], points[1:])
    order = 1
    for i in range(n):
        h, alpha = steps[i], points.alpha[i]
        # What the corrector adds to the state: multiples of x0, x0_prev and x0_prev2.
        added = torch.zeros(3, dtype=torch.float64)
        if i > 0 and i - 1 not in config.disable_corrector:
            # Without a step before there are no differences, and `r` is not used.
            r = -steps[i - 2] / steps[i - 1] if order == 2 else None
            added = -alpha * _corrector(steps[i - 1], r, config.solver_type)
        # The predictor of first order of that state: DDIM's, which keeps this much of the state.
        kept = points.sigma[i + 1] / points.sigma[i]
        # The predictor's second order adds a multiple of x0_prev - x0.
        order = min(config.solver_order, i + 1, n - i if config.lower_order_final else n)
        second = torch.zeros((), dtype=torch.float64)
        if order == 2:
            second = -points.alpha[i + 1] * _scale_of(h, config.solver_type) / 2 / (-steps[i - 1] / h)
        _add_x0(k[i : i + 1], (kept * added[0] - second)[None])
        k[i, 4] = kept * added[1] + second
        k[i, 7] = kept * added[2]
    return k


def _scale_of(h: torch.Tensor, solver_type: str) -> torch.Tensor:
    """UniPC's B(h): bh1 is -h, bh2 is e^-h - 1."""
    return -h if solver_type == "bh1" else torch.expm1(-h)


def _corrector(h: torch.Tensor, r: torch.Tensor | None, solver_type: str) -> torch.Tensor:
    """(3,) the multiples of x0, x0_prev and x0_prev2 in UniPC's corrector over a step h, less those
    in the predictor of that step.

    r is the place of x0_prev2 in lambda, in steps h from x0_prev on; None in first order.
    """
    scale = _scale_of(h, solver_type)
    if r is None:
        return scale * torch.tensor([0.5, -0.5, 0.0], dtype=torch.float64)
    phi_1 = torch.expm1(-h) / -h - 1
    phi_2 = phi_1 / -h - 0.5
    matrix = torch.stack([torch.ones(2, dtype=torch.float64), torch.stack([r, torch.ones_like(r)])])
    of_earlier, of_now = torch.linalg.solve(matrix, torch.stack([phi_1, 2 * phi_2]) / scale)
    slope = (of_earlier - 0.5) / r  # the predictor has .5 of it
    return scale * torch.stack([of_now, -of_now - slope, slope])
