"""Whole trajectories of diffusers' schedulers by `guided_step`, in every backend.

test_solvers.py tests all options of the schedulers.
"""

from __future__ import annotations

import cases
import pytest
import solver_cases as solvers
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from selfnpo_fast.diffusion.solvers import solver_steps

V = {"prediction_type": "v_prediction"}
SCHEDULERS = {
    "ddim": (DDIMScheduler, {}),
    "ddim-v": (DDIMScheduler, V),
    "ddim-zero-snr": (DDIMScheduler, solvers.ZERO_SNR),
    "dpm": (DPMSolverMultistepScheduler, {}),
    "dpm-v": (DPMSolverMultistepScheduler, V),
    "dpm-zero-snr": (DPMSolverMultistepScheduler, solvers.ZERO_SNR),
    "dpm-sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-v": (EulerDiscreteScheduler, V),
    "euler-zero-snr": (EulerDiscreteScheduler, solvers.ZERO_SNR),
}


def test_the_network_computes_where_the_state_is():
    """On a device that is not the CPU: here one without memory."""
    x, t = torch.empty(solvers.SHAPE, device="meta"), torch.empty((), device="meta")
    assert solvers.network(x, t, 0.4).device.type == "meta"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_trajectories_in_every_backend(backend, name):
    cls, options = SCHEDULERS[name]
    scheduler = solvers.make(cls, 8, **options)
    ours = solvers.by_table(solver_steps(scheduler, w=6.5), torch.float32, on=cases.device(backend))
    assert solvers.error(ours, solvers.by_diffusers(scheduler, 6.5)) < solvers.FLOAT32
