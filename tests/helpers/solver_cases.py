"""A trajectory of a diffusers scheduler by its own `step`, and the same by `guided_step` and
coefficient tables."""

from __future__ import annotations

import sys
from unittest import mock

import torch
from diffusers import CogVideoXDPMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler

from selfnpo_fast.diffusion.solvers import SolverSteps
from selfnpo_kernels import guided_step

SHAPE = (2, 4, 3, 3)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


class Unrounded(torch.Tensor):
    """float64 that stays so: DPM-Solver and Euler convert the state to float32 in `step`."""

    def to(self, *args, **kwargs):
        return self


def network(x: torch.Tensor, t: torch.Tensor, shift: float) -> torch.Tensor:
    """A smooth bounded output that differs with timestep, element and branch (`shift`)."""
    phase = torch.linspace(-1, 1, x[0].numel(), dtype=torch.float64).view(x.shape[1:]).to(x.device, x.dtype)
    return torch.sin(0.8 * x + shift + phase + t.to(x.dtype) / 400)


def make(cls: type, steps: int, **options):
    """A scheduler with its steps set; DDIM clips by default.

    mu and sigmas, a function of the number of steps, are arguments of set_timesteps.
    """
    extra = {"clip_sample": False} if cls is DDIMScheduler else {}
    more = {"mu": options.pop("mu")} if "mu" in options else {}
    if "sigmas" in options:
        more["sigmas"] = options.pop("sigmas")(steps)
    betas = {} if cls is FlowMatchEulerDiscreteScheduler else BETAS
    scheduler = cls(**(betas | extra | options))
    scheduler.set_timesteps(steps, **more)
    return scheduler


def draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_diffusers(scheduler, w: float, eta: float = 0.0) -> torch.Tensor:
    """The inputs of the network at all steps, and the last state, by diffusers in float64.

    (n + 1, *SHAPE)
    """
    for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    states, old = [], None
    x = (draw(0) * getattr(scheduler, "init_noise_sigma", 1.0)).as_subclass(Unrounded)
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        states.append(scaled)
        pos, neg = network(scaled, t, 0.0), network(scaled, t, 0.4)
        p, more = pos + of_step(w, i) * (pos - neg), {}
        if eta:
            more = {"eta": eta, "variance_noise": draw(i + 1)}
        elif "sde" in scheduler.config.get("algorithm_type", ""):
            more = {"variance_noise": draw(i + 1).as_subclass(Unrounded)}
        with drawing(scheduler, i):
            if isinstance(scheduler, CogVideoXDPMScheduler):
                back = scheduler.timesteps[i - 1] if i else None
                x, old = scheduler.step(p, old, t, back, x)
            else:
                x = scheduler.step(p, t, x, **more).prev_sample
    return torch.stack([*states, x]).as_subclass(torch.Tensor)


def of_step(w: float | list[float], i: int) -> float:
    return w[i] if isinstance(w, list) else w


def drawing(scheduler, i: int):
    """Step i of a scheduler, with `draw(i + 1)` for all noise that it draws itself."""
    module = sys.modules[type(scheduler).__module__]
    return mock.patch.object(module, "randn_tensor", lambda *_, **__: draw(i + 1), create=True)


def by_table(solver: SolverSteps, dtype: torch.dtype = torch.float64, on: str = "cpu") -> torch.Tensor:
    """The same by `guided_step`; without guidance the negative branch is left out."""
    k = solver.k.to(on, dtype)
    x, previous = (draw(0) * solver.init_scale).to(on, dtype), {}
    states = [x]
    for i, t in enumerate(solver.timesteps.to(on)):
        pos, neg = network(x, t, 0.0), network(x, t, 0.4) if k[i, 6] else None
        noise = draw(i + 1).to(on, dtype) if solver.adds_noise else None
        x, x0 = guided_step(pos, neg, x, k[i : i + 1], noise=noise, **previous)
        if solver.keeps_x0:
            earlier = previous.get("x0_prev") if solver.keeps_two_x0 else None
            previous = {"x0_prev": x0, "x0_prev2": earlier}
        states.append(x)
    return torch.stack(states).double().cpu()


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference of any state over the largest element of that state."""
    return ((ours - theirs).abs().flatten(1).amax(1) / theirs.abs().flatten(1).amax(1)).max().item()


# The largest error of any state, relative to that state. Observed in float64: 4e-14, and 9e-13 from
# sigma = 4096, where diffusers' Euler takes its state from 4096 to 1 by a difference. In float32:
# 4.1e-6, and 1.3e-5 for the SDE's heun, whose extrapolation reaches farthest.
FLOAT64, FLOAT64_FROM_4096, FLOAT32 = 2e-13, 2e-12, 2e-5
