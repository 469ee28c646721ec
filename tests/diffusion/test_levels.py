"""Noise levels, grids and coefficients against diffusers' own schedulers and closed forms."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given
from hypothesis import strategies as st

from selfnpo_fast import diffusion
from selfnpo_fast.diffusion.levels import (
    Levels,
    ddim_coefficients,
    forward_coefficients,
    renoise_coefficients,
    x0_coefficients,
)
from selfnpo_fast.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
TYPES = ("epsilon", "v_prediction", "sample")


def scheduler(prediction_type: str, **changes) -> DDIMScheduler:
    return tiny.scheduler(prediction_type, timestep_spacing="trailing", **changes)


def levels_grid(steps: int) -> torch.Tensor:
    return Levels.of(scheduler("epsilon")).grid(steps)


def test_grid_is_the_authors():
    assert levels_grid(25).tolist() == list(range(39, 1000, 40))


@pytest.mark.parametrize("steps", [0, 3, 1001, -1])
def test_grid_refuses_what_does_not_divide(steps):
    with pytest.raises(UserError, match=r"rollout\.grid_steps"):
        levels_grid(steps)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_ddim_steps_match_diffusers(prediction_type):
    theirs = scheduler(prediction_type)
    theirs.set_timesteps(25)
    assert theirs.timesteps.tolist() == levels_grid(25).flip(0).tolist()
    schedule = Levels.of(theirs)
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for t in theirs.timesteps[:-1]:
        out = theirs.step(p, t, x)
        k = ddim_coefficients(schedule, t[None], t[None] - 40)[0]
        torch.testing.assert_close(k[0] * x + k[1] * p, out.pred_original_sample, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(k[2] * x + k[3] * p, out.prev_sample, rtol=1e-6, atol=1e-6)


def exact_output(schedule: Levels, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The output of a perfect network for x_t = alpha_t x0 + sigma_t noise."""
    alpha, sigma = schedule.alpha_sigma(t)
    outputs = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}
    return (outputs | {"flow": noise - x0, "-flow": x0 - noise})[schedule.prediction]


FLOW = FlowMatchEulerDiscreteScheduler


def cogvideox(cls=CogVideoXDDIMScheduler, **changes):
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0}
    return cls(**(options | changes))


LEVELS = {
    **{kind: Levels.of(scheduler(kind)) for kind in TYPES},
    "cogvideox": Levels.of(cogvideox()),
    "flow": Levels.of(FLOW(shift=3.0)),
    "-flow": Levels.of(FLOW(shift=3.0, invert_sigmas=True)),
}


@pytest.mark.parametrize("kind", LEVELS)
@given(t=st.integers(1, 999), back=st.integers(1, 999), seed=st.integers(0, 2**32))
def test_exact_outputs_give_exact_states(kind, t, back, seed):
    """For all prediction types x0 and the DDIM step recover x0 and x_{t_prev} of the same noise."""
    schedule = LEVELS[kind]
    x0, noise = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    step, previous = torch.tensor([t]), torch.tensor([max(t - back, 0)])
    k = forward_coefficients(schedule, step)[0]
    x_t = k[0] * x0 + k[1] * noise
    p = exact_output(schedule, x0, noise, step)
    k = ddim_coefficients(schedule, step, previous)[0]
    torch.testing.assert_close(k[0] * x_t + k[1] * p, x0, rtol=1e-9, atol=1e-9)
    alpha, sigma = schedule.alpha_sigma(previous)
    torch.testing.assert_close(k[2] * x_t + k[3] * p, alpha * x0 + sigma * noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "cogvideox", "flow"])
@given(t=st.integers(0, 998), gap=st.integers(1, 999))
def test_renoising_reaches_the_forward_process(kind, t, gap):
    """Eq. 16 from x_t = alpha_t x0 + sigma_t eps has mean alpha_s x0 and variance sigma_s^2."""
    schedule = LEVELS[kind]
    t_, s_ = torch.tensor([t]), torch.tensor([min(t + gap, 999)])
    ratio, fresh = renoise_coefficients(schedule, t_, s_)[0]
    alpha_t, sigma_t = schedule.alpha_sigma(t_)
    alpha_s, sigma_s = schedule.alpha_sigma(s_)
    torch.testing.assert_close(ratio * alpha_t, alpha_s, rtol=1e-12, atol=0)
    torch.testing.assert_close((ratio * sigma_t) ** 2 + fresh**2, sigma_s**2, rtol=1e-9, atol=1e-12)


def test_zero_terminal_snr_is_finite_for_v_prediction():
    schedule = Levels.of(scheduler("v_prediction", rescale_betas_zero_snr=True))
    assert schedule.alphas_cumprod[-1] == 0
    grid = levels_grid(25)
    assert x0_coefficients(schedule, grid).isfinite().all()
    assert ddim_coefficients(schedule, grid[1:], grid[:-1]).isfinite().all()
    assert renoise_coefficients(schedule, grid[:-1], torch.full_like(grid[:-1], 999)).isfinite().all()


def test_epsilon_at_zero_terminal_snr_is_refused():
    with pytest.raises(UserError, match="zero terminal SNR"):
        Levels.of(scheduler("epsilon", rescale_betas_zero_snr=True))


def test_unknown_prediction_type_is_refused():
    with pytest.raises(UserError, match="flow"):
        Levels.variance_preserving(torch.linspace(0.99, 0.01, 10), "flow")
    with pytest.raises(UserError, match=r"'epsilon' is not supported; expected one of flow, -flow"):
        Levels.flow(torch.linspace(0, 1, 10), "epsilon")
    with pytest.raises(UserError, match="FlowMatchHeunDiscreteScheduler has no alphas_cumprod and no flow"):
        Levels.of(FlowMatchHeunDiscreteScheduler())


# Flows

DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
FLOWS = {
    "plain": {},
    "shifted": {"shift": 3.0},
    "wan": {"shift": 8.0},
    "dynamic": DYNAMIC,
    "linear": DYNAMIC | {"time_shift_type": "linear"},
    "inverted": {"shift": 3.0, "invert_sigmas": True},
}
TOKENS = 1024


def diffusers_levels(theirs, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sigma with the end of the trajectory, time) of the steps of diffusers' pipelines, ascending."""
    config = theirs.config
    sizes = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    mu = {"mu": calculate_shift(TOKENS, *sizes)} if config.use_dynamic_shifting else {}
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), **mu)
    return theirs.sigmas.flip(0).double(), theirs.timesteps.flip(0).double()


@pytest.mark.parametrize("options", FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("steps", [10, 25, 50])
def test_a_flows_grid_is_that_of_diffusers_pipelines(options, steps):
    theirs = FLOW(**options)
    levels = Levels.of(theirs, TOKENS)
    sigma, time = diffusers_levels(theirs, steps)
    grid = torch.cat([torch.zeros(1, dtype=torch.int64), levels.grid(steps)])
    noise = 1 - sigma if options.get("invert_sigmas") else sigma
    torch.testing.assert_close(levels.sigma[grid], noise, rtol=0, atol=5e-7)  # diffusers' are float32
    torch.testing.assert_close(levels.time[grid[1:]], time, rtol=0, atol=5e-4)
    assert levels.sigma[0] == 0
    assert levels.alpha[-1] == 0


@pytest.mark.parametrize("options", FLOWS.values(), ids=FLOWS)
def test_a_flows_steps_are_diffusers(options):
    """Euler's step between grid levels; k2 = 1 and k3 is the difference of the sigmas."""
    theirs = FLOW(**options)
    levels = Levels.of(theirs, TOKENS)
    diffusers_levels(theirs, 25)
    grid = torch.cat([torch.zeros(1, dtype=torch.int64), levels.grid(25)]).flip(0)
    x, p = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step, t in enumerate(theirs.timesteps):
        expected = theirs.step(p, t, x).prev_sample
        k = ddim_coefficients(levels, grid[step : step + 1], grid[step + 1 : step + 2])[0]
        torch.testing.assert_close(k[2] * x + k[3] * p, expected.double(), rtol=0, atol=2e-6)
        assert abs(k[2] - 1) < 1e-15


def test_shift_terminal_ends_where_diffusers_ends():
    theirs = FLOW(shift=3.0, shift_terminal=0.1)
    sigma, _ = diffusers_levels(theirs, 1000)
    levels = Levels.of(theirs)
    torch.testing.assert_close(levels.sigma[1:], sigma[2:], rtol=0, atol=5e-7)
    assert sigma[1].item() == pytest.approx(0.1)


@pytest.mark.parametrize("cls", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_flow_sigmas_of_other_solvers(cls):
    """Their alphas_cumprod means nothing."""
    options = {"use_flow_sigmas": True, "flow_shift": 5.0}
    theirs = cls(prediction_type="flow_prediction", **options)
    assert theirs.alphas_cumprod[-1] < 0.01
    levels = Levels.of(theirs)
    assert levels.prediction == "flow"
    assert torch.equal(levels.sigma, Levels.of(FLOW(shift=5.0)).sigma)
    # Their own steps are the shift of other shares, which lie between those of the levels.
    theirs.set_timesteps(4)
    first = 1.0 if cls is UniPCMultistepScheduler else 0.999
    share = torch.tensor([first - 0.999 * i / 4 for i in range(4)], dtype=torch.float64) * 1000 - 1
    low, part = share.floor().long(), share.frac()
    between = levels.sigma[low] * (1 - part) + levels.sigma[(low + 1).clamp(max=999)] * part
    torch.testing.assert_close(between, theirs.sigmas[:4].double(), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"^prediction_type: 'epsilon' is not supported with use_flow_sigmas"):
        Levels.of(cls(prediction_type="epsilon", **options))


def test_dynamic_shifting_needs_the_number_of_tokens():
    with pytest.raises(UserError, match="use_dynamic_shifting"):
        Levels.of(FLOW(**DYNAMIC))


@pytest.mark.parametrize(("shift", "share"), [(1.0, 0.1), (3.0, 0.25), (5.0, 0.36), (8.0, 0.47)])
def test_a_shift_puts_levels_at_high_noise(shift, share):
    assert (Levels.of(FLOW(shift=shift)).sigma > 0.9).double().mean().item() == pytest.approx(share, abs=0.006)


def test_renoising_a_flow_is_its_closed_form():
    """r = (1 - s) / (1 - t), c^2 = (s - t)(s + t - 2 s t) / (1 - t)^2; two steps are one."""
    levels = Levels.of(FLOW(shift=3.0))
    t, s = torch.meshgrid(torch.arange(0, 999, 9), torch.arange(0, 1000, 9), indexing="ij")
    a, b = levels.sigma[t], levels.sigma[s]
    above = s > t
    r, c = renoise_coefficients(levels, t, s).unbind(-1)
    torch.testing.assert_close(r[above], ((1 - b) / (1 - a))[above], rtol=1e-12, atol=1e-15)
    squared = (b - a) * (b + a - 2 * a * b) / (1 - a).square()
    torch.testing.assert_close(c.square()[above], squared[above], rtol=1e-9, atol=1e-14)
    one, two, three = (torch.tensor([i]) for i in (100, 400, 999))
    (r1, c1), (r2, c2), (r3, c3) = (
        renoise_coefficients(levels, *pair)[0] for pair in ((one, two), (two, three), (one, three))
    )
    torch.testing.assert_close(r1 * r2, r3)
    torch.testing.assert_close((r2 * c1).square() + c2.square(), c3.square())
    assert (r3, c3) == (0, 1)


@pytest.mark.parametrize("kind", ["cogvideox", "flow", "-flow"])
def test_nothing_divides_by_0_where_alpha_is_0(kind):
    levels = LEVELS[kind]
    assert levels.alpha[-1] == 0
    every = torch.arange(1000)
    grid = torch.cat([every[:1], levels.grid(25)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert x0_coefficients(levels, every).isfinite().all()
        assert ddim_coefficients(levels, grid, torch.cat([grid[:1], grid[:-1]])).isfinite().all()
        t = grid[:, None].expand(-1, 1000)
        renoise = renoise_coefficients(levels, t, every.expand_as(t))
    assert renoise.isfinite().all()
    assert (renoise[-1] == 0).all()
    assert torch.equal(renoise[:-1, -1], torch.tensor([0.0, 1.0], dtype=torch.float64).expand(25, 2))


@pytest.mark.parametrize("cls", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_cogvideox_levels_are_its_schedulers(cls, shift):
    """`add_noise` of the scheduler, float64: both shifts move the signal to noise ratio."""
    theirs = cogvideox(cls, snr_shift_scale=shift)
    levels = Levels.of(theirs)
    t = torch.arange(1000)
    one, zero = torch.ones(1000, dtype=torch.float64), torch.zeros(1000, dtype=torch.float64)
    torch.testing.assert_close(levels.alpha, theirs.add_noise(one, zero, t), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(levels.sigma, theirs.add_noise(zero, one, t), rtol=1e-9, atol=1e-12)
    assert levels.sigma[0].item() == pytest.approx({1.0: 0.029, 3.0: 0.050}[shift], abs=1e-3)


def test_the_legend_of_equations_names_code_that_is_there():
    """Each `file: name` in the docstring of the package is a file that defines the name."""
    entries = re.findall(r"(\S+\.py)(?:: ([\w.]+))?$", diffusion.__doc__, re.MULTILINE)
    assert len(entries) >= 10
    for file, name in entries:
        text = (ROOT / file).read_text()
        for part in filter(None, name.split(".")):
            assert re.search(rf"\b(def|class) {part}\b", text), f"{file}: {name}"
