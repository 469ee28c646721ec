"""Grids and coefficients against diffusers' own DDIM scheduler and closed forms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from selfnpo_fast import diffusion
from selfnpo_fast.diffusion.schedule import (
    NoiseSchedule,
    ddim_coefficients,
    ddim_grid,
    forward_coefficients,
    renoise_coefficients,
    x0_coefficients,
)
from selfnpo_fast.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
TYPES = ("epsilon", "v_prediction", "sample")


def scheduler(prediction_type: str, **changes) -> DDIMScheduler:
    return tiny.scheduler(prediction_type, timestep_spacing="trailing", **changes)


def test_grid_is_the_authors():
    assert ddim_grid(1000, 25).tolist() == list(range(39, 1000, 40))


@pytest.mark.parametrize("steps", [0, 3, 1001, -1])
def test_grid_refuses_what_does_not_divide(steps):
    with pytest.raises(UserError, match=r"rollout\.grid_steps"):
        ddim_grid(1000, steps)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_ddim_steps_match_diffusers(prediction_type):
    theirs = scheduler(prediction_type)
    theirs.set_timesteps(25)
    assert theirs.timesteps.tolist() == ddim_grid(1000, 25).flip(0).tolist()
    schedule = NoiseSchedule.from_scheduler(theirs)
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for t in theirs.timesteps[:-1]:
        out = theirs.step(p, t, x)
        k = ddim_coefficients(schedule, t[None], t[None] - 40)[0]
        torch.testing.assert_close(k[0] * x + k[1] * p, out.pred_original_sample, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(k[2] * x + k[3] * p, out.prev_sample, rtol=1e-6, atol=1e-6)


def exact_output(schedule: NoiseSchedule, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The output of a perfect network for x_t = alpha_t x0 + sigma_t noise."""
    alpha, sigma = schedule.alpha_sigma(t)
    return {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}[schedule.prediction_type]


@pytest.mark.parametrize("prediction_type", TYPES)
@given(t=st.integers(1, 999), back=st.integers(1, 999), seed=st.integers(0, 2**32))
def test_exact_outputs_give_exact_states(prediction_type, t, back, seed):
    """For all prediction types x0 and the DDIM step recover x0 and x_{t_prev} of the same noise."""
    schedule = NoiseSchedule.from_scheduler(scheduler(prediction_type))
    x0, noise = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    step, previous = torch.tensor([t]), torch.tensor([max(t - back, 0)])
    k = forward_coefficients(schedule, step)[0]
    x_t = k[0] * x0 + k[1] * noise
    p = exact_output(schedule, x0, noise, step)
    k = ddim_coefficients(schedule, step, previous)[0]
    torch.testing.assert_close(k[0] * x_t + k[1] * p, x0, rtol=1e-9, atol=1e-9)
    alpha, sigma = schedule.alpha_sigma(previous)
    torch.testing.assert_close(k[2] * x_t + k[3] * p, alpha * x0 + sigma * noise, rtol=1e-9, atol=1e-9)


@given(t=st.integers(0, 998), gap=st.integers(1, 999))
def test_renoising_reaches_the_forward_process(t, gap):
    """Eq. 16 from x_t = alpha_t x0 + sigma_t eps has mean alpha_s x0 and variance sigma_s^2."""
    schedule = NoiseSchedule.from_scheduler(scheduler("epsilon"))
    t_, s_ = torch.tensor([t]), torch.tensor([min(t + gap, 999)])
    ratio, fresh = renoise_coefficients(schedule, t_, s_)[0]
    alpha_t, sigma_t = schedule.alpha_sigma(t_)
    alpha_s, sigma_s = schedule.alpha_sigma(s_)
    torch.testing.assert_close(ratio * alpha_t, alpha_s, rtol=1e-12, atol=0)
    torch.testing.assert_close((ratio * sigma_t) ** 2 + fresh**2, sigma_s**2, rtol=1e-9, atol=1e-12)


def test_zero_terminal_snr_is_finite_for_v_prediction():
    schedule = NoiseSchedule.from_scheduler(scheduler("v_prediction", rescale_betas_zero_snr=True))
    assert schedule.alphas_cumprod[-1] == 0
    grid = ddim_grid(1000, 25)
    assert x0_coefficients(schedule, grid).isfinite().all()
    assert ddim_coefficients(schedule, grid[1:], grid[:-1]).isfinite().all()
    assert renoise_coefficients(schedule, grid[:-1], torch.full_like(grid[:-1], 999)).isfinite().all()


def test_epsilon_at_zero_terminal_snr_is_refused():
    with pytest.raises(UserError, match="zero terminal SNR"):
        NoiseSchedule.from_scheduler(scheduler("epsilon", rescale_betas_zero_snr=True))


def test_unknown_prediction_type_is_refused():
    with pytest.raises(UserError, match="flow"):
        NoiseSchedule(torch.linspace(0.99, 0.01, 10), "flow")


def test_the_legend_of_equations_names_code_that_is_there():
    """Each `file: name` in the docstring of the package is a file that defines the name."""
    entries = re.findall(r"(\S+\.py)(?:: ([\w.]+))?$", diffusion.__doc__, re.MULTILINE)
    assert len(entries) >= 10
    for file, name in entries:
        text = (ROOT / file).read_text()
        for part in filter(None, name.split(".")):
            assert re.search(rf"\b(def|class) {part}\b", text), f"{file}: {name}"
