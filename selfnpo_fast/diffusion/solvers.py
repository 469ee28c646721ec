"""The solvers of diffusers as coefficients of `selfnpo_kernels.guided_step`, float64 on the host.

A solver is served if its step is linear in the state x, the raw network output p, the x0 of the two
steps before and noise, and if its state is the input of the network:

    x0     = k0 x + k1 p
    x_next = k2 x + k3 p + k4 x0_prev + k5 noise + k7 x0_prev2

`solver_rows` has the rows of each class. n is the number of solver steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from selfnpo_fast.diffusion import solver_rows
from selfnpo_fast.diffusion.flow_levels import is_flow
from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.runtime.errors import UserError, one_line, shortened


@dataclass(frozen=True)
class SolverSteps:
    """A trajectory from noise to a clean latent, as one row of `guided_step` per step."""

    timesteps: torch.Tensor
    """(n,) the timesteps that the network is told, as diffusers' class has them: int64, or float32
    for Euler and flow Euler, whose timesteps may lie between training timesteps."""
    k: torch.Tensor
    """(n, 8) float64: k0 .. k5, w and k7."""
    init_scale: float
    """The standard deviation of the first state: 1, except for Euler with linspace or trailing
    spacing."""

    @property
    def keeps_x0(self) -> bool:
        """Whether any step needs the x0 of a step before it."""
        return bool(self.k[:, [4, 7]].any())

    @property
    def keeps_two_x0(self) -> bool:
        """Whether any step needs the x0 of two steps before it."""
        return bool(self.k[:, 7].any())

    @property
    def adds_noise(self) -> bool:
        """Whether any step needs noise."""
        return bool(self.k[:, 5].any())


def solver_steps(
    scheduler,
    *,
    w: float | Sequence[float] = 0.0,
    eta: float = 0.0,
    s_churn: float = 0.0,
    prediction_type: str | None = None,
) -> SolverSteps:
    """All steps of a diffusers scheduler on which `set_timesteps` was called.

    The steps are those of diffusers 0.42 with `set_begin_index(0)`, and the last state is what
    diffusers returns. w is the paper's omega, guidance_scale - 1, for all steps or for each of
    them. eta (0 to 1) and s_churn are the arguments of diffusers' `step`; s_churn other than 0 is
    refused. prediction_type is what the network gives, None for what the scheduler takes: they
    differ where a pipeline changes the sign in between, and flow is taken for -flow.

    Raises UserError for schedulers and options whose step is not linear or not known here.
    """
    check_served(scheduler)
    name = type(scheduler).__name__
    if getattr(scheduler, "num_inference_steps", None) is None:
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
    prediction_type = prediction_type or prediction_type_of(scheduler)
    if is_flow(scheduler) != prediction_type.endswith("flow"):
        raise UserError(f"scheduler: {name} does not go with a network whose output is {prediction_type}")
    timesteps = scheduler.timesteps.detach().cpu()
    k = _SOLVERS[name](scheduler, prediction_type, timesteps, eta)
    k[:, 6] = _of_steps(w, len(k))
    finite = k.isfinite().all(-1)
    if not finite.all():
        step = int(finite.logical_not().nonzero()[0])
        raise UserError(
            f"scheduler: {name} has no finite step {step + 1} of {len(k)}, at timestep {timesteps[step].item()}; "
            "two noise levels in a row are equal, or one is without noise: take other betas or fewer steps"
        )
    return SolverSteps(timesteps, k, _init_scale(scheduler))


def prediction_type_of(scheduler) -> str:
    """The prediction type that a scheduler takes: epsilon, v_prediction, sample, flow or -flow."""
    if is_flow(scheduler):
        return "-flow" if scheduler.config.get("invert_sigmas") else "flow"
    return scheduler.config.prediction_type


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
    flow = is_flow(scheduler)
    served = dict(_SERVED[name])
    if flow:
        served |= _SERVED_ON_FLOWS.get(name, {})
    if scheduler.config.get("stochastic_sampling"):
        served["invert_sigmas"] = (False, None)
    for option, values in served.items():
        value = scheduler.config.get(option)
        if value not in values:
            given = one_line(shortened(value))
            wanted = " or ".join(repr(choice) for choice in values if choice is not None or len(values) == 1)
            raise UserError(
                f"scheduler: {option} is {given}, which the fused step does not serve; set it to {wanted}, as in "
                f"{name}.from_config(config, {option}={values[0]!r})"
            )
    if not flow or name not in _SERVED_ON_FLOWS:
        Levels.of(scheduler)


def _of_steps(w: float | Sequence[float], n: int) -> torch.Tensor:
    """w of each step, (n,) or () float64. Raises UserError where there are more or fewer."""
    of_steps = torch.as_tensor(w, dtype=torch.float64)
    if of_steps.ndim and of_steps.shape != (n,):
        raise UserError(f"w: {of_steps.numel()} values for {n} steps; give one, or one for each step")
    return of_steps


def _init_scale(scheduler) -> float:
    """The standard deviation of the first state that the network reads."""
    if type(scheduler).__name__ != "EulerDiscreteScheduler":
        return 1.0
    largest, first = scheduler.sigmas.double().max(), scheduler.sigmas[0].double()
    if scheduler.config.timestep_spacing == "leading":  # EulerDiscreteScheduler.init_noise_sigma
        largest = (1 + largest.square()).sqrt()
    return (largest / (1 + first.square()).sqrt()).item()


_SOLVERS: dict[str, Callable] = {
    "DDIMScheduler": solver_rows.ddim,
    "DPMSolverMultistepScheduler": solver_rows.dpm_solver,
    "EulerDiscreteScheduler": solver_rows.euler,
    "UniPCMultistepScheduler": solver_rows.unipc,
    "FlowMatchEulerDiscreteScheduler": solver_rows.flow_euler,
    "CogVideoXDDIMScheduler": solver_rows.ddim,
    "CogVideoXDPMScheduler": solver_rows.cogvideox_dpm,
}
"""For each class of scheduler: (scheduler, prediction type, timesteps (n,), eta) -> k (n, 8)."""

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
    "UniPCMultistepScheduler": {
        "solver_order": (2, 1),
        "predict_x0": (True,),
        "solver_p": (None,),
        "thresholding": (False,),
        "use_flow_sigmas": (False,),
    },
    "FlowMatchEulerDiscreteScheduler": {},
    # Both classes keep clip_sample in their config and do not look at it.
    "CogVideoXDDIMScheduler": {},
    "CogVideoXDPMScheduler": {},
}
"""For each class of scheduler: the values that are served of the options that matter to the step.
"""

_FLOW_SIGMAS = {"use_flow_sigmas": (True,), "use_exponential_sigmas": (False,), "use_beta_sigmas": (False,)}
_SERVED_ON_FLOWS: dict[str, dict[str, tuple]] = {
    "DPMSolverMultistepScheduler": _FLOW_SIGMAS
    | {"use_karras_sigmas": (False,), "use_lu_lambdas": (False,), "time_shift_type": ("exponential",)},
    "UniPCMultistepScheduler": _FLOW_SIGMAS,
    "FlowMatchEulerDiscreteScheduler": {},
}
"""The same on a flow, of the classes that know one: most of these options would put levels of a
diffusion schedule on it."""
