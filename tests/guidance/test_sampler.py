"""Guided sampling against diffusers' pipelines; with a negative, against loops of this file."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from dispatched import Dispatched

from selfnpo_fast.guidance.sampler import GuidedSampler, SamplerConfig, start_noise
from selfnpo_fast.models import load_adapter
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.runtime.errors import UserError

SCHEDULERS = {"dpm++": DPMSolverMultistepScheduler, "ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}
PROMPTS = ["a cat", "two birds"]
SEEDS = [11, 2**40]
STEPS = 5
CPU = torch.device("cpu")
LOOK = {"aten.aminmax": 1}
"""At the end of a call: is what was drawn finite?"""


def sampler_of(adapter, denoiser: torch.nn.Module, negative: torch.nn.Module | None = None, **options) -> GuidedSampler:
    given = None if negative is None else Negative(source="test", network=negative, deltas=None)
    return GuidedSampler(adapter, denoiser, given, **options)


class Setting:
    """A tiny pipeline: our adapter, denoiser and rows, and the stock pipeline of its folder."""

    def __init__(self, folder: Path, pipeline: type) -> None:
        self.adapter = load_adapter(str(folder))
        self.denoiser = self.adapter.load_denoiser(torch.float32)
        self.prompts = self.adapter.encode_prompts(PROMPTS, CPU)
        self.empty = self.adapter.encode_empty(CPU)
        self.pipe = pipeline.from_pretrained(folder)
        self.pipe.set_progress_bar_config(disable=True)

    def latents(self, negative=None, seeds=SEEDS, branches="auto", **options) -> torch.Tensor:
        config = SamplerConfig(**({"steps": STEPS} | options))
        sampler = sampler_of(self.adapter, self.denoiser, negative, branches=branches)
        return sampler.latents(self.prompts, self.empty, seeds, config)

    def stock(self, solver: str, guidance_scale: float, output_type: str = "latent") -> torch.Tensor:
        self.pipe.scheduler = SCHEDULERS[solver].from_config(self.pipe.scheduler.config)
        return self.pipe(
            PROMPTS,
            num_inference_steps=STEPS,
            guidance_scale=guidance_scale,
            latents=start_noise(SEEDS, (4, 8, 8), CPU),
            output_type=output_type,
        ).images


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def sd(request, tmp_path_factory) -> Setting:
    folder = tiny.write_sd(tmp_path_factory.mktemp("sd"), request.param)
    return Setting(folder, StableDiffusionPipeline)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Setting:
    return Setting(tiny.write_sd(tmp_path_factory.mktemp("plain")), StableDiffusionPipeline)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Setting:
    return Setting(tiny.write_sdxl(tmp_path_factory.mktemp("sdxl")), StableDiffusionXLPipeline)


@pytest.fixture(scope="module")
def other() -> torch.nn.Module:
    torch.manual_seed(99)
    return tiny.unet().eval()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    # Observed 1.1e-6: the stock pipeline runs both branches as one batch.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("solver", list(SCHEDULERS))
def test_without_a_negative_it_is_the_stock_pipeline(sd, solver, guidance_scale):
    theirs = sd.stock(solver, guidance_scale)
    assert_same(sd.latents(solver=solver, guidance_scale=guidance_scale), theirs)
    # The comparison can fail: another scale gives other latents.
    elsewhere = sd.latents(solver=solver, guidance_scale=2.5)
    assert (elsewhere - theirs).abs().max() > 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("solver", list(SCHEDULERS))
def test_sdxl_without_a_negative_it_is_the_stock_pipeline(sdxl, solver, guidance_scale):
    assert sdxl.pipe.config.force_zeros_for_empty_prompt
    assert_same(sdxl.latents(solver=solver, guidance_scale=guidance_scale), sdxl.stock(solver, guidance_scale))


@pytest.mark.parametrize("solver", list(SCHEDULERS))
def test_pictures_are_the_stock_pipelines(plain, solver):
    config = SamplerConfig(steps=STEPS, guidance_scale=4.0, solver=solver)
    images = sampler_of(plain.adapter, plain.denoiser).images(plain.prompts, plain.empty, SEEDS, config)
    assert_same(images / 2 + 0.5, plain.stock(solver, 4.0, "pt"))


def ddim_by_hand(setting: Setting, networks: tuple, rows: tuple, guidance_scale: float) -> torch.Tensor:
    """DDIM on the grid 1, 201, ..., 801, alphas from the betas, float64 but for the networks."""
    alphas_cumprod = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    x = start_noise(SEEDS, (4, 8, 8), CPU).double()
    for t in range(801, 0, -200):
        outputs = [
            network(x.float(), t, encoder_hidden_states=row, return_dict=False)[0].double()
            for network, row in zip(networks, rows, strict=True)
        ]
        eps = outputs[1] + guidance_scale * (outputs[0] - outputs[1])
        now, after = alphas_cumprod[t], alphas_cumprod[max(t - 200, 0)]
        x0 = (x - (1 - now) ** 0.5 * eps) / now**0.5
        x = after**0.5 * x0 + (1 - after) ** 0.5 * eps
    return x.float()


@pytest.mark.parametrize("negative_prompt", ["empty", "same"])
@torch.no_grad()
def test_negative_takes_the_unconditional_branch(plain, other, negative_prompt):
    row = plain.prompts["encoder_hidden_states"]
    against = row if negative_prompt == "same" else plain.empty["encoder_hidden_states"].expand_as(row)
    expected = ddim_by_hand(plain, (plain.denoiser, other), (row, against), 3.0)
    ours = plain.latents(other, solver="ddim", guidance_scale=3.0, negative_prompt=negative_prompt)
    # Observed 6e-7; diffusers keeps its alphas in float32.
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    assert (ours - plain.latents(solver="ddim", guidance_scale=3.0)).abs().max() > 0.1


@torch.no_grad()
def stock_loop(
    scheduler, pos: torch.nn.Module, neg: torch.nn.Module, rows: tuple, seeds: list[int], guidance_scale: float
) -> torch.Tensor:
    """Latents by diffusers' `step` in float32, with eager guidance and one network per branch.

    `scheduler` has its timesteps, and `rows` are (prompts', negative branch's).
    """
    shape = (pos.config.in_channels, pos.config.sample_size, pos.config.sample_size)
    row, against = rows
    x = start_noise(seeds, shape, CPU) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        p = pos(scaled, t, row).sample
        if guidance_scale != 1:
            q = neg(scaled, t, against).sample
            p = q + guidance_scale * (p - q)
        x = scheduler.step(p, t, x).prev_sample
    return x


def row_and_empty(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    row, empty = setting.prompts["encoder_hidden_states"], setting.empty["encoder_hidden_states"]
    return row, empty.expand_as(row)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("solver", list(SCHEDULERS))
def test_negative_in_a_loop_over_the_stock_scheduler(plain, other, monkeypatch, solver, spacing):
    """Euler starts from less than unit noise when its spacing is not leading."""
    config = plain.adapter.scheduler_config | {"timestep_spacing": spacing}
    monkeypatch.setitem(plain.adapter.__dict__, "_scheduler", DDIMScheduler.from_config(config))
    scheduler = SCHEDULERS[solver].from_config(config)
    scheduler.set_timesteps(STEPS)
    theirs = stock_loop(scheduler, plain.denoiser, other, row_and_empty(plain), SEEDS, 3.0)
    assert_same(plain.latents(other, solver=solver, guidance_scale=3.0), theirs)


def recorder_of(setting: Setting, *networks: torch.nn.Module) -> Dispatched:
    """Counts operations outside the networks on tensors the size of one or two latent batches."""
    size = start_noise(SEEDS, setting.adapter.latent_shape, CPU).numel()
    return Dispatched({size, 2 * size}, *networks)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("solver", list(SCHEDULERS))
def test_a_step_is_one_fused_call(plain, other, solver, guidance_scale):
    with recorder_of(plain, plain.denoiser, other) as recorder:
        plain.latents(other, solver=solver, guidance_scale=guidance_scale)
    assert recorder.computing == {"selfnpo.normal": 1, "selfnpo.guided_step": STEPS, **LOOK}


def test_a_start_below_unit_noise_is_fused_too(plain, monkeypatch):
    config = plain.adapter.scheduler_config | {"timestep_spacing": "trailing"}
    monkeypatch.setitem(plain.adapter.__dict__, "_scheduler", DDIMScheduler.from_config(config))
    with recorder_of(plain, plain.denoiser) as recorder:
        plain.latents(solver="euler")
    assert recorder.computing == {"selfnpo.normal": 1, "selfnpo.affine_noise": 1, "selfnpo.guided_step": STEPS, **LOOK}


def test_what_is_not_fused_is_seen(plain, other):
    """The same recorder on diffusers' own loop."""
    scheduler = SCHEDULERS["dpm++"].from_config(plain.pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    with recorder_of(plain, plain.denoiser, other) as recorder:
        stock_loop(scheduler, plain.denoiser, other, row_and_empty(plain), SEEDS, 4.0)
    assert recorder.seen["aten.mul"] >= 4 * STEPS
    assert recorder.seen["aten.sub"] >= 2 * STEPS


@pytest.fixture(scope="module")
def low(plain) -> torch.nn.Module:
    return plain.adapter.load_denoiser(torch.bfloat16)


@pytest.mark.parametrize("solver", list(SCHEDULERS))
def test_the_state_stays_float32_with_a_bfloat16_network(plain, low, solver):
    """One step, so that both see the same input; nothing but the network's input is converted."""
    scheduler = SCHEDULERS[solver].from_config(plain.pipe.scheduler.config)
    scheduler.set_timesteps(1)
    noise, (row, empty) = start_noise(SEEDS, (4, 8, 8), CPU), row_and_empty(plain)
    t = scheduler.timesteps[0]
    with torch.no_grad():
        pos, neg = (low(noise.bfloat16(), t, rows.bfloat16()).sample.float() for rows in (row, empty))
    x = noise * scheduler.init_noise_sigma
    scheduler.scale_model_input(x, t)
    theirs = scheduler.step(neg + 4.0 * (pos - neg), t, x).prev_sample

    config = SamplerConfig(steps=1, guidance_scale=4.0, solver=solver)
    with recorder_of(plain, low) as recorder:
        ours = sampler_of(plain.adapter, low).latents(plain.prompts, plain.empty, SEEDS, config)
    assert ours.dtype == torch.float32
    assert recorder.seen["aten._to_copy"] == 1, "the input of both branches, once"
    assert recorder.computing == {"selfnpo.normal": 1, "selfnpo.guided_step": 1, **LOOK}
    assert_same(ours, theirs)


def test_a_channels_last_network_changes_nothing(plain):
    moved = copy.deepcopy(plain.denoiser).to(memory_format=torch.channels_last)
    before = plain.adapter.layout_copies
    arguments = (plain.prompts, plain.empty, SEEDS, SamplerConfig(steps=STEPS))
    assert_same(sampler_of(plain.adapter, moved, branches="split").latents(*arguments), plain.latents())
    assert plain.adapter.layout_copies == before + 2 * STEPS, "its outputs are channels_last"


@pytest.fixture(scope="module")
def digits() -> tuple:
    """(adapter, denoiser, a damaged copy, three prompts' rows, empty row) of the embedded model."""
    adapter = load_adapter("digits")
    denoiser = adapter.load_denoiser(torch.float32)
    worse = copy.deepcopy(denoiser)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in worse.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    prompts = [f"a red handwritten {digit} on a yellow background" for digit in ("zero", "four", "seven")]
    return adapter, denoiser, worse, adapter.encode_prompts(prompts, CPU), adapter.encode_empty(CPU)


@pytest.mark.parametrize("with_negative", [False, True])
@pytest.mark.parametrize("solver", list(SCHEDULERS))
def test_digits_are_those_of_the_stock_scheduler(digits, solver, with_negative):
    adapter, denoiser, worse, prompts, empty = digits
    scheduler, seeds = SCHEDULERS[solver].from_config(adapter.scheduler_config), [0, 1, 2]
    scheduler.set_timesteps(12)
    rows = prompts["encoder_hidden_states"], empty["encoder_hidden_states"].expand(3, -1, -1)
    latents = stock_loop(scheduler, denoiser, worse if with_negative else denoiser, rows, seeds, 2.5)
    config = SamplerConfig(steps=12, guidance_scale=2.5, solver=solver)
    sampler = sampler_of(adapter, denoiser, worse if with_negative else None)
    ours = sampler.images(prompts, empty, seeds, config)
    torch.testing.assert_close(ours, adapter.decode(latents), rtol=0, atol=4e-5)  # observed 8e-6


@pytest.mark.parametrize("solver", list(SCHEDULERS))
def test_the_base_as_its_own_negative_changes_nothing(plain, solver):
    # One batch rounds differently.
    options = {"solver": solver, "guidance_scale": 4.0, "branches": "split"}
    assert torch.equal(plain.latents(plain.denoiser, **options), plain.latents(**options))


def test_the_base_under_the_same_prompt_cancels_guidance(plain):
    """p + g (p - p) = p: no guidance at any scale."""
    ours = plain.latents(plain.denoiser, guidance_scale=7.0, negative_prompt="same")
    assert_same(ours, plain.latents(guidance_scale=1.0))


def test_at_scale_1_the_negative_does_not_run(plain):
    def refuse(*args, **kwargs):
        raise AssertionError("the negative ran")

    broken = tiny.unet()
    broken.forward = refuse
    assert_same(plain.latents(broken, guidance_scale=1.0), plain.latents(guidance_scale=1.0))


@pytest.mark.parametrize("negative", [False, True])
def test_a_picture_depends_only_on_its_seed(plain, other, negative):
    def draw(prompts: list[str], seeds: list[int], batch_size: int) -> torch.Tensor:
        rows = plain.adapter.encode_prompts(prompts, CPU)
        config = SamplerConfig(steps=3, guidance_scale=4.0, batch_size=batch_size)
        sampler = sampler_of(plain.adapter, plain.denoiser, other if negative else None)
        return sampler.images(rows, plain.empty, seeds, config)

    prompts, seeds = ["a cat", "two birds", "a cat", "a red house", "a cat"], [5, 6, 7, 8, 5]
    whole = draw(prompts, seeds, 5)
    for batch_size in (1, 2):
        torch.testing.assert_close(draw(prompts, seeds, batch_size), whole, rtol=0, atol=1e-4)
    backwards = draw(prompts[::-1], seeds[::-1], 2).flip(0)
    torch.testing.assert_close(backwards, whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(whole[0], whole[4], rtol=0, atol=1e-4)
    assert (whole[0] - whole[2]).abs().max() > 0.01, "another seed is another picture"


def test_progress_hears_how_many_are_done(plain):
    rows = {name: value[:1].expand(5, *value.shape[1:]) for name, value in plain.prompts.items()}
    heard = []
    config = SamplerConfig(steps=1, guidance_scale=1.0, batch_size=2)
    sampler_of(plain.adapter, plain.denoiser).images(rows, plain.empty, range(5), config, heard.append)
    assert heard == [2, 4, 5]


IMPOSSIBLE = [
    ("guidance_scale", -1.0),
    ("guidance_scale", float("nan")),
    ("guidance_scale", float("inf")),
    ("steps", 0),
    ("batch_size", 0),
    ("solver", "heun"),
    ("negative_prompt", "none"),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_impossible_settings_are_named(plain, name, value):
    with pytest.raises(UserError, match=f"^{name}: ") as caught:
        plain.latents(**{name: value})
    assert str(value) in str(caught.value)
    assert "\n" not in str(caught.value)
