"""The diffusers scheduler that a sampler draws with: the model's own, or one of another solver."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from selfnpo_fast.diffusion.flow_levels import is_flow
from selfnpo_fast.diffusion.solvers import check_served
from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import UserError, one_line

OWN = "own"
"""The solver that stands for the model's own scheduler, as it is configured."""
CLASSES = {
    "dpm++": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""The class of each other solver in diffusers, for a model with a diffusion schedule."""
FLOW_CLASSES = {
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""The same for a flow model. DDIM is Euler there."""
SOLVERS = (*CLASSES, OWN)

_NAMES = {cls: name for classes in (CLASSES, FLOW_CLASSES) for name, cls in classes.items()} | {
    "CogVideoXDDIMScheduler": "ddim",
    "CogVideoXDPMScheduler": "dpm++",
}
"""The solver of each class that is served."""
_OPTIONS: dict[str, dict[str, Any]] = {
    "dpm++": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "ddim": {"clip_sample": False},
    "euler": {},
    "unipc": {"solver_order": 2, "solver_type": "bh2", "predict_x0": True, "solver_p": None, "disable_corrector": []},
}
"""What the names of the solvers promise, whatever the model's config says."""
_CHOICES_OF_LEVELS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "sigma_min",
    "sigma_max",
    "timestep_type",
    "final_sigmas_type",
)
"""Options that choose which of the noise levels are visited; not all classes know them."""
_CHOICES_OF_FLOW_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "shift_terminal")
"""The same of flow models."""


def new_scheduler(solver: str, model: Any) -> Any:
    """A scheduler of a solver, for `set_timesteps` and `solver_steps`; the model's is not changed.

    `model` is the model's scheduler, an instance of any class of diffusers with alphas_cumprod, or
    of one for flow models.

    - own: a copy of it. SD 1.5's own PNDM is no such step: it becomes dpm++, which is said once.
    - dpm++: DPM-Solver++(2M), an ODE solver.
    - unipc: UniPC of second order, bh2, with its corrector.
    - ddim, euler: these. On a flow both are one solver, which is called euler.

    A scheduler of another class than the model's takes over its config as diffusers'
    `from_config` does, and its noise levels, or the shift of a flow.

    Raises UserError for an unknown solver, for a scheduler of the model's own that the fused step
    does not serve, and where no scheduler of the solver can be made.
    """
    if solver not in SOLVERS:
        raise UserError(f"solver: {solver!r} is not supported; expected one of {', '.join(SOLVERS)}")
    if solver == OWN and type(model).__name__ == "PNDMScheduler":
        say_once("solver: the model's PNDMScheduler is drawn as DPM-Solver++(2M) on its noise schedule")
        solver = "dpm++"
    if solver != OWN:
        return _flow_scheduler(solver, model) if is_flow(model) else _other_scheduler(solver, model)
    try:
        check_served(model)
    except UserError as error:
        mend = ""
        if is_flow(model):
            mend = "; or give solver='euler', flow Euler with its shift"
        elif hasattr(model, "alphas_cumprod"):
            mend = "; or give solver='dpm++', DPM-Solver++(2M) on its noise schedule"
        raise UserError(f"{error}{mend}") from error
    return copy.deepcopy(model)


def described(scheduler: Any) -> str:
    """The solver of a scheduler that is served, as in `dpm++, order 2, sde`, `unipc, order 2`,
    `ddim` or `euler`."""
    cls, config = type(scheduler).__name__, scheduler.config
    name = _NAMES[cls]
    if cls == "CogVideoXDPMScheduler":
        return "dpm++, order 2, sde"
    if name == "dpm++":
        return f"dpm++, order {config.solver_order}, {'sde' if config.algorithm_type.startswith('sde') else 'ode'}"
    return f"unipc, order {config.solver_order}" if name == "unipc" else name


def noise_levels(scheduler: Any) -> list[float] | None:
    """The noise levels of a scheduler at all training timesteps; None of what has none."""
    levels = getattr(scheduler, "alphas_cumprod", None)
    return levels.tolist() if isinstance(levels, torch.Tensor) else None


def _other_scheduler(solver: str, model: Any) -> Any:
    """The scheduler of a solver by name, with the config and the noise levels of the model's."""
    import diffusers

    if not hasattr(model, "alphas_cumprod"):
        raise UserError(
            f"solver: {solver} needs a DDPM-style noise schedule, and the model's {type(model).__name__} has none"
        )
    cls = getattr(diffusers, CLASSES[solver])
    scheduler = _made(solver, cls, model, model.config, _OPTIONS[solver])
    _say_what_is_left_out(solver, cls, model, _CHOICES_OF_LEVELS)
    _carry_levels(scheduler, model)
    return scheduler


def _flow_scheduler(solver: str, model: Any) -> Any:
    """The scheduler of a solver by name, on the flow of the model's."""
    import diffusers

    if solver not in FLOW_CLASSES:
        raise UserError(
            f"solver: {solver} needs a diffusion schedule, and the model's {type(model).__name__} is that of a flow "
            f"model; expected one of {', '.join(FLOW_CLASSES)}, {OWN}"
        )
    if model.config.get("invert_sigmas"):
        raise UserError(
            f"solver: {solver} cannot be made from the model's {type(model).__name__} with invert_sigmas; give "
            f"solver='{OWN}'"
        )
    cls, config = getattr(diffusers, FLOW_CLASSES[solver]), model.config
    shift = config.get("shift", config.get("flow_shift", 1.0))
    options = {"shift": shift, "flow_shift": shift, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    known = inspect.signature(cls.__init__).parameters
    options = {name: value for name, value in options.items() if name in known}
    # diffusers warns of what it leaves out, and the shift has another name here.
    config = {name: value for name, value in config.items() if name in known}
    if cls is diffusers.FlowMatchEulerDiscreteScheduler:
        options["stochastic_sampling"] = False
    scheduler = _made(solver, cls, model, config, _OPTIONS[solver] | options)
    _say_what_is_left_out(solver, cls, model, _CHOICES_OF_FLOW_LEVELS)
    return scheduler


def _made(solver: str, cls: type, model: Any, config: Mapping[str, Any], options: dict[str, Any]) -> Any:
    """A scheduler of `cls` with a config and these options, in place of the model's."""
    try:
        scheduler = cls.from_config(config, **options)  # type: ignore[attr-defined]
        check_served(scheduler)
    except UserError:
        raise
    except (ValueError, NotImplementedError, TypeError, ImportError) as error:
        raise UserError(
            f"solver: {solver} cannot be made from the model's {type(model).__name__}: {one_line(error)}"
        ) from error
    return scheduler


def _say_what_is_left_out(solver: str, cls: type, model: Any, choices: tuple[str, ...]) -> None:
    """One line about options of the model's that choose its noise levels and that `cls` does not
    have; `choices` names such options."""
    parameters = inspect.signature(type(model).__init__).parameters
    known = inspect.signature(cls.__init__).parameters
    left_out = [
        f"{name}={value!r}"
        for name in choices
        if name in parameters and name not in known and (value := model.config.get(name)) != parameters[name].default
    ]
    if left_out:
        say_once(f"solver: {solver} has no {', '.join(left_out)} of the model's {type(model).__name__}")


def _carry_levels(scheduler: Any, model: Any) -> None:
    """Give the scheduler the model's noise levels where its config makes others.

    That is so where the model's class has options of its own, such as CogVideoX's snr_shift_scale,
    which `from_config` drops. The last level is left as it is where no other differs: classes treat
    a zero terminal SNR in their own ways.
    """
    levels, made = model.alphas_cumprod.detach().cpu().float(), scheduler.alphas_cumprod
    if len(levels) == len(made) and torch.allclose(levels[:-1], made[:-1], rtol=1e-4, atol=1e-7):
        return
    levels = levels.clone()
    scheduler.alphas_cumprod = levels
    if hasattr(scheduler, "final_alpha_cumprod"):  # DDIM
        scheduler.final_alpha_cumprod = torch.tensor(1.0) if scheduler.config.set_alpha_to_one else levels[0]
        return
    if levels[-1] == 0:
        levels[-1] = 2**-24  # as both classes do at zero terminal SNR
    if hasattr(scheduler, "lambda_t"):  # DPM-Solver and UniPC
        scheduler.alpha_t, scheduler.sigma_t = levels.sqrt(), (1 - levels).sqrt()
        scheduler.lambda_t = scheduler.alpha_t.log() - scheduler.sigma_t.log()
