"""The solvers of diffusers as coefficients of `selfnpo_kernels.guided_step`, float64 on the host.

A solver is served if its step is linear in the state x, the raw network output p, the x0 of the
previous step and noise, and if its state is the input of the network:

    x0     = k0 x + k1 p
    x_next = k2 x + k3 p + k4 x0_prev + k5 noise

All solvers here are built on `schedule.ddim_coefficients`, a noiseless step between noise levels:

- DDIM is that step. With eta > 0 the step goes to a lower level, from which the noise leads up to
  the level that is wanted.
- Euler is that step on x / sqrt(1 + sigma^2), the scaled input that diffusers gives the network.
- DPM-Solver++ of first order is that step, and its SDE variant is the step with noise. The second
  order (2M) adds a multiple of x0 - x0_prev.

A noise level is given by its alphas_cumprod a = alpha^2. diffusers' `sigmas` are sigma / alpha: a =
1 / (1 + sigmas^2). n is the number of solver steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from selfnpo_fast.diffusion.levels import Levels, ddim_coefficients
from selfnpo_fast.runtime.errors import UserError


@dataclass(frozen=True)
class SolverSteps:
    """A trajectory from noise to a clean latent, as one row of `guided_step` per step."""

    timesteps: torch.Tensor
    """(n,) the timesteps that the network is told: int64, or float32 for Euler, whose timesteps may
    lie between training timesteps."""
    k: torch.Tensor
    """(n, 7) float64: k0 .. k5 and w."""
    init_scale: float
    """The standard deviation of the first state: 1, except for Euler with linspace or trailing
    spacing."""

    @property
    def keeps_x0(self) -> bool:
        """Whether any step needs the x0 of the previous step."""
        return bool(self.k[:, 4].any())

    @property
    def adds_noise(self) -> bool:
        """Whether any step needs noise."""
        return bool(self.k[:, 5].any())


def solver_steps(scheduler, *, w: float = 0.0, eta: float = 0.0, s_churn: float = 0.0) -> SolverSteps:
    """All steps of a diffusers scheduler on which `set_timesteps` was called.

    The steps are those of diffusers 0.42 with `set_begin_index(0)`, and the last state is what
    diffusers returns. w is the paper's omega, guidance_scale - 1. eta (0 to 1) and s_churn are the
    arguments of diffusers' `step`; s_churn other than 0 is refused. All prediction types of
    `Levels` are served. Raises UserError for schedulers and options whose step is not linear
    or not known here.
    """
    check_served(scheduler)
    name = type(scheduler).__name__
    if scheduler.num_inference_steps is None:
        raise UserError(f"scheduler: this {name} has no steps yet; call set_timesteps")
    if not 0 <= eta <= 1:
        raise UserError(f"eta: {eta} is not possible; expected 0 to 1")
    if s_churn:
        raise UserError(
            f"s_churn: {s_churn} is not served by the fused step, whose network would have to read a state with new "
            "noise; take 0, or DPM-Solver++ with algorithm_type='sde-dpmsolver++' for a stochastic sampler"
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


def check_served(scheduler) -> None:
    """UserError for a scheduler whose class, options or prediction type `solver_steps` does not
    serve.

    The number of steps is not looked at: `set_timesteps` need not have been called.
    """
    name = type(scheduler).__name__  # not isinstance: a subclass may step differently
    if name not in _SOLVERS:
        raise UserError(
            f"scheduler: {name} is not served by the fused step; make a {' or '.join(_SOLVERS)} from its config"
        )
    for option, served in _SERVED[name].items():
        value = scheduler.config.get(option)
        if value not in served:
            wanted = " or ".join(repr(choice) for choice in served)
            raise UserError(
                f"scheduler: {option} is {value!r}, which the fused step does not serve; set it to {wanted}, as in "
                f"{name}.from_config(config, {option}={served[0]!r})"
            )
    Levels.of(scheduler)


def _between_levels(
    prediction_type: str,
    now: torch.Tensor,
    after: torch.Tensor,
    noise: torch.Tensor | None = None,
    curvature: torch.Tensor | None = None,
) -> torch.Tensor:
    """(n, 7) float64 for the steps from levels `now` to levels `after`, both (n,) alphas_cumprod.

    noise (n,) is the standard deviation of the noise that a step adds; curvature (n,) the multiple
    of x0 - x0_prev.
    """
    n = len(now)
    kept = 1 - noise.square() if noise is not None else torch.ones_like(now)
    levels = Levels.variance_preserving(torch.cat([now, (after / kept).clamp(max=1)]), prediction_type)
    k = ddim_coefficients(levels, torch.arange(n), torch.arange(n, 2 * n))
    k[:, 2:4] *= kept.sqrt()[:, None]
    if noise is not None:
        k[:, 5] = noise
    if curvature is not None:
        k[:, 2:4] += curvature[:, None] * k[:, :2]
        k[:, 4] = -curvature
    return k


def _ddim(scheduler, timesteps: torch.Tensor, eta: float) -> tuple[torch.Tensor, float]:
    """(k, init_scale) of DDIMScheduler."""
    schedule = Levels.of(scheduler)
    count = schedule.num_train_timesteps
    if timesteps.min() < 0 or timesteps.max() >= count:
        outside = timesteps[(timesteps < 0) | (timesteps >= count)][0].item()
        raise UserError(
            f"scheduler: {scheduler.num_inference_steps} steps with {scheduler.config.timestep_spacing} spacing lead "
            f"to timestep {outside}, outside of 0 to {count - 1}; take another number of steps or another steps_offset"
        )
    # diffusers steps back by this much for all spacings.
    before = timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    now = schedule.alphas_cumprod[timesteps]
    final = scheduler.final_alpha_cumprod.double().cpu()
    after = torch.where(before >= 0, schedule.alphas_cumprod[before.clamp(min=0)], final)
    # Eq. 16 of Song et al., DDIM, arXiv:2010.02502.
    noise = eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt() if eta else None
    return _between_levels(schedule.prediction, now, after, noise), 1.0


def _dpm_solver(scheduler, timesteps: torch.Tensor, _: float) -> tuple[torch.Tensor, float]:
    """(k, init_scale) of DPMSolverMultistepScheduler, orders 1 and 2."""
    config, n = scheduler.config, len(timesteps)
    sde = config.algorithm_type == "sde-dpmsolver++"
    sigmas = scheduler.sigmas.double().cpu()
    levels = 1 / (1 + sigmas.square())
    # Steps in the logarithm of alpha / sigma; the last one is infinite where it ends at sigma = 0.
    h = (sigmas[:-1] / sigmas[1:]).log()
    noise = ((1 - levels[1:]) * -torch.expm1(-2 * h)).sqrt() if sde else None

    # The second order adds `factor` times diffusers' D1 = (h / h_prev) (x0 - x0_prev); Lu et al.,
    # DPM-Solver++, arXiv:2211.01095.
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
    prediction_type = Levels.of(scheduler).prediction
    return _between_levels(prediction_type, levels[:-1], levels[1:], noise, curvature), 1.0


def _euler(scheduler, timesteps: torch.Tensor, _: float) -> tuple[torch.Tensor, float]:
    """(k, init_scale) of EulerDiscreteScheduler."""
    # interpolation_type log_linear leaves one sigma more.
    sigmas = scheduler.sigmas.double().cpu()[: len(timesteps) + 1]
    norm = (1 + sigmas.square()).sqrt()
    levels = norm.pow(-2)
    k = _between_levels(Levels.of(scheduler).prediction, levels[:-1], levels[1:])
    k[-1, 2:4] *= norm[-1]  # diffusers returns the last state without the scaling of an input
    largest = scheduler.sigmas.double().max()
    if scheduler.config.timestep_spacing == "leading":  # EulerDiscreteScheduler.init_noise_sigma
        largest = (1 + largest.square()).sqrt()
    return k, (largest / norm[0]).item()


_SOLVERS: dict[str, Callable] = {
    "DDIMScheduler": _ddim,
    "DPMSolverMultistepScheduler": _dpm_solver,
    "EulerDiscreteScheduler": _euler,
}
"""For each class of scheduler: (scheduler, timesteps, eta) -> (k, init_scale)."""

_SERVED: dict[str, dict[str, tuple]] = {
    "DDIMScheduler": {"clip_sample": (False,), "thresholding": (False,)},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_order": (2, 1),
        "thresholding": (False,),
        "use_flow_sigmas": (False,),
        # DDPM's variances come along in a config and are not used; learned ones cut the
        # network's output.
        "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    },
    "EulerDiscreteScheduler": {},
}
"""For each class of scheduler: the values that are served of the options that matter to the step.
"""
