"""Whole trajectories by coefficients against `step` of diffusers, in float64 and float32."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers import FlowMatchEulerDiscreteScheduler as FlowEuler
from diffusers import UniPCMultistepScheduler as UniPC
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import (
    BETAS,
    FLOAT32,
    FLOAT64,
    FLOAT64_FROM_4096,
    FLOW,
    PREDICTIONS,
    ZERO_SNR,
    by_diffusers,
    by_table,
    error,
    make,
)

from selfnpo_fast.diffusion.solvers import SolverSteps, solver_steps
from selfnpo_fast.runtime.errors import UserError
from selfnpo_kernels import backends


def check(cls: type, steps: int, w: float = 0.0, eta: float = 0.0, **options) -> SolverSteps:
    """Compare a trajectory with diffusers: in float64, and in float32 by two backends."""
    scheduler = make(cls, steps, **options)
    solver = solver_steps(scheduler, w=w, eta=eta)
    assert torch.equal(solver.timesteps, scheduler.timesteps)
    assert solver.k.dtype == torch.float64
    theirs = by_diffusers(scheduler, w, eta)
    from_4096 = cls is not DDIMScheduler and scheduler.config.rescale_betas_zero_snr
    assert error(by_table(solver), theirs) < (FLOAT64_FROM_4096 if from_4096 else FLOAT64)
    assert error(by_table(solver, torch.float32), theirs) < FLOAT32
    with backends.use("reference"):
        assert error(by_table(solver, torch.float32), theirs) < FLOAT32
    return solver


GUIDANCE = pytest.mark.parametrize("w", [0.0, 2.0, 6.5])
STEPS = pytest.mark.parametrize("steps", [1, 2, 3, 20])


@GUIDANCE
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_ddim(prediction_type, spacing, set_alpha_to_one, w):
    options = {"prediction_type": prediction_type, "timestep_spacing": spacing, "set_alpha_to_one": set_alpha_to_one}
    assert not check(DDIMScheduler, 20, w, **options).adds_noise
    assert check(DDIMScheduler, 7, w, eta=0.5, steps_offset=1, **options).adds_noise


@GUIDANCE
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_from_zero_terminal_snr(eta, w):
    """The first state is pure noise: x0 = -p, and nothing divides by alpha = 0."""
    solver = check(DDIMScheduler, 20, w, eta, **ZERO_SNR)
    assert solver.timesteps[0] == 999
    assert solver.k[0, :2].tolist() == [0, -1]


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_ddim_from_zero_terminal_snr_at_eta_1(steps):
    """Nothing of x is kept: the first step is forward diffusion of x0 = -p."""
    scheduler = make(DDIMScheduler, steps, **ZERO_SNR)
    a = scheduler.alphas_cumprod[999 - 1000 // steps].double()
    expected = torch.tensor([0, -1, 0, -(a**0.5), 0, (1 - a) ** 0.5, 0, 0], dtype=torch.float64)
    k = solver_steps(scheduler, eta=1.0).k[0]
    torch.testing.assert_close(k, expected, rtol=0, atol=5e-8)  # observed 1.1e-8, a root of 1e-16


def test_ddim_at_eta_1_is_ddpm():
    """From t to t - 1 it is the posterior of DDPM (Ho et al., Eq. 7): its mean and its variance."""
    scheduler = make(DDIMScheduler, 1000, timestep_spacing="linspace")
    beta = scheduler.betas.double()
    scheduler.alphas_cumprod = torch.cumprod(1 - beta, 0)
    a, a_next, beta = scheduler.alphas_cumprod[1:], scheduler.alphas_cumprod[:-1], beta[1:]
    k = solver_steps(scheduler, eta=1.0).k.flip(0)[1:].T
    of_x0, of_x = a_next.sqrt() * beta / (1 - a), (1 - beta).sqrt() * (1 - a_next) / (1 - a)
    expected = torch.stack([of_x0 * k[0] + of_x, of_x0 * k[1], (1 - a_next) / (1 - a) * beta])
    # Observed 1e-13.
    torch.testing.assert_close(torch.stack([k[2], k[3], k[5].square()]), expected, rtol=1e-12, atol=0)


DPM_SOLVER = {
    "epsilon": {},
    "v_prediction": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "zero_snr": ZERO_SNR,
    "zero_snr_epsilon": ZERO_SNR | {"prediction_type": "epsilon"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "second_order_to_the_end": {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    "sigma_min": {"final_sigmas_type": "sigma_min"},
    "sigma_min_euler": {"final_sigmas_type": "sigma_min", "lower_order_final": False, "euler_at_final": True},
    "sigma_zero": {"lower_order_final": False},
    "euler_at_final": {"euler_at_final": True},
    "first_order": {"solver_order": 1},
    "heun": {"solver_type": "heun"},
    "sde": {"algorithm_type": "sde-dpmsolver++"},
    "sde_v": {"algorithm_type": "sde-dpmsolver++"} | ZERO_SNR,
    "sde_first_order": {"algorithm_type": "sde-dpmsolver++", "solver_order": 1},
    "sde_heun": {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "use_karras_sigmas": True},
}


@GUIDANCE
@STEPS
@pytest.mark.parametrize("name", DPM_SOLVER)
def test_dpm_solver(name, steps, w):
    solver = check(DPMSolverMultistepScheduler, steps, w, **DPM_SOLVER[name])
    # The first step has no x0 before it, and the last is of first order in all but one of these.
    assert solver.keeps_x0 == ("first_order" not in name and steps >= (2 if name == "second_order_to_the_end" else 3))
    assert solver.adds_noise == (name.startswith("sde") and steps > 1)
    assert solver.init_scale == 1


@pytest.mark.parametrize("steps", [14, 15])
def test_dpm_solver_is_of_first_order_at_the_end_below_15_steps(steps):
    solver = check(DPMSolverMultistepScheduler, steps, final_sigmas_type="sigma_min")
    assert bool(solver.k[-1, 4]) == (steps == 15)


EULER = {
    "epsilon": {},
    "v_prediction": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "zero_snr": ZERO_SNR,
    "zero_snr_epsilon": ZERO_SNR | {"prediction_type": "epsilon"},
    "karras": {"use_karras_sigmas": True},
    "karras_range": {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 20.0},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "sigma_min": {"final_sigmas_type": "sigma_min"},
    "log_linear": {"interpolation_type": "log_linear"},
    "continuous": {"timestep_type": "continuous", "prediction_type": "v_prediction"},
}


@GUIDANCE
@STEPS
@pytest.mark.parametrize("name", EULER)
def test_euler(name, steps, w):
    solver = check(EulerDiscreteScheduler, steps, w, **EULER[name])
    assert not solver.keeps_x0
    assert not solver.adds_noise
    assert (solver.init_scale == 1) == (name == "leading")


@pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_timesteps_of_ones_own(cls):
    scheduler = make(cls, 1)
    scheduler.set_timesteps(timesteps=[990, 700, 650, 20])
    solver = solver_steps(scheduler, w=2.0)
    assert error(by_table(solver), by_diffusers(scheduler, 2.0)) < FLOAT64


SCHEDULES = st.fixed_dictionaries(
    {
        "beta_start": st.floats(1e-5, 1e-2),
        "beta_end": st.floats(1.1e-2, 0.05),
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace"]),
    }
)
KINDS = st.sampled_from(
    [
        (DDIMScheduler, {}),
        (DDIMScheduler, {"set_alpha_to_one": False}),
        (DPMSolverMultistepScheduler, {}),
        (DPMSolverMultistepScheduler, {"solver_type": "heun"}),
        (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (EulerDiscreteScheduler, {}),
        (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    ]
)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(KINDS, SCHEDULES, st.integers(1, 60), st.sampled_from(PREDICTIONS), st.sampled_from([0.0, 2.0]))
def test_any_schedule_and_number_of_steps(kind, schedule, steps, prediction_type, w):
    cls, options = kind
    scheduler = make(cls, steps, prediction_type=prediction_type, **schedule, **options)
    solver = solver_steps(scheduler, w=w)
    # Observed 3e-12, where beta_start is 1e-5 and the network predicts x0: 1 - alphas_cumprod keeps
    # 11 digits there.
    assert error(by_table(solver), by_diffusers(scheduler, w)) < 1e-11


def test_options_of_other_schedulers_are_no_reason_to_refuse():
    """diffusers keeps options of other classes: Euler of a clipping DDIM does not clip."""
    config = DDIMScheduler(**BETAS, clip_sample=True, thresholding=True).config
    scheduler = EulerDiscreteScheduler.from_config(config)
    assert scheduler.config["clip_sample"]
    scheduler.set_timesteps(5)
    solver = solver_steps(scheduler)
    assert error(by_table(solver), by_diffusers(scheduler, 0.0)) < FLOAT64


REFUSED = {
    "clip_sample": (DDIMScheduler, {"clip_sample": True}, ["clip_sample", "clip_sample=False"]),
    "thresholding": (DDIMScheduler, {"thresholding": True}, ["thresholding", "thresholding=False"]),
    "dpm_thresholding": (DPMSolverMultistepScheduler, {"thresholding": True}, ["thresholding=False"]),
    "order_3": (DPMSolverMultistepScheduler, {"solver_order": 3}, ["solver_order is 3", "solver_order=2"]),
    "dpmsolver": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        ["'dpmsolver'", "algorithm_type='dpmsolver++'"],
    ),
    "sde-dpmsolver": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        ["'sde-dpmsolver'", "algorithm_type='dpmsolver++'"],
    ),
    "flow_sigmas": (DPMSolverMultistepScheduler, {"use_flow_sigmas": True}, ["use_flow_sigmas=False"]),
    "flow": (DPMSolverMultistepScheduler, {"prediction_type": "flow_prediction"}, ["use_flow_sigmas=True"]),
    "variance": (DPMSolverMultistepScheduler, {"variance_type": "learned"}, ["variance_type is 'learned'"]),
    "original_sample": (EulerDiscreteScheduler, {"prediction_type": "original_sample"}, ["prediction_type"]),
    "ddim_epsilon_at_zero_snr": (DDIMScheduler, {"rescale_betas_zero_snr": True}, ["epsilon", "v_prediction"]),
    "ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}, ["EulerAncestral", "EulerDiscreteScheduler"]),
    "kdpm2_ancestral": (diffusers.KDPM2AncestralDiscreteScheduler, {}, ["KDPM2Ancestral", "EulerDiscreteScheduler"]),
    "heun": (diffusers.HeunDiscreteScheduler, {}, ["HeunDiscrete", "DDIMScheduler"]),
    "ddpm": (diffusers.DDPMScheduler, {}, ["DDPMScheduler", "DDIMScheduler"]),
    "pndm": (diffusers.PNDMScheduler, {}, ["PNDMScheduler", "DDIMScheduler"]),
    "lms": (diffusers.LMSDiscreteScheduler, {}, ["LMSDiscrete", "DDIMScheduler"]),
    "lcm": (diffusers.LCMScheduler, {}, ["LCMScheduler", "DDIMScheduler"]),
    "tcd": (diffusers.TCDScheduler, {}, ["TCDScheduler", "DDIMScheduler"]),
    "unipc_order_3": (UniPC, {"solver_order": 3}, ["solver_order is 3", "solver_order=2"]),
    "flow_unipc_order_3": (UniPC, FLOW | {"solver_order": 3}, ["solver_order is 3", "solver_order=2"]),
    "flow_dpm_order_3": (DPMSolverMultistepScheduler, FLOW | {"solver_order": 3}, ["solver_order is 3"]),
    "flow_dpm_beta": (DPMSolverMultistepScheduler, FLOW | {"use_beta_sigmas": True}, ["use_beta_sigmas=False"]),
    "flow_lcm": (diffusers.FlowMatchLCMScheduler, {}, ["FlowMatchLCM", "FlowMatchEuler"]),
    "deis": (diffusers.DEISMultistepScheduler, {}, ["DEISMultistep", "DPMSolverMultistepScheduler"]),
    "singlestep": (diffusers.DPMSolverSinglestepScheduler, {}, ["Singlestep", "DPMSolverMultistepScheduler"]),
    "unipc_epsilon_space": (UniPC, {"predict_x0": False}, ["predict_x0=True"]),
    "unipc_other_predictor": (UniPC, {"solver_p": DDIMScheduler()}, ["solver_p"]),
    "unipc_thresholding": (UniPC, {"thresholding": True}, ["thresholding=False"]),
    "flow_exponential": (UniPC, FLOW | {"use_exponential_sigmas": True}, ["use_exponential_sigmas=False"]),
    "flow_karras": (DPMSolverMultistepScheduler, FLOW | {"use_karras_sigmas": True}, ["use_karras_sigmas=False"]),
    "euler_flow": (EulerDiscreteScheduler, {"prediction_type": "flow_prediction"}, ["flow_prediction"]),
    "flow_heun": (diffusers.FlowMatchHeunDiscreteScheduler, {}, ["FlowMatchHeun", "FlowMatchEuler"]),
    "inverted_and_stochastic": (
        FlowEuler,
        {"invert_sigmas": True, "stochastic_sampling": True},
        ["invert_sigmas is True", "invert_sigmas=False"],
    ),
}


def assert_refused(words: list[str], scheduler, **arguments) -> None:
    with pytest.raises(UserError) as caught:
        solver_steps(scheduler, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.filterwarnings("ignore:algorithm_type:FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_linear_is_refused_by_name(name):
    cls, options, words = REFUSED[name]
    betas = {} if cls.__name__.startswith("FlowMatch") else BETAS
    extra = {"clip_sample": False} if cls is DDIMScheduler else {}
    scheduler = cls(**(betas | extra | options))
    scheduler.set_timesteps(5)
    assert_refused(words, scheduler)


def test_a_subclass_may_step_differently():
    class Clipping(EulerDiscreteScheduler):
        pass

    assert_refused(["Clipping", "EulerDiscreteScheduler"], make(Clipping, 5))


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_out_of_range(eta):
    assert_refused(["eta", str(eta), "0 to 1"], make(DDIMScheduler, 5), eta=eta)


def test_eta_belongs_to_ddim():
    assert_refused(["eta", "DDIMScheduler"], make(EulerDiscreteScheduler, 5), eta=0.5)


def test_churn_is_refused_by_name():
    assert_refused(["s_churn: 10", "sde-dpmsolver++"], make(EulerDiscreteScheduler, 5), s_churn=10.0)


@pytest.mark.parametrize("cls", [UniPC, FlowEuler])
def test_eta_belongs_to_no_other(cls):
    assert_refused(["eta", "DDIMScheduler"], make(cls, 5), eta=0.5)


def test_steps_have_to_be_set():
    assert_refused(["set_timesteps"], FlowEuler())
    assert_refused(["set_timesteps"], DDIMScheduler(**BETAS, clip_sample=False))


@pytest.mark.parametrize(("steps", "options", "timestep"), [(61, {"timestep_spacing": "trailing"}, -1), (1, {}, 2000)])
def test_ddim_stays_among_the_training_timesteps(steps, options, timestep):
    """For some numbers of steps the trailing grid of diffusers has a timestep below 0."""
    assert_refused([f"timestep {timestep}"], make(DDIMScheduler, steps, **({"steps_offset": 2000} | options)))


def test_steps_without_finite_coefficients_are_named():
    """Steps where diffusers goes on with NaN: without noise, or between equal noise levels."""
    clean = {"trained_betas": [0.0, *[0.02] * 999]}
    assert_refused(["step 5 of 5", "timestep 0"], make(DDIMScheduler, 5, prediction_type="sample", **clean))
    assert solver_steps(make(DDIMScheduler, 5, **clean)).k[-1].tolist() == [1, 0, 1, 0, 0, 0, 0, 0]
    twice = make(DPMSolverMultistepScheduler, 1)
    twice.set_timesteps(timesteps=[900, 500, 500, 100])
    assert_refused(["step 3 of 4", "timestep 500"], twice)
