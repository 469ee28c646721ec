"""The sampler on Stable Diffusion 3, CogVideoX and Wan: whole pictures and videos against the stock
pipelines, plain and with the negative attached, at the model's own and at other sizes."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import stock
import tiny_pipelines
import tiny_transformers
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline, StableDiffusion3Pipeline, WanPipeline
from diffusers.schedulers import scheduling_dpm_cogvideox

from selfnpo_fast import GuidedSampler, attach_negative
from selfnpo_fast.guidance.sampler import start_noise
from selfnpo_fast.models import load_adapter, text
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.runtime.errors import UserError
from selfnpo_kernels import Draw, NoiseKey, draw_id, normal

PROMPTS, SEEDS, SCALE = ["a cat", "two birds"], [11, 2**40], 4.0
CPU = torch.device("cpu")
CASES = {
    "sd3": (tiny_transformers.write_sd3, StableDiffusion3Pipeline),
    "cogvideox, ddim": (tiny_transformers.write_cogvideox, CogVideoXPipeline),
    "cogvideox, dpm": (functools.partial(tiny_transformers.write_cogvideox, rotary=True), CogVideoXPipeline),
    "wan, unipc": (tiny_transformers.write_wan, WanPipeline),
}
OWN = {
    "sd3": {},
    "cogvideox, ddim": {},
    "cogvideox, dpm": {},
    "wan, unipc": {"height": 32, "width": 48, "num_frames": 9},  # its own is 81 frames of 480 x 832
}
"""A size that is the model's own, where that is small."""
OTHER = {
    "sd3": {"height": 32, "width": 96},
    "cogvideox, ddim": {"height": 48, "width": 32, "num_frames": 17},
    "cogvideox, dpm": {"height": 48, "width": 32, "num_frames": 17},
    "wan, unipc": {"height": 48, "width": 32, "num_frames": 5},
}
SHAPES = {
    "sd3": (16, 8, 8),
    "cogvideox, ddim": (3, 4, 4, 6),
    "cogvideox, dpm": (3, 4, 4, 6),
    "wan, unipc": (4, 3, 4, 6),
}
OTHER_SHAPES = {
    "sd3": (16, 4, 12), "cogvideox, ddim": (5, 4, 6, 4), "cogvideox, dpm": (5, 4, 6, 4), "wan, unipc": (4, 2, 6, 4)
}  # fmt: skip


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """Pipelines by case, loaded from files when they are first asked for."""

    @functools.cache
    def of(case: str):
        write, cls = CASES[case]
        folder = write(tmp_path_factory.mktemp("model"))
        pipe = cls.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        tiny_pipelines.randomised(pipe.transformer, 1)
        return pipe

    return of


class StepNoise:
    """In place of the noise that CogVideoX's DPM draws, up to twice in a step: that of the sampler."""

    def __init__(self, monkeypatch, scheduler) -> None:
        self.step, original = -1, type(scheduler).step

        def step(this, *args, **kwargs):
            self.step += 1
            return original(this, *args, **kwargs)

        monkeypatch.setattr(type(scheduler), "step", step)
        monkeypatch.setattr(scheduling_dpm_cogvideox, "randn_tensor", self)

    def __call__(self, shape, **_) -> torch.Tensor:
        return normal(NoiseKey(0, torch.tensor(SEEDS), draw_id(Draw.SAMPLE, self.step)), tuple(shape[1:]))


def by_diffusers(pipe, shape, steps: int, output: str = "latent", **words) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if isinstance(pipe.scheduler, CogVideoXDPMScheduler):
            StepNoise(monkeypatch, pipe.scheduler)
        noise = start_noise(SEEDS, shape, CPU)
        arguments = {"num_inference_steps": steps, "guidance_scale": SCALE, "latents": noise, "output_type": output}
        return pipe(PROMPTS, **arguments | words)[0]


def by_us(sampler: GuidedSampler, steps: int, words: dict, **options):
    arguments = {"seeds": SEEDS, "steps": steps, "guidance_scale": SCALE, "output": "latent", "batch_size": 2}
    size = {"frames" if name == "num_frames" else name: value for name, value in words.items()}
    return sampler(PROMPTS, **arguments | size | options).images


def negatives(pipe) -> dict[str, Negative]:
    """The same negative as a LoRA and as a second network."""
    deltas = stock.low_rank(pipe.transformer)
    network = stock.merged(pipe.transformer, deltas)
    return {"lora": Negative(source="test", deltas=deltas), "full": Negative(source="test", network=network)}


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_the_latents_are_those_of_the_stock_pipeline(pipes, case):
    pipe = pipes(case)
    for steps, words, shape in ((4, OWN[case], SHAPES[case]), (10, OTHER[case], OTHER_SHAPES[case])):
        theirs = by_diffusers(pipe, shape, steps, **words)
        assert theirs.shape == (2, *shape)
        assert_same(by_us(GuidedSampler.from_pipeline(pipe), steps, words), theirs)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("case", CASES)
def test_a_negative_is_that_of_the_attached_pipeline(pipes, case, kind):
    pipe = pipes(case)
    negative = negatives(pipe)[kind]
    sampler = GuidedSampler.from_pipeline(pipe, negative)
    for words, shape in ((OTHER[case], OTHER_SHAPES[case]), (OWN[case], SHAPES[case])):
        ours, plain = by_us(sampler, 6, words), by_us(GuidedSampler.from_pipeline(pipe), 6, words)
        with attach_negative(pipe, negative):
            theirs = by_diffusers(pipe, shape, 6, **words)
        assert_same(ours, theirs)
        assert (theirs - plain).abs().max() > 0.01 * plain.abs().max(), "the negative has to show"


@pytest.mark.parametrize("case", CASES)
def test_both_branches_as_one_batch_or_two_draw_the_same(pipes, case):
    pipe = pipes(case)
    lora = negatives(pipe)["lora"]
    one, two = (GuidedSampler.from_pipeline(pipe, lora, branches=choice) for choice in ("batched", "split"))
    assert_same(by_us(one, 4, OTHER[case]), by_us(two, 4, OTHER[case]))
    assert_same(by_us(one, 4, OTHER[case], batch_size=1), by_us(two, 4, OTHER[case]))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sd3", "cogvideox, dpm", "wan, unipc"])
def test_compiled_blocks_draw_the_same_at_every_size(pipes, monkeypatch, case):
    """Traced as whole graphs; what a compiler makes of them is not looked at."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode=None, **rest: compile(self, backend="eager", **rest)
    )
    pipe = pipes(case)
    lora = negatives(pipe)["lora"]
    options = {"branches": "split"}
    compiled, plain = (GuidedSampler.from_pipeline(pipe, lora, compile=on, **options) for on in ("default", "off"))
    for words in (OTHER[case], OWN[case]):
        assert_same(by_us(compiled, 2, words), by_us(plain, 2, words))
    assert any(module._compiled_call_impl for module in compiled._branches.positive.modules())


def test_dynamic_guidance_is_that_of_the_stock_pipeline(pipes):
    for case in ("cogvideox, ddim", "cogvideox, dpm"):
        pipe = pipes(case)
        sampler = GuidedSampler.from_pipeline(pipe)
        theirs = by_diffusers(pipe, SHAPES[case], 8, use_dynamic_cfg=True)
        assert_same(by_us(sampler, 8, {}, use_dynamic_cfg=True), theirs)
        assert (by_us(sampler, 8, {}) - theirs).abs().max() > 1e-3
    assert_same(
        by_us(sampler, 4, {}, use_dynamic_cfg=True, guidance_scale=1.0), by_us(sampler, 4, {}, guidance_scale=1.0)
    )
    with pytest.raises(UserError, match=r"^use_dynamic_cfg: it is not possible with a guidance_scale for each step"):
        by_us(sampler, 2, {}, use_dynamic_cfg=True, guidance_scale=[2.0, 3.0])


@pytest.mark.parametrize("words", [OWN["sd3"], OTHER["sd3"]])
def test_a_shift_that_depends_on_the_size_is_that_of_the_stock_pipeline(pipes, words):
    pipe, shape = pipes("sd3"), OTHER_SHAPES["sd3"] if words else SHAPES["sd3"]
    fixed = pipe.scheduler
    # So few tokens make a shift that shows.
    options = {"use_dynamic_shifting": True, "base_image_seq_len": 2, "max_image_seq_len": 30}
    pipe.scheduler = type(fixed).from_config(fixed.config, **options)
    try:
        theirs = by_diffusers(pipe, shape, 5, **words)
        assert_same(by_us(GuidedSampler.from_pipeline(pipe), 5, words), theirs)
        sampler = GuidedSampler.from_pipeline(pipe, solver="dpm++")
        assert by_us(sampler, 5, words).isfinite().all()
    finally:
        pipe.scheduler = fixed


@pytest.mark.parametrize("case", CASES)
def test_pictures_and_frames_come_in_both_forms(pipes, case):
    pipe, words = pipes(case), OTHER[case]
    sampler = GuidedSampler.from_pipeline(pipe)
    tensor, pil = (by_us(sampler, 3, words, output=form) for form in ("pt", "pil"))
    stock_tensor = by_diffusers(pipe, OTHER_SHAPES[case], 3, "pt", **words)
    stock_pil = by_diffusers(pipe, OTHER_SHAPES[case], 3, "pil", **words)
    frames = words.get("num_frames")
    assert tensor.shape == (2, *((frames,) if frames else ()), 3, words["height"], words["width"])
    torch.testing.assert_close(tensor / 2 + 0.5, stock_tensor, rtol=0, atol=5e-5)
    if frames is None:
        pil, stock_pil = [pil], [stock_pil]
    for ours, theirs in zip(pil, stock_pil, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one.size, one.mode) == ((words["width"], words["height"]), "RGB")
            assert abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


@pytest.mark.parametrize("case", ["sd3", "cogvideox, ddim", "wan, unipc"])
def test_the_autoencoder_decodes_in_tiles_or_slices_and_the_pipeline_stays_as_it_is(pipes, case):
    pipe, words, vae = pipes(case), OTHER[case], pipes(case).vae
    if case == "wan, unipc":
        vae.tile_sample_min_height = vae.tile_sample_min_width = 16
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = 8
    if case == "cogvideox, ddim":
        with pytest.raises(UserError, match=r"^vae_tiling: the autoencoder's tiles make 78 x 36 where 48 x 32 is"):
            by_us(GuidedSampler.from_pipeline(pipe, vae_tiling=True), 1, words, output="pt")
        vae.tile_overlap_factor_height, vae.tile_overlap_factor_width = 1 / 2, 1 / 3
    plain = by_us(GuidedSampler.from_pipeline(pipe), 2, words, output="pt")
    tiled = GuidedSampler.from_pipeline(pipe, vae_tiling=True)
    ours = [by_us(tiled, 2, words, output="pt") for _ in range(2)]
    assert not vae.use_tiling
    vae.enable_tiling()
    theirs = by_diffusers(pipe, OTHER_SHAPES[case], 2, "pt", **words)
    vae.disable_tiling()
    for pictures in ours:
        torch.testing.assert_close(pictures / 2 + 0.5, theirs, rtol=0, atol=5e-5)
    assert (ours[0] - plain).abs().max() > 1e-4, "seams have to show"
    seen, decode = [], type(vae)._decode
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            type(vae), "_decode", lambda this, z, **rest: seen.append(len(z)) or decode(this, z, **rest)
        )
        sliced = by_us(GuidedSampler.from_pipeline(pipe, vae_slicing=True), 2, words, output="pt")
    assert seen == [1, 1]
    assert not vae.use_slicing
    torch.testing.assert_close(sliced, plain, rtol=0, atol=1e-5)


def test_what_an_autoencoder_does_not_offer_is_one_line(pipes):
    pipe = pipes("sd3")
    with pytest.raises(UserError, match=r"^vae_tiling: 'yes' is not possible; expected True or False$"):
        GuidedSampler.from_pipeline(pipe, vae_tiling="yes")
    vae = pipe.vae
    del vae.use_tiling
    try:
        with pytest.raises(UserError, match=r"^vae_tiling: AutoencoderKL has no tiling; leave the option out$"):
            GuidedSampler.from_pipeline(pipe, vae_tiling=True)
    finally:
        vae.use_tiling = False


@pytest.mark.parametrize(
    ("case", "words", "line"),
    [
        ("sd3", {"frames": 9}, "frames: 9 is not possible; .* draws pictures, of 1 frame"),
        ("sd3", {"height": 40}, "height: 40 is no multiple of 16 from 16 to 192; the next is 48"),
        ("sd3", {"width": 208}, "width: 208 is no multiple of 16 from 16 to 192; the next is 192"),
        ("cogvideox, ddim", {"width": 24}, "width: 24 is no multiple of 16 from 16 to 16384; the next is 32"),
        (
            "cogvideox, ddim",
            {"frames": 13},
            "frames: 13 is not possible; expected 1 and a multiple of 8; the next is 17",
        ),
        ("wan, unipc", {"height": 8}, "height: 8 is no multiple of 16 from 16 to 1024; the next is 16"),
        ("wan, unipc", {"frames": 12}, "frames: 12 is not possible; expected 1 and a multiple of 4; the next is 13"),
        ("wan, unipc", {"frames": 254}, "frames: 254 is not possible; expected at most 253"),
        ("wan, unipc", {"frames": 0}, "frames: 0 is not possible; expected an integer from 1 to"),
        ("wan, unipc", {"frames": 4.0}, "frames: 4.0 is not possible; expected an integer from 1 to"),
    ],
)
def test_a_size_that_is_not_possible_is_one_line_and_nothing_is_drawn(pipes, monkeypatch, case, words, line):
    sampler = GuidedSampler.from_pipeline(pipes(case))
    monkeypatch.setattr(GuidedSampler, "_latents", lambda *_: pytest.fail("something was drawn"))
    with pytest.raises(UserError, match=f"^{line}") as caught:
        sampler(PROMPTS, steps=2, **words)
    assert "\n" not in str(caught.value)


def test_text_encoders_are_loaded_once_for_both_branches(tmp_path, monkeypatch):
    adapter = load_adapter(str(tiny_transformers.write_cogvideox(tmp_path)))
    sampler = GuidedSampler(adapter, adapter.load_denoiser(torch.float32))
    loaded, real = [], text.text_pipeline
    monkeypatch.setattr(text, "text_pipeline", lambda *args: loaded.append(1) or real(*args))
    for words in ({}, {"negative_prompt": "ugly"}, {"negative_prompt": ["ugly", "blot"]}):
        loaded.clear()
        sampler(PROMPTS, steps=1, output="latent", **words)
        assert loaded == [1]
