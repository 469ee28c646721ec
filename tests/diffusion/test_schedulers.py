"""Which scheduler a solver draws with, and whose noise levels it has."""

from __future__ import annotations

import logging
import math

import diffusers
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from solver_cases import BETAS, FLOAT32, FLOW, by_table, draw, error, network

from selfnpo_fast.diffusion.schedulers import described, new_scheduler
from selfnpo_fast.diffusion.solvers import prediction_type_of, solver_steps
from selfnpo_fast.runtime import console
from selfnpo_fast.runtime.errors import UserError

COGVIDEOX = {
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
    "snr_shift_scale": 3.0, "clip_sample": False,
}  # fmt: skip


@pytest.fixture
def lines(caplog, monkeypatch):
    """The lines that are logged from now on."""
    monkeypatch.setattr(console, "_said", set())
    caplog.set_level(logging.INFO, "selfnpo")
    return caplog


OWN = {
    "dpm++, order 2, ode": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpm++, order 1, ode": (DPMSolverMultistepScheduler, {"solver_order": 1}),
    "dpm++, order 2, sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "ddim": (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}),
    "euler": (EulerDiscreteScheduler, {"use_beta_sigmas": True}),
    "unipc, order 2": (UniPCMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc, order 1": (UniPCMultistepScheduler, FLOW | {"solver_order": 1}),
}
COGVIDEOX_OWN = {"ddim": CogVideoXDDIMScheduler, "dpm++, order 2, sde": CogVideoXDPMScheduler}


@pytest.mark.parametrize("name", OWN)
def test_the_models_own_scheduler_is_copied_as_it_is_configured(lines, name):
    cls, options = OWN[name]
    own = cls(**BETAS, **options)
    scheduler = new_scheduler("own", own)
    scheduler.set_timesteps(3)
    assert own.num_inference_steps is None, "the model's is not touched"
    assert type(scheduler) is cls
    assert dict(scheduler.config) == dict(own.config)
    assert described(scheduler) == name
    assert not lines.messages


@pytest.mark.parametrize("name", COGVIDEOX_OWN)
def test_cogvideoxs_own_scheduler_keeps_its_noise_levels(lines, name):
    own = COGVIDEOX_OWN[name](**BETAS, **COGVIDEOX)
    scheduler = new_scheduler("own", own)
    assert described(scheduler) == name
    assert torch.equal(scheduler.alphas_cumprod, own.alphas_cumprod)
    assert scheduler.config.snr_shift_scale == 3.0
    assert not lines.messages


def test_pndm_becomes_dpm_solver_on_its_noise_schedule_and_says_so(lines):
    own = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, timestep_spacing="trailing")
    for _ in range(2):
        scheduler = new_scheduler("own", own)
    assert described(scheduler) == "dpm++, order 2, ode"
    assert torch.equal(scheduler.alphas_cumprod, own.alphas_cumprod)
    assert (scheduler.config.timestep_spacing, scheduler.config.steps_offset) == ("trailing", 1)
    assert lines.messages == ["solver: the model's PNDMScheduler is drawn as DPM-Solver++(2M) on its noise schedule"]


REFUSED = {
    "order 3": (DPMSolverMultistepScheduler, {"solver_order": 3}),
    "unipc, solver_order is 3": (UniPCMultistepScheduler, {"solver_order": 3}),
    "dpmsolver": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    **{
        name: (getattr(diffusers, f"{name}Scheduler"), {})
        for name in (
            "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete", "LCM", "TCD", "DDPM",
            "DEISMultistep", "DPMSolverSinglestep", "KDPM2Discrete", "DPMSolverSDE",
        )
        if getattr(diffusers, f"{name}Scheduler").__module__.startswith("diffusers.schedulers")
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_other_schedulers_are_refused_by_name_and_dpm_solver_is_the_mend(name):
    cls, options = REFUSED[name]
    own = cls(**BETAS, **options)
    with pytest.raises(UserError, match=r"solver='dpm\+\+', DPM-Solver\+\+\(2M\) on its noise schedule") as caught:
        new_scheduler("own", own)
    assert (cls.__name__ if not options else name.rpartition(" ")[2]) in str(caught.value)
    assert "\n" not in str(caught.value)
    mended = new_scheduler("dpm++", own)
    mended.set_timesteps(4)
    assert solver_steps(mended).k.isfinite().all()
    assert described(mended) == "dpm++, order 2, ode"


FLOWS = {
    "euler": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, 3.0),
    "euler, dynamic": (FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}, 1.0),
    "heun": (diffusers.FlowMatchHeunDiscreteScheduler, {"shift": 5.0}, 5.0),
    "unipc": (UniPCMultistepScheduler, FLOW | {"flow_shift": 5.0}, 5.0),
    "dpm++": (DPMSolverMultistepScheduler, FLOW | {"flow_shift": 2.0, "solver_order": 1}, 2.0),
}


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("solver", ["euler", "dpm++", "unipc"])
def test_a_flow_model_is_drawn_by_every_solver_of_flows_with_its_shift(solver, name):
    cls, options, shift = FLOWS[name]
    own = cls(**options)
    scheduler = new_scheduler(solver, own)
    assert described(scheduler) == {"dpm++": "dpm++, order 2, ode", "unipc": "unipc, order 2"}.get(solver, solver)
    assert prediction_type_of(scheduler) == "flow"
    assert scheduler.config.get("use_dynamic_shifting", False) == options.get("use_dynamic_shifting", False)
    scheduler.set_timesteps(8, **({"mu": math.log(3)} if name == "euler, dynamic" else {}))
    k = solver_steps(scheduler).k
    assert k.isfinite().all()
    # A level of a flow is -k1: shifted, of evenly spaced ones.
    level = -k[:, 1]
    unshifted = level / ((3 if name == "euler, dynamic" else shift) * (1 - level) + level)
    torch.testing.assert_close(unshifted.diff(), unshifted.diff().mean().expand(7), rtol=0.02, atol=5e-3)


def test_a_flow_model_has_no_ddim_and_no_flow_euler_is_drawn_on_a_diffusion_schedule():
    flow = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match=r"solver: ddim needs a diffusion schedule, .* expected one of dpm\+\+, euler"):
        new_scheduler("ddim", flow)
    with pytest.raises(UserError, match="solver: 'heun' is not supported; expected one of dpm"):
        new_scheduler("heun", flow)
    with pytest.raises(UserError, match=r"FlowMatchHeunDiscreteScheduler is not served .* give solver='euler'"):
        new_scheduler("own", diffusers.FlowMatchHeunDiscreteScheduler())
    with pytest.raises(UserError, match=r"solver_order is 3, which .*; or give solver='euler'") as caught:
        new_scheduler("own", UniPCMultistepScheduler(**FLOW, solver_order=3))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="invert_sigmas; give solver='own'"):
        new_scheduler("unipc", FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    assert type(new_scheduler("euler", DDIMScheduler(**BETAS))) is EulerDiscreteScheduler


def test_flow_options_that_another_solver_does_not_have_are_said(lines):
    new_scheduler("dpm++", FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1))
    assert lines.messages == ["solver: dpm++ has no shift_terminal=0.1 of the model's FlowMatchEulerDiscreteScheduler"]
    lines.clear()
    assert new_scheduler("unipc", FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)).config.shift_terminal == 0.1
    assert not lines.messages


def test_a_scheduler_without_noise_levels_is_refused_by_every_solver():
    other = diffusers.EDMEulerScheduler()
    for solver in ("own", "dpm++", "ddim"):
        with pytest.raises(UserError, match="EDMEulerScheduler") as caught:
            new_scheduler(solver, other)
        assert "solver='dpm++'" not in str(caught.value)


@pytest.mark.parametrize("solver", ["dpm++", "ddim", "euler", "unipc"])
def test_the_noise_levels_are_the_models_whatever_its_class_calls_them(solver):
    """snr_shift_scale is known to CogVideoX's schedulers alone."""
    own = CogVideoXDDIMScheduler(**BETAS, **COGVIDEOX)
    scheduler = new_scheduler(solver, own)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), own.alphas_cumprod, rtol=1e-6, atol=1e-7)
    dropped = type(scheduler).from_config(own.config)
    assert (dropped.alphas_cumprod - own.alphas_cumprod).abs().max() > 0.2
    scheduler.set_timesteps(6)
    assert solver_steps(scheduler).k.isfinite().all()


def test_ddim_on_carried_levels_draws_what_the_models_own_scheduler_draws():
    own = CogVideoXDDIMScheduler(**BETAS, **COGVIDEOX)
    scheduler = new_scheduler("ddim", own)
    for each in (own, scheduler):
        each.set_timesteps(8)
    states, x = [draw(0)], draw(0)
    for t in own.timesteps:
        pos, neg = network(x, t, 0.0), network(x, t, 0.4)
        x = own.step(pos + 2.0 * (pos - neg), t, x)[0]
        states.append(x)
    assert error(by_table(solver_steps(scheduler, w=2.0), torch.float32), torch.stack(states)) < FLOAT32


def test_dpm_solver_on_carried_levels_steps_between_them():
    """Its sigmas at the visited timesteps are sigma / alpha of the model's own levels."""
    own = CogVideoXDDIMScheduler(**BETAS, **COGVIDEOX | {"rescale_betas_zero_snr": False})
    scheduler = new_scheduler("dpm++", own)
    scheduler.set_timesteps(8)
    levels = own.alphas_cumprod[scheduler.timesteps]
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), ((1 - levels) / levels).sqrt(), rtol=1e-5, atol=0)


def test_options_that_another_solver_does_not_have_are_said(lines):
    own = EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True, sigma_max=20.0)
    new_scheduler("ddim", own)
    assert lines.messages == [
        "solver: ddim has no use_karras_sigmas=True, sigma_max=20.0 of the model's EulerDiscreteScheduler"
    ]
    lines.clear()
    new_scheduler("dpm++", EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True))
    new_scheduler("euler", DDPMScheduler(**BETAS))
    assert not lines.messages


def test_a_config_that_makes_no_scheduler_is_one_line():
    own = DDPMScheduler(beta_schedule="sigmoid")
    with pytest.raises(UserError, match="solver: euler cannot be made from the model's DDPMScheduler: sigmoid"):
        new_scheduler("euler", own)
