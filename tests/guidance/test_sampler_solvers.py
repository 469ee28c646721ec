"""The sampler draws with the pipeline's scheduler as it is configured, or says that it cannot."""

from __future__ import annotations

import dataclasses

import diffusers
import pytest
import stock
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_ddim, scheduling_dpmsolver_multistep
from recording import Recording

from selfnpo_fast import GuidedSampler, attach_negative
from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.guidance.sampler import start_noise
from selfnpo_fast.models import Family
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
    "unipc": (UniPCMultistepScheduler, {}, "unipc, order 2"),
    "unipc, corrector at some steps": (UniPCMultistepScheduler, {"disable_corrector": [0, 3]}, "unipc, order 2"),
    "unipc, order 1": (UniPCMultistepScheduler, {"solver_order": 1}, "unipc, order 1"),
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


def test_the_x0_of_two_steps_before_replays_in_captured_steps(pipe):
    """UniPC's states are buffers of the captured step, and every call begins without them."""
    pipe.scheduler = UniPCMultistepScheduler.from_config(tiny.scheduler().config)
    plain, captured = (GuidedSampler.from_pipeline(pipe, branches="batched") for _ in range(2))
    captured._trajectories.capture = Recording()
    for options in ({}, {"seeds": [1, 2]}, {"steps": 4}, {"solver": "dpm++"}, {}):
        assert torch.equal(by_us(captured, **options).images, by_us(plain, **options).images)


SCALES = [1.5, 3.0, 7.5, 2.0, 1.25, 4.0]


@pytest.mark.parametrize("cls", [DDIMScheduler, UniPCMultistepScheduler])
def test_each_step_may_have_a_guidance_scale_of_its_own(pipe, cls):
    """The pipeline is given its scales step by step, and the negative is attached to it."""
    pipe.scheduler = cls.from_config(tiny.scheduler().config)
    negative, _ = stock.negative("lora", pipe)

    def next_scale(pipeline, step, _timestep, tensors):
        pipeline._guidance_scale = SCALES[min(step + 1, STEPS - 1)]
        return tensors

    ours = by_us(GuidedSampler.from_pipeline(pipe, negative), guidance_scale=SCALES).images
    noise = start_noise(SEEDS, SHAPE, CPU)
    with attach_negative(pipe, negative):
        theirs = pipe(
            PROMPTS, num_inference_steps=STEPS, guidance_scale=SCALES[0], latents=noise, output_type="latent",
            callback_on_step_end=next_scale,
        ).images  # fmt: skip
    assert_same(ours, theirs)
    assert (ours - by_us(GuidedSampler.from_pipeline(pipe, negative), guidance_scale=1.5).images).abs().max() > 1e-3


def test_steps_with_a_scale_up_to_1_are_the_positives_alone(pipe):
    """Equal scales for all steps are one scale; scales of 1 outside of an interval are the interval."""
    pipe.scheduler = tiny.scheduler()
    sampler = GuidedSampler.from_pipeline(pipe)
    assert_same(by_us(sampler, guidance_scale=(SCALE,) * STEPS).images, by_us(sampler).images)
    some = by_us(sampler, guidance_scale=torch.tensor([1.0, 1.0, SCALE, SCALE, SCALE, 0.5])).images
    assert_same(some, by_us(sampler, guidance_interval=(0.3, 0.9)).images)
    assert (some - by_us(sampler).images).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        ([3.0, 2.0], r"guidance_scale: 2 numbers for 6 steps; give one, or one for each step"),
        ([], r"guidance_scale: 0 numbers for 6 steps"),
        ([3.0] * 5 + [float("nan")], r"guidance_scale\[5\]: nan is not possible"),
        ([3.0] * 5 + [-1.0], r"guidance_scale\[5\]: -1.0 is not possible; expected a number of at least 0"),
        (["3"] * 6, r"guidance_scale\[0\]: '3' is not possible"),
        (lambda step: 3.0, r"guidance_scale: .* is not possible; expected a number of at least 0"),
    ],
)
def test_impossible_scales_of_steps_are_named(pipe, scales, words):
    pipe.scheduler = tiny.scheduler()
    with pytest.raises(UserError, match=f"^{words}") as caught:
        by_us(GuidedSampler.from_pipeline(pipe), guidance_scale=scales)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("solver", ["own", "euler", "unipc"])
@pytest.mark.parametrize("prediction_type", ["flow", "-flow"])
def test_a_flow_model_is_drawn_by_its_own_scheduler(pipe, monkeypatch, solver, prediction_type):
    """Where the family has the levels of a flow; its network is told the scheduler's timesteps."""
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    levels = dataclasses.replace(Levels.of(pipe.scheduler), prediction=prediction_type)
    monkeypatch.setattr(Family, "levels", lambda *_: levels)
    drawn = by_us(GuidedSampler.from_pipeline(pipe), solver=solver)
    assert drawn.solver == {"unipc": "unipc, order 2"}.get(solver, "euler")
    scheduler = pipe.scheduler
    if solver == "unipc":
        scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    scheduler.set_timesteps(STEPS)
    x, embeddings = start_noise(SEEDS, SHAPE, CPU), pipe.encode_prompt(PROMPTS, CPU, 1, True)
    with torch.no_grad():
        for t in scheduler.timesteps:
            pos, neg = (pipe.unet(x, t, encoder_hidden_states=rows).sample for rows in embeddings)
            p = neg + SCALE * (pos - neg)
            x = scheduler.step(p if prediction_type == "flow" else -p, t, x).prev_sample
    assert_same(drawn.images, x)
    with pytest.raises(UserError, match="solver: ddim needs a diffusion schedule"):
        by_us(GuidedSampler.from_pipeline(pipe), solver="ddim")


def test_pndm_is_drawn_as_dpm_solver(pipe):
    config = tiny.scheduler().config
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(config)
    theirs = by_diffusers(pipe)
    pipe.scheduler = PNDMScheduler.from_config(config, skip_prk_steps=True)
    drawn = by_us(GuidedSampler.from_pipeline(pipe))
    assert drawn.solver == "dpm++, order 2, ode"
    assert_same(drawn.images, theirs)


@pytest.mark.parametrize("name", ["EulerAncestralDiscrete", "DEISMultistep", "HeunDiscrete", "LCM"])
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
