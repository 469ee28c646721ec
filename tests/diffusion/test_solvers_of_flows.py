"""Whole trajectories of flow solvers, UniPC and CogVideoX's solvers against `step` of diffusers.

The same as test_solvers.py does for DDIM, DPM-Solver++ and Euler.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler as CogDDIM
from diffusers import CogVideoXDPMScheduler as CogDPM
from diffusers import DDIMScheduler
from diffusers import DPMSolverMultistepScheduler as DPM
from diffusers import FlowMatchEulerDiscreteScheduler as FlowEuler
from diffusers import UniPCMultistepScheduler as UniPC
from solver_cases import FLOAT32, FLOAT64, FLOW, ZERO_SNR, by_diffusers, by_table, draw, error, make, network

from selfnpo_fast.diffusion.solvers import solver_steps
from selfnpo_fast.runtime.errors import UserError
from selfnpo_kernels import backends

V, SIGMA_MIN = {"prediction_type": "v_prediction"}, {"final_sigmas_type": "sigma_min"}
WITHOUT_CORRECTOR = {"disable_corrector": list(range(50))}
DYNAMIC = {"use_dynamic_shifting": True, "mu": 1.15}
PIPELINES = lambda steps: np.linspace(1, 1 / steps, steps)  # noqa: E731
TO_THE_END = {"lower_order_final": False}
SDE, HEUN = {"algorithm_type": "sde-dpmsolver++"}, {"solver_type": "heun"}
COG = ZERO_SNR | {"snr_shift_scale": 3.0}
SHIFT3, ORDER1, BH1 = FLOW | {"flow_shift": 3.0}, {"solver_order": 1}, {"solver_type": "bh1"}
CASES = {
    "flow": (FlowEuler, {}),
    "flow, shift": (FlowEuler, {"shift": 3.0}),
    "flow, dynamic shift": (FlowEuler, DYNAMIC),
    "flow, linear dynamic shift": (FlowEuler, DYNAMIC | {"time_shift_type": "linear"}),
    "flow, shift_terminal": (FlowEuler, {"shift": 3.0, "shift_terminal": 0.1}),
    "flow, the pipelines' sigmas": (FlowEuler, {"shift": 3.0, "sigmas": PIPELINES}),
    "flow, the pipelines' sigmas, dynamic shift": (FlowEuler, DYNAMIC | {"sigmas": PIPELINES}),
    "flow, karras": (FlowEuler, {"use_karras_sigmas": True}),
    "flow, exponential": (FlowEuler, {"use_exponential_sigmas": True}),
    "flow, beta": (FlowEuler, {"use_beta_sigmas": True}),
    "flow, inverted": (FlowEuler, {"invert_sigmas": True}),
    "flow, stochastic": (FlowEuler, {"shift": 3.0, "stochastic_sampling": True}),
    "flow dpm": (DPM, SHIFT3),
    "flow dpm, order 1": (DPM, SHIFT3 | ORDER1),
    "flow dpm, heun": (DPM, SHIFT3 | HEUN),
    "flow dpm, sde": (DPM, SHIFT3 | SDE),
    "flow dpm, sde, order 1": (DPM, SHIFT3 | SDE | ORDER1),
    "flow dpm, sde, heun": (DPM, SHIFT3 | SDE | HEUN),
    "flow dpm, dynamic shift": (DPM, FLOW | DYNAMIC),
    "flow dpm, sigma_min": (DPM, FLOW | SIGMA_MIN),
    "flow dpm, second order to the end": (DPM, FLOW | SIGMA_MIN | TO_THE_END),
    "flow unipc": (UniPC, SHIFT3),
    "flow unipc, shift 12": (UniPC, FLOW | {"flow_shift": 12.0}),
    "flow unipc, order 1, no corrector": (UniPC, SHIFT3 | ORDER1 | WITHOUT_CORRECTOR),
    "flow unipc, corrector at some steps": (UniPC, SHIFT3 | {"disable_corrector": [0, 2, 7]}),
    "flow unipc, second order to the end": (UniPC, SHIFT3 | SIGMA_MIN | TO_THE_END),
    "flow unipc, order 1": (UniPC, SHIFT3 | ORDER1),
    "flow unipc, no corrector": (UniPC, SHIFT3 | WITHOUT_CORRECTOR),
    "flow unipc, bh1": (UniPC, SHIFT3 | BH1 | SIGMA_MIN),
    "flow unipc, karras": (UniPC, FLOW | {"use_karras_sigmas": True}),
    "flow unipc, dynamic shift": (UniPC, FLOW | DYNAMIC | {"shift_terminal": 0.1}),
    "unipc": (UniPC, {}),
    "unipc, v": (UniPC, V),
    "unipc, sample": (UniPC, {"prediction_type": "sample"}),
    "unipc, order 1": (UniPC, ORDER1),
    "unipc, order 1, no corrector": (UniPC, ORDER1 | WITHOUT_CORRECTOR),
    "unipc, no corrector": (UniPC, V | WITHOUT_CORRECTOR),
    "unipc, corrector at some steps": (UniPC, {"disable_corrector": [0, 2, 7]}),
    "unipc, bh1": (UniPC, BH1 | SIGMA_MIN),
    "unipc, bh1, order 1": (UniPC, V | BH1 | ORDER1 | SIGMA_MIN),
    "unipc, second order to the end": (UniPC, SIGMA_MIN | TO_THE_END),
    "unipc, zero snr": (UniPC, ZERO_SNR),
    "unipc, trailing": (UniPC, V | {"timestep_spacing": "trailing"}),
    "unipc, leading": (UniPC, {"timestep_spacing": "leading", "steps_offset": 1}),
    "unipc, karras": (UniPC, {"use_karras_sigmas": True}),
    "cogvideox ddim": (CogDDIM, COG),
    "cogvideox ddim, snr_shift 1": (CogDDIM, COG | {"snr_shift_scale": 1.0}),
    "cogvideox ddim, linspace": (CogDDIM, COG | {"snr_shift_scale": 1.0, "timestep_spacing": "linspace"}),
    "cogvideox ddim, leading": (CogDDIM, COG | {"timestep_spacing": "leading", "set_alpha_to_one": False}),
    "cogvideox dpm": (CogDPM, COG),
    "cogvideox dpm, snr_shift 1": (CogDPM, COG | {"snr_shift_scale": 1.0}),
    "cogvideox dpm, linspace": (CogDPM, COG | {"snr_shift_scale": 1.0, "timestep_spacing": "linspace"}),
    "cogvideox dpm, leading": (CogDPM, COG | {"timestep_spacing": "leading", "set_alpha_to_one": False}),
    "cogvideox dpm, epsilon": (CogDPM, {"snr_shift_scale": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_whole_trajectories(name):
    cls, options = CASES[name]
    for steps, w in ((2, 2.0), (3, 0.0), (10, 0.0), (25, 2.0), (50, 6.5)):
        scheduler = make(cls, steps, **options)
        solver = solver_steps(scheduler, w=w)
        assert torch.equal(solver.timesteps, scheduler.timesteps)
        theirs = by_diffusers(scheduler, w)
        assert theirs.isfinite().all()
        # Observed 6e-15 in float64 and 2.4e-6 in float32.
        assert error(by_table(solver), theirs) < FLOAT64, steps
        assert error(by_table(solver, torch.float32), theirs) < FLOAT32, steps
        with backends.use("reference"):
            assert error(by_table(solver, torch.float32), theirs) < FLOAT32, steps
        assert solver.adds_noise == ("sde" in name or "stochastic" in name or "cogvideox dpm" in name)
        keeps_two = "unipc" in name and "order 1" not in name and "no corrector" not in name
        assert steps == 3 or solver.keeps_two_x0 == (keeps_two and steps > 3), steps
        assert solver.init_scale == 1


def test_the_timesteps_are_those_of_the_class():
    """UniPC tells the network whole numbers, flow Euler the levels themselves."""
    assert solver_steps(make(UniPC, 7, **SHIFT3)).timesteps.dtype == torch.int64
    timesteps = solver_steps(make(FlowEuler, 7, shift=3.0)).timesteps
    assert timesteps.dtype == torch.float32
    assert (timesteps != timesteps.round()).any()


@pytest.mark.parametrize("options", [BH1, SHIFT3 | BH1, BH1 | ORDER1])
def test_bh1_ends_at_the_last_x0(options):
    """diffusers multiplies an infinite B(h) by 0 at the end, which is not a number."""
    scheduler = make(UniPC, 8, **options)
    solver = solver_steps(scheduler, w=2.0)
    ours, theirs = by_table(solver), by_diffusers(scheduler, 2.0)
    assert error(ours[:-1], theirs[:-1]) < FLOAT64
    assert theirs[-1].isnan().all()
    x, t = ours[-2], solver.timesteps[-1]
    pos, neg = network(x, t, 0.0), network(x, t, 0.4)
    x0 = solver.k[-1, 0] * x + solver.k[-1, 1] * (pos + 2.0 * (pos - neg))
    torch.testing.assert_close(solver.k[-1, 2:6], torch.tensor([*solver.k[-1, :2], 0, 0], dtype=torch.float64))
    torch.testing.assert_close(ours[-1], x0)


@pytest.mark.parametrize(("cls", "options"), [(UniPC, SHIFT3), (FlowEuler, {}), (DDIMScheduler, {})])
def test_each_step_has_a_guidance_of_its_own(cls, options):
    w = [2.0, 0.0, 6.5, 0.5, 1.0]
    scheduler = make(cls, 5, **options)
    solver = solver_steps(scheduler, w=w)
    assert solver.k[:, 6].tolist() == w
    assert error(by_table(solver), by_diffusers(scheduler, w)) < FLOAT64
    with pytest.raises(UserError, match="w: 4 values for 5 steps; give one, or one for each step"):
        solver_steps(scheduler, w=w[:4])


@pytest.mark.parametrize(("cls", "options"), [(UniPC, SHIFT3), (DPM, SHIFT3 | SDE), (FlowEuler, {"shift": 3.0})])
def test_a_network_whose_sign_a_pipeline_turns(cls, options):
    """It gives x0 - eps, and diffusers' step is given its negative."""
    plain, turned = (solver_steps(make(cls, 9, **options), prediction_type=kind).k for kind in ("flow", "-flow"))
    assert torch.equal(plain, solver_steps(make(cls, 9, **options)).k)
    assert torch.equal(turned[:, [1, 3]], -plain[:, [1, 3]])
    assert torch.equal(turned[:, [0, 2, 4, 5, 7]], plain[:, [0, 2, 4, 5, 7]])


def test_inverted_levels_are_shares_of_x0():
    """Mochi's: x0 = x + sigma p, where the scheduler's own numbers are 1 - sigma."""
    scheduler = make(FlowEuler, 6, invert_sigmas=True)
    k, sigmas = solver_steps(scheduler).k, 1 - scheduler.sigmas.double()
    torch.testing.assert_close(k[:, :4], torch.stack([torch.ones(6), sigmas[:-1], torch.ones(6), -sigmas.diff()], 1))


@pytest.mark.parametrize(("cls", "options", "kind"), [(FlowEuler, {}, "epsilon"), (UniPC, {}, "flow")])
def test_a_network_of_another_kind_is_refused(cls, options, kind):
    with pytest.raises(UserError, match=f"{cls.__name__} does not go with a network whose output is {kind}"):
        solver_steps(make(cls, 4, **options), prediction_type=kind)


def test_cogvideox_starts_from_pure_noise():
    """Its first level has no signal: nothing of x is kept, and nothing divides by 0."""
    k = solver_steps(make(CogDPM, 50, **COG)).k[0]
    assert k[:3].tolist() == [0, -1, 0]
    assert draw(1).isfinite().all() and k.isfinite().all()
