"""The solvers of diffusers as tables of coefficients for `selfnpo_kernels.guided_step`; pure, float64, on the host.

A solver is served if its step is linear in the state x, the network's raw output p, the x0 of the step before and
noise, and if its state is what the network reads:

    x0     = k0 x + k1 p
    x_next = k2 x + k3 p + k4 x0_prev + k5 noise

All that are served come down to `schedule.ddim_coefficients`, a noiseless step from one noise level to another:

- DDIM is that step. With eta it goes to a cleaner level, from which its noise leads to the level wanted.
- Euler is that step on x / sqrt(1 + sigma^2), the scaled input that diffusers gives the network.
- DPM-Solver++ of first order is that step, its SDE variant the step with noise. 2M adds a multiple of x0 - x0_prev.

A noise level is given by its alphas_cumprod a = alpha^2. diffusers' `sigmas` are sigma / alpha: a = 1 / (1 + sigmas^2).
n is the number of solver steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from selfnpo_fast.diffusion.schedule import NoiseSchedule, ddim_coefficients
from selfnpo_fast.runtime.errors import UserError


@dataclass(frozen=True)
class SolverSteps:
    """A trajectory from noise to a clean latent, as one row of `guided_step` per step."""

    timesteps: torch.Tensor
    """(n,) what the network is given: int64, or float32 for Euler, which also stops between training timesteps."""
    k: torch.Tensor
    """(n, 7) float64: k0 .. k5 and w."""
    init_scale: float
    """What standard normals are multiplied by at the start: 1 but for Euler with linspace or trailing spacing."""

    @property
    def keeps_x0(self) -> bool:
        """Whether any step needs the x0 of the one before."""
        return bool(self.k[:, 4].any())

    @property
    def adds_noise(self) -> bool:
        """Whether any step needs noise."""
        return bool(self.k[:, 5].any())


def solver_steps(scheduler, *, w: float = 0.0, eta: float = 0.0, s_churn: float = 0.0) -> SolverSteps:
    """The whole trajectory of a diffusers scheduler after its `set_timesteps`.

    w is the paper's omega, guidance_scale - 1. eta (0 to 1) is that of DDIM's `step`. Prediction types: epsilon,
    v_prediction and sample. The steps are those of diffusers 0.42 with `set_begin_index(0)`. Of what its `step` takes
    as further arguments, Euler's s_churn is named here to be refused. At the end the state is what diffusers returns.

    Raises UserError for schedulers and options whose step is not linear or not known here.
    """
    name = type(scheduler).__name__  # not isinstance: a subclass may step differently
    if name not in _SOLVERS:
        raise UserError(
            f"scheduler: {name} is not served by the fused step; make a {' or '.join(_SOLVERS)} from its config"
        )
    if scheduler.num_inference_steps is None:
        raise UserError(f"scheduler: this {name} has no steps yet; call set_timesteps")
    if not 0 <= eta <= 1:
        raise UserError(f"eta: {eta} is not possible; expected 0 to 1")
    if s_churn:
        raise UserError(
            f"s_churn: {s_churn} is not served by the fused step, whose network would have to read a state noised "
            "anew; take 0, or DPM-Solver++ with algorithm_type='sde-dpmsolver++' for a stochastic sampler"
        )
    if eta and name != "DDIMScheduler":
        raise UserError(f"eta: {eta} belongs to DDIMScheduler; {name} takes 0")
    timesteps = scheduler.timesteps.detach().cpu()
    k, init_scale = _SOLVERS[name](scheduler, timesteps, eta)
    k[:, 6] = w
    finite = k.isfinite().all(-1)
    if not finite.all():
        step = int(finite.logical_not().nonzero()[0])
        raise UserError(
            f"scheduler: {name} has no finite step {step + 1} of {len(k)}, at timestep {timesteps[step].item()}; "
            "two noise levels in a row are equal, or one is without noise: take other betas or fewer steps"
        )
    return SolverSteps(timesteps, k, init_scale)


def _refuse(scheduler, option: str, *served) -> None:
    value = scheduler.config.get(option)
    if value not in served:
        wanted = " or ".join(repr(choice) for choice in served)
        raise UserError(
            f"scheduler: {option} is {value!r}, which the fused step does not serve; set it to {wanted}, as in "
            f"{type(scheduler).__name__}.from_config(config, {option}={served[0]!r})"
        )


def _between_levels(
    prediction_type: str,
    now: torch.Tensor,
    after: torch.Tensor,
    noise: torch.Tensor | None = None,
    curvature: torch.Tensor | None = None,
) -> torch.Tensor:
    """(n, 7) for the steps from levels `now` to levels `after`, both (n,) alphas_cumprod.

    noise (n,) is the standard deviation of the noise that a step adds; curvature (n,) the multiple of x0 - x0_prev.
    """
    n = len(now)
    kept = 1 - noise.square() if noise is not None else torch.ones_like(now)
    levels = NoiseSchedule(torch.cat([now, (after / kept).clamp(max=1)]), prediction_type)
    k = ddim_coefficients(levels, torch.arange(n), torch.arange(n, 2 * n))
    k[:, 2:4] *= kept.sqrt()[:, None]
    if noise is not None:
        k[:, 5] = noise
    if curvature is not None:
        k[:, 2:4] += curvature[:, None] * k[:, :2]
        k[:, 4] = -curvature
    return k


def _ddim(scheduler, timesteps: torch.Tensor, eta: float) -> tuple[torch.Tensor, float]:
    _refuse(scheduler, "clip_sample", False)
    _refuse(scheduler, "thresholding", False)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    count = schedule.num_train_timesteps
    if timesteps.min() < 0 or timesteps.max() >= count:
        outside = timesteps[(timesteps < 0) | (timesteps >= count)][0].item()
        raise UserError(
            f"scheduler: {scheduler.num_inference_steps} steps with {scheduler.config.timestep_spacing} spacing lead "
            f"to timestep {outside}, outside of 0 to {count - 1}; take another number of steps or another steps_offset"
        )
    # diffusers steps back by this much whatever the spacing is.
    before = timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    now = schedule.alphas_cumprod[timesteps]
    final = scheduler.final_alpha_cumprod.double().cpu()
    after = torch.where(before >= 0, schedule.alphas_cumprod[before.clamp(min=0)], final)
    # Eq. 16 of the DDIM paper (Song et al.).
    noise = eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt() if eta else None
    return _between_levels(schedule.prediction_type, now, after, noise), 1.0


def _dpm_solver(scheduler, timesteps: torch.Tensor, _: float) -> tuple[torch.Tensor, float]:
    _refuse(scheduler, "algorithm_type", "dpmsolver++", "sde-dpmsolver++")
    _refuse(scheduler, "solver_order", 2, 1)
    _refuse(scheduler, "thresholding", False)
    _refuse(scheduler, "use_flow_sigmas", False)
    _refuse(scheduler, "variance_type", None)
    config, n = scheduler.config, len(timesteps)
    sde = config.algorithm_type == "sde-dpmsolver++"
    sigmas = scheduler.sigmas.double().cpu()
    levels = 1 / (1 + sigmas.square())
    h = (sigmas[:-1] / sigmas[1:]).log()  # steps in the logarithm of alpha / sigma; the last is infinite at sigma = 0
    noise = ((1 - levels[1:]) * -torch.expm1(-2 * h)).sqrt() if sde else None

    # D1 = (h / h_prev) (x0 - x0_prev) in diffusers' notation, and its factor (Lu et al., DPM-Solver++).
    reach = 2 * h if sde else h
    decay = -torch.expm1(-reach)
    factor = decay / 2 if config.solver_type == "midpoint" else 1 - decay / reach
    curvature = torch.zeros(n, dtype=torch.float64)
    curvature[1:] = levels[2:].sqrt() * factor[1:] * h[1:] / h[:-1]
    first_order_at_last = (
        config.euler_at_final or config.final_sigmas_type == "zero" or (config.lower_order_final and n < 15)
    )
    if config.solver_order == 1:
        curvature[:] = 0
    elif first_order_at_last:
        curvature[-1] = 0
    prediction_type = NoiseSchedule.from_scheduler(scheduler).prediction_type
    return _between_levels(prediction_type, levels[:-1], levels[1:], noise, curvature), 1.0


def _euler(scheduler, timesteps: torch.Tensor, _: float) -> tuple[torch.Tensor, float]:
    sigmas = scheduler.sigmas.double().cpu()[: len(timesteps) + 1]  # interpolation_type log_linear leaves one more
    norm = (1 + sigmas.square()).sqrt()
    levels = norm.pow(-2)
    k = _between_levels(NoiseSchedule.from_scheduler(scheduler).prediction_type, levels[:-1], levels[1:])
    k[-1, 2:4] *= norm[-1]  # the end is no network's input; diffusers' own state is not divided
    largest = scheduler.sigmas.double().max()
    if scheduler.config.timestep_spacing == "leading":  # EulerDiscreteScheduler.init_noise_sigma
        largest = (1 + largest.square()).sqrt()
    return k, (largest / norm[0]).item()


_SOLVERS: dict[str, Callable] = {
    "DDIMScheduler": _ddim,
    "DPMSolverMultistepScheduler": _dpm_solver,
    "EulerDiscreteScheduler": _euler,
}
