"""The sampler draws with the pipeline's scheduler as it is configured, or says that it cannot."""

from __future__ import annotations

import diffusers
import pytest
import stock
import tiny
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from diffusers.schedulers import scheduling_ddim, scheduling_dpmsolver_multistep
from recording import Recording

from selfnpo_fast import GuidedSampler, attach_negative
from selfnpo_fast.guidance.sampler import start_noise
from selfnpo_fast.runtime.errors import UserError
from selfnpo_kernels import Draw, NoiseKey, draw_id, normal

PROMPTS, SEEDS, STEPS, SCALE = ["a cat", "two birds"], [11, 2**40], 6, 4.0
SHAPE, CPU = (4, 8, 8), torch.device("cpu")
SDE = {"algorithm_type": "sde-dpmsolver++"}


@pytest.fixture(scope="module")
def pipe():
    return stock.build("StableDiffusionPipeline")


class StepNoise:
    """In place of diffusers' noise: that of the sampler, step by step, for all pictures at once."""

    def __init__(self, monkeypatch) -> None:
        self.step = 0
        for module in (scheduling_ddim, scheduling_dpmsolver_multistep):
            monkeypatch.setattr(module, "randn_tensor", self)

    def __call__(self, shape, **_) -> torch.Tensor:
        assert tuple(shape) == (len(SEEDS), *SHAPE)
        noise = normal(NoiseKey(0, torch.tensor(SEEDS), draw_id(Draw.SAMPLE, self.step)), SHAPE)
        self.step += 1
        return noise


def by_diffusers(pipe, **options) -> torch.Tensor:
    noise = start_noise(SEEDS, SHAPE, CPU)
    arguments = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "latents": noise, "output_type": "latent"}
    return pipe(PROMPTS, **arguments, **options).images


def by_us(sampler: GuidedSampler, **options):
    return sampler(PROMPTS, **{"seeds": SEEDS, "steps": STEPS, "guidance_scale": SCALE, "output": "latent"} | options)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())


def plain_dpm(pipe) -> torch.Tensor:
    """The latents of DPM-Solver++(2M) with diffusers' defaults, which a stated choice must not become."""
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(tiny.scheduler().config)
    return by_diffusers(pipe)


CONFIGURED = {
    "order 1": (DPMSolverMultistepScheduler, {"solver_order": 1}, "dpm++, order 1, ode"),
    "heun": (DPMSolverMultistepScheduler, {"solver_type": "heun"}, "dpm++, order 2, ode"),
    "karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, "dpm++, order 2, ode"),
    "to the end": (
        DPMSolverMultistepScheduler,
        {"final_sigmas_type": "sigma_min", "lower_order_final": False, "timestep_spacing": "linspace"},
        "dpm++, order 2, ode",
    ),
    "sde": (DPMSolverMultistepScheduler, SDE, "dpm++, order 2, sde"),
    "sde, order 1": (DPMSolverMultistepScheduler, SDE | {"solver_order": 1}, "dpm++, order 1, sde"),
    "sde, karras": (DPMSolverMultistepScheduler, SDE | {"use_karras_sigmas": True}, "dpm++, order 2, sde"),
    "euler at the end": (
        DPMSolverMultistepScheduler,
        {"final_sigmas_type": "sigma_min", "euler_at_final": True, "lower_order_final": False},
        "dpm++, order 2, ode",
    ),
    "ddim, trailing": (DDIMScheduler, {"timestep_spacing": "trailing", "set_alpha_to_one": True}, "ddim"),
    "euler, karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}, "euler"),
    "euler, exponential": (EulerDiscreteScheduler, {"use_exponential_sigmas": True}, "euler"),
}


@pytest.mark.parametrize("kind", CONFIGURED)
def test_the_pipelines_scheduler_is_drawn_as_it_is_configured(pipe, monkeypatch, kind):
    cls, options, name = CONFIGURED[kind]
    otherwise = plain_dpm(pipe)
    pipe.scheduler = cls.from_config(tiny.scheduler().config, **options)
    StepNoise(monkeypatch)
    theirs = by_diffusers(pipe)
    drawn = by_us(GuidedSampler.from_pipeline(pipe))
    assert drawn.solver == name
    assert_same(drawn.images, theirs)
    assert (drawn.images - otherwise).abs().max() > 1e-3, "not the default in its place"


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_stochastic_steps_have_the_negative_too(pipe, monkeypatch, kind):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(tiny.scheduler().config, **SDE)
    negative, _ = stock.negative(kind, pipe)
    ours = by_us(GuidedSampler.from_pipeline(pipe, negative)).images
    StepNoise(monkeypatch)
    plain = by_diffusers(pipe)
    StepNoise(monkeypatch)
    with attach_negative(pipe, negative):
        theirs = by_diffusers(pipe)
    assert_same(ours, theirs)
    assert (theirs - plain).abs().max() > 1e-3


def test_ddims_eta_is_diffusers(pipe, monkeypatch):
    pipe.scheduler = tiny.scheduler()
    sampler = GuidedSampler.from_pipeline(pipe)
    StepNoise(monkeypatch)
    theirs = by_diffusers(pipe, eta=0.7)
    ours = by_us(sampler, eta=0.7).images
    assert_same(ours, theirs)
    assert (ours - by_us(sampler).images).abs().max() > 1e-3
    with pytest.raises(UserError, match=r"eta: 0\.7 belongs to DDIMScheduler"):
        by_us(sampler, eta=0.7, solver="euler")


def test_a_picture_of_stochastic_steps_depends_on_its_seed_and_prompt_alone(pipe):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(tiny.scheduler().config, **SDE)
    sampler = GuidedSampler.from_pipeline(pipe)
    prompts, seeds = ["a cat", "two birds", "a cat", "a cat"], [5, 6, 7, 5]
    arguments = {"steps": 4, "guidance_scale": SCALE, "output": "latent"}
    whole = sampler(prompts, seeds=seeds, **arguments).images
    one_by_one = sampler(prompts, seeds=seeds, batch_size=1, **arguments).images
    assert_same(one_by_one, whole)
    assert_same(sampler(prompts[1], seeds=6, **arguments).images[0], whole[1])
    assert torch.equal(sampler(prompts, seeds=seeds, **arguments).images, whole)
    assert_same(whole[0], whole[3])
    assert (whole[0] - whole[2]).abs().max() > 0.01


def test_noise_is_added_by_the_fused_step_and_replays_in_captured_ones(pipe):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(tiny.scheduler().config, **SDE)
    plain, captured = (GuidedSampler.from_pipeline(pipe, branches="batched") for _ in range(2))
    captured._trajectories.capture = Recording()
    for options in ({}, {"seeds": [1, 2]}, {"steps": 4}):
        assert torch.equal(by_us(captured, **options).images, by_us(plain, **options).images)


def test_pndm_is_drawn_as_dpm_solver(pipe):
    config = tiny.scheduler().config
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(config)
    theirs = by_diffusers(pipe)
    pipe.scheduler = PNDMScheduler.from_config(config, skip_prk_steps=True)
    drawn = by_us(GuidedSampler.from_pipeline(pipe))
    assert drawn.solver == "dpm++, order 2, ode"
    assert_same(drawn.images, theirs)


@pytest.mark.parametrize("name", ["EulerAncestralDiscrete", "UniPCMultistep", "HeunDiscrete", "LCM"])
def test_another_scheduler_is_refused_until_a_solver_is_given(pipe, name):
    theirs = plain_dpm(pipe)
    cls = getattr(diffusers, f"{name}Scheduler")
    pipe.scheduler = cls.from_config(tiny.scheduler().config)
    with pytest.raises(UserError, match=rf"{name}Scheduler is not served .*solver='dpm\+\+'"):
        GuidedSampler.from_pipeline(pipe)
    sampler = GuidedSampler.from_pipeline(pipe, solver="dpm++")
    drawn = by_us(sampler)
    assert drawn.solver == "dpm++, order 2, ode"
    assert_same(drawn.images, theirs)
    with pytest.raises(UserError, match=f"{name}Scheduler is not served"):
        by_us(sampler, solver="own")
