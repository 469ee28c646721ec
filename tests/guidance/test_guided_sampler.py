"""The sampler: LoRA and full-weight negatives, shapes, threads, cancelling, and captured steps."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from selfnpo_fast import GuidedSampler, attach_negative
from selfnpo_fast.guidance.sampler import SamplingCancelled, start_noise
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.negatives.low_rank import LowRank
from selfnpo_fast.runtime.errors import UserError

SCHEDULERS = {"dpm++": DPMSolverMultistepScheduler, "ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}
PROMPTS = ["a cat", "two birds"]
SEEDS = [11, 2**40]
STEPS = 7  # one more than the trials that choose between one batch and two
CPU = torch.device("cpu")


def pipeline(folder: Path, cls: type = StableDiffusionPipeline):
    pipe = cls.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pipe(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sd":
        return pipeline(tiny.write_sd(folder))
    return pipeline(tiny.write_sdxl(folder), StableDiffusionXLPipeline)


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return pipeline(tiny.write_sd(tmp_path_factory.mktemp("plain")))


def lora(unet: torch.nn.Module, rank: int = 3) -> Negative:
    """A strong LoRA on attention projections, time embeddings and convolutions."""
    generator = torch.Generator().manual_seed(5)
    deltas = {}
    for path, layer in unet.named_modules():
        shape = getattr(getattr(layer, "weight", None), "shape", ())
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and path.rpartition(".")[2] in (
            "to_q", "to_v", "conv1", "time_emb_proj", "linear_1"
        ):  # fmt: skip
            down = torch.randn(rank, *shape[1:], generator=generator) / shape[1] ** 0.5
            up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
            deltas[path] = LowRank(down=down, up=up, scale=0.3)
    return Negative(source="test", network=None, deltas=deltas)


def merged(unet: torch.nn.Module, negative: Negative) -> Negative:
    """The same negative as whole weights."""
    network = type(unet).from_config(unet.config).eval()
    network.load_state_dict(unet.state_dict())
    with torch.no_grad():
        for path, delta in negative.deltas.items():
            network.get_submodule(path).weight.add_(delta.delta())
    return Negative(source="test", network=network, deltas=None)


def negatives(unet: torch.nn.Module) -> dict[str, Negative]:
    low = lora(unet)
    return {"lora": low, "full": merged(unet, low)}


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def draw(sampler: GuidedSampler, **options) -> torch.Tensor:
    arguments = {"seeds": SEEDS, "steps": STEPS, "guidance_scale": 4.0, "output": "latent"} | options
    return sampler(PROMPTS, **arguments).images


@pytest.mark.parametrize("kind", ["none", "lora", "full"])
@pytest.mark.parametrize("solver", list(SCHEDULERS))
def test_the_images_are_those_of_the_stock_pipeline_with_the_negative_attached(pipe, kind, solver):
    pipe.scheduler = SCHEDULERS[solver].from_config(pipe.scheduler.config)
    negative = negatives(pipe.unet).get(kind)
    sampler = GuidedSampler.from_pipeline(pipe, negative)
    ours = draw(sampler, output="pt")
    arguments = {
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "latents": start_noise(SEEDS, (4, 8, 8), CPU),
        "output_type": "pt",
    }
    stock = pipe(PROMPTS, **arguments).images
    if negative is not None:
        with attach_negative(pipe, negative):
            theirs = pipe(PROMPTS, **arguments).images
        assert (theirs - stock).abs().max() > 1e-3, "the negative has to show"
    else:
        theirs = stock
    assert_same(ours / 2 + 0.5, theirs, 5e-5)


@pytest.mark.parametrize("branches", ["batched", "split"])
def test_a_lora_is_its_merged_weights_however_its_branches_run(sd, branches):
    both = negatives(sd.unet)
    ours = draw(GuidedSampler.from_pipeline(sd, both["lora"], branches=branches))
    assert_same(ours, draw(GuidedSampler.from_pipeline(sd, both["full"])))


def test_the_pipelines_own_network_stays_as_it_is(sd):
    before = {name: value.clone() for name, value in sd.unet.state_dict().items()}
    kinds = [type(module) for module in sd.unet.modules()]
    stock = sd(PROMPTS, num_inference_steps=2, latents=start_noise(SEEDS, (4, 8, 8), CPU), output_type="latent").images
    sampler = GuidedSampler.from_pipeline(sd, lora(sd.unet))
    draw(sampler)
    assert [type(module) for module in sd.unet.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in sd.unet.state_dict().items())
    assert sd.unet.state_dict().keys() == before.keys()
    after = sd(PROMPTS, num_inference_steps=2, latents=start_noise(SEEDS, (4, 8, 8), CPU), output_type="latent").images
    assert torch.equal(after, stock)
    ours = {p.data_ptr() for p in sampler._branches.positive.parameters()}
    assert ours == {p.data_ptr() for p in sd.unet.parameters()}, "one backbone, held once"


class Calls:
    """Samples that a network forwards in each call."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.batches: list[int] = []
        network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs) -> None:
        self.batches.append(len(args[0] if args else kwargs["sample"]))


def test_outside_the_interval_one_branch_runs(tmp_path):
    pipe = pipeline(tiny.write_sd(tmp_path))
    negative = merged(pipe.unet, lora(pipe.unet))
    positive, against = Calls(pipe.unet), Calls(negative.network)
    sampler = GuidedSampler.from_pipeline(pipe, negative, solver="ddim")
    ours = draw(sampler, steps=10, guidance_interval=(0.2, 0.7))
    assert positive.batches == [2] * 10
    assert against.batches == [2] * 5
    # The same by hand: the scheduler's own step, guided from step 2 to step 6.
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(10)
    rows, empty = (pipe.encode_prompt(text, CPU, 1, False)[0] for text in (PROMPTS, ["", ""]))
    x = start_noise(SEEDS, (4, 8, 8), CPU)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            p = pipe.unet(x, t, rows).sample
            if 2 <= i < 7:
                q = negative.network(x, t, empty).sample
                p = q + 4.0 * (p - q)
            x = scheduler.step(p, t, x).prev_sample
    assert_same(ours, x)
    assert (draw(sampler, steps=10) - ours).abs().max() > 1e-3


def test_guidance_rescale_is_the_stock_pipelines(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
    arguments["latents"] = start_noise(SEEDS, (4, 8, 8), CPU)
    theirs = pipe(PROMPTS, guidance_rescale=0.6, **arguments).images
    sampler = GuidedSampler.from_pipeline(pipe)
    assert_same(draw(sampler, guidance_rescale=0.6), theirs)
    assert (draw(sampler) - theirs).abs().max() > 1e-3


def test_sizes_and_negative_prompts_are_the_stock_pipelines(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    theirs = pipe(
        PROMPTS, negative_prompt=["a dog", "a fish"], height=48, width=80, num_inference_steps=STEPS,
        guidance_scale=4.0, latents=start_noise(SEEDS, (4, 6, 10), CPU), output_type="pt",
    ).images  # fmt: skip
    sampler = GuidedSampler.from_pipeline(pipe)
    ours = draw(sampler, negative_prompt=["a dog", "a fish"], height=48, width=80, output="pt")
    assert ours.shape == (2, 3, 48, 80)
    assert_same(ours / 2 + 0.5, theirs, 5e-5)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_image_depends_only_on_its_seed_and_prompt(sd, kind):
    sampler = GuidedSampler.from_pipeline(sd, negatives(sd.unet)[kind])
    prompts, seeds = ["a cat", "two birds", "a cat", "a red house", "a cat"], [5, 6, 7, 8, 5]
    whole = sampler(prompts, seeds=seeds, steps=4, batch_size=5, output="latent").images
    for size in (1, 2):
        assert_same(sampler(prompts, seeds=seeds, steps=4, batch_size=size, output="latent").images, whole)
    single = sampler(prompts[3], seeds=seeds[3], steps=4, output="latent").images
    assert_same(single[0], whole[3])
    assert_same(whole[0], whole[4])
    assert (whole[0] - whole[2]).abs().max() > 0.01


def test_a_pipeline_that_moves_away_is_noticed(sd):
    sampler = GuidedSampler.from_pipeline(sd)
    # As if the sampler had been made on a GPU: the test has only a CPU to move to.
    sampler.device = torch.device("cuda")
    with pytest.raises(UserError, match="pipe: its unet has left cuda; make a new sampler"):
        draw(sampler)


def test_new_seeds_are_told(sd):
    sampler = GuidedSampler.from_pipeline(sd)
    first, second = sampler(PROMPTS, steps=2), sampler(PROMPTS, steps=2)
    assert len({*first.seeds, *second.seeds}) == 4
    again = sampler(PROMPTS, seeds=first.seeds, steps=2)
    assert [list(image.getdata()) for image in again.images] == [list(image.getdata()) for image in first.images]
    assert first.images[0].size == (64, 64)


@pytest.mark.parametrize("how", ["evicted", "closed"])
def test_the_buffers_of_a_dropped_shape_are_freed_at_once(sd, how):
    """On a GPU they may be a picture's gigabytes: Python's next full collection may be far off."""
    sampler = GuidedSampler.from_pipeline(sd, max_shapes=1, branches="batched")
    draw(sampler, steps=2)
    (trajectory,) = sampler._trajectories._by_shape.values()
    buffer = weakref.ref(trajectory.x)
    del trajectory
    gc.collect()
    gc.disable()
    try:
        if how == "evicted":
            draw(sampler, steps=2, height=32, width=32)
        else:
            sampler.close()
        assert buffer() is None
    finally:
        gc.enable()


def test_shapes_are_kept_and_the_oldest_goes(sd):
    sampler = GuidedSampler.from_pipeline(sd, max_shapes=2)
    kept = sampler._trajectories._by_shape
    draw(sampler, steps=2)
    (first,) = kept.values()
    draw(sampler, steps=3, guidance_scale=9.0)
    assert list(kept.values()) == [first], "steps and scale are no shapes"
    draw(sampler, steps=2, height=32, width=32)
    draw(sampler, steps=2)
    assert list(kept.values())[-1] is first
    draw(sampler, steps=2, solver="ddim")
    assert len(kept) == 2
    assert first in kept.values()
    sampler.close()
    assert not kept


def test_threads_take_turns_and_get_their_own_images(sd):
    """Twelve threads, forty calls of several shapes, solvers and lengths.

    The same calls one by one give the expected images.
    """
    sampler = GuidedSampler.from_pipeline(sd, lora(sd.unet), branches="batched", max_shapes=2)
    calls = [
        {"seeds": [i, i + 100], "steps": 2 + i % 3, "solver": list(SCHEDULERS)[i % 3], "height": 32 + 8 * (i % 2)}
        for i in range(40)
    ]
    expected = [draw(sampler, **call) for call in calls]
    start = threading.Barrier(12)

    def run(call: dict) -> torch.Tensor:
        return draw(sampler, **call)

    with ThreadPoolExecutor(12, initializer=start.wait) as pool:
        drawn = list(pool.map(run, calls))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(drawn, expected, strict=True))
    assert not torch.equal(expected[0], expected[6])


def test_progress_and_cancelling(sd):
    sampler = GuidedSampler.from_pipeline(sd, lora(sd.unet), branches="batched")
    expected = draw(sampler)
    heard: list[tuple[int, int]] = []
    draw(sampler, batch_size=1, progress=lambda done, total: heard.append((done, total)))
    assert heard == [(i + 1, 2 * STEPS) for i in range(2 * STEPS)]
    heard.clear()
    with pytest.raises(SamplingCancelled, match=f"cancelled after 3 of {STEPS} steps"):
        draw(sampler, progress=lambda *now: heard.append(now), cancelled=lambda: len(heard) == 3)
    with pytest.raises(ZeroDivisionError):
        draw(sampler, progress=lambda *_: 1 / 0)
    assert torch.equal(draw(sampler), expected), "nothing of the calls that ended early stays behind"


def test_a_call_that_ends_early_is_over_on_the_device_too(sd, monkeypatch):
    """The next call may come on another CUDA stream, and it has the same buffers."""
    waits: list[tuple[torch.device, bool]] = []
    sampler = GuidedSampler.from_pipeline(sd)
    monkeypatch.setattr(
        "selfnpo_fast.runtime.capture.wait_for_stream",
        lambda device: waits.append((device, sampler._lock.locked())),
    )
    draw(sampler)
    assert not waits  # the look at the latents has waited
    with pytest.raises(ZeroDivisionError):
        draw(sampler, progress=lambda *_: 1 / 0)
    assert waits == [(CPU, True)]


def test_the_autoencoders_tiling_and_slicing_are_honoured(tmp_path):
    pipe = pipeline(tiny.write_sd(tmp_path))
    size = {"height": 128, "width": 128, "output": "pt"}
    whole = draw(GuidedSampler.from_pipeline(pipe), **size)
    pipe.vae.enable_slicing()
    # Half of a picture is decoded before the other half, and both decodes round alike.
    assert_same(draw(GuidedSampler.from_pipeline(pipe), **size), whole)
    seen = []
    pipe.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    pipe.vae.enable_tiling()
    draw(GuidedSampler.from_pipeline(pipe), **size)
    assert max(shape[-1] for shape in seen) < 16
    assert {shape[0] for shape in seen} == {1}


def test_half_precision_keeps_its_state_in_float32(tmp_path):
    pipe = pipeline(tiny.write_sd(tmp_path)).to(torch.bfloat16)
    sampler = GuidedSampler.from_pipeline(pipe, lora(pipe.unet))
    latents = draw(sampler)
    assert latents.dtype == torch.float32
    assert draw(sampler, output="pt").isfinite().all()


def test_a_second_network_is_brought_to_the_positives_precision(sd, tmp_path):
    pipe = pipeline(tiny.write_sd(tmp_path)).to(torch.bfloat16)
    negative = merged(sd.unet, lora(sd.unet))
    assert draw(GuidedSampler.from_pipeline(pipe, negative)).isfinite().all()
    assert negative.network.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_compiled_blocks_draw_the_same(tmp_path, kind):
    sd = pipeline(tiny.write_sd(tmp_path, **tiny.SHALLOW))
    negative = negatives(sd.unet)[kind]
    compiled = GuidedSampler.from_pipeline(sd, negative, compile="default")
    assert_same(draw(compiled), draw(GuidedSampler.from_pipeline(sd, negative)), 5e-5)
    assert any(module._compiled_call_impl for module in compiled._branches.positive.modules())
    assert not any(module._compiled_call_impl for module in sd.unet.modules()), "the pipeline's own network is not"


IMPOSSIBLE = [
    ({"steps": 0}, "steps: 0"),
    ({"guidance_interval": (0.7, 0.2)}, "guidance_interval: "),
    ({"guidance_rescale": 1.5}, "guidance_rescale: 1.5"),
    ({"solver": "heun"}, "solver: 'heun'"),
    ({"seeds": [1]}, "seeds: 1 for 2 prompts"),
    ({"seeds": -1}, "seeds: -1"),
    ({"seeds": [0, 2**63]}, "seeds: 9223372036854775808"),
    ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt: 3 for 2 prompts"),
    ({"height": 60}, "height: 60 is no multiple of 8"),
    ({"output": "np"}, "output: 'np'"),
    ({"batch_size": 0}, "batch_size: 0"),
]


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE)
def test_impossible_requests_are_named(sd, options, message):
    with pytest.raises(UserError) as caught:
        draw(GuidedSampler.from_pipeline(sd), **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_other_pipelines_are_refused(sd, tmp_path):
    other = StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False)
    with pytest.raises(UserError, match="pipe: a StableDiffusionImg2ImgPipeline is not supported"):
        GuidedSampler.from_pipeline(other)
    with attach_negative(sd, lora(sd.unet)), pytest.raises(UserError, match="pipe: a negative is attached to its unet"):
        GuidedSampler.from_pipeline(sd)
    offloaded = pipeline(tiny.write_sd(tmp_path))
    offloaded.enable_model_cpu_offload(device="cpu")
    with pytest.raises(UserError, match="pipe: its vae is offloaded"):
        GuidedSampler.from_pipeline(offloaded)
    for option, value in (("compile", "fast"), ("branches", "both"), ("max_shapes", 0)):
        with pytest.raises(UserError, match=f"^{option}: "):
            GuidedSampler.from_pipeline(sd, **{option: value})


def test_a_float16_autoencoder_that_overflows_decodes_in_float32(tmp_path):
    """As in the stock pipeline of SDXL, and the autoencoder stays in float16.

    Networks stay in float32, as always on a CPU.
    """
    pipe = pipeline(tiny.write_sdxl(tmp_path), StableDiffusionXLPipeline)
    pipe.vae.register_to_config(force_upcast=True)
    whole = draw(GuidedSampler.from_pipeline(pipe), output="pt")
    pipe.vae.to(torch.float16)
    seen = []
    pipe.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    # The weights have lost digits.
    sampler = GuidedSampler.from_pipeline(pipe)
    for _ in range(2):  # the sampler itself does not take this for a change of the autoencoder
        torch.testing.assert_close(draw(sampler, output="pt"), whole, rtol=0, atol=2e-2)
    assert set(seen) == {torch.float32}
    assert pipe.vae.dtype == torch.float16


def test_the_autoencoder_of_stable_diffusion_decodes_in_float16(tmp_path):
    """As in the stock pipeline: force_upcast is true in every config that does not name it."""
    pipe = pipeline(tiny.write_sd(tmp_path))
    assert pipe.vae.config.force_upcast
    whole = draw(GuidedSampler.from_pipeline(pipe), output="pt")
    pipe.vae.to(torch.float16)
    seen = []
    pipe.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    found = draw(GuidedSampler.from_pipeline(pipe), output="pt")
    assert set(seen) == {torch.float16}
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole, rtol=0, atol=2e-2)


def test_a_float16_autoencoder_without_memory_to_decode_stays_in_float16(tmp_path, monkeypatch):
    """Else each later call would say that the pipeline has changed."""
    pipe = pipeline(tiny.write_sdxl(tmp_path), StableDiffusionXLPipeline)
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.to(torch.float16)
    sampler = GuidedSampler.from_pipeline(pipe, branches="batched")
    expected = draw(sampler, output="pt")
    with monkeypatch.context() as patch:
        patch.setattr(pipe.vae.decoder.conv_in, "forward", out_of_memory, raising=False)
        with pytest.raises(torch.OutOfMemoryError):
            sampler.adapter.decode(torch.zeros(1, 4, 8, 8))
    vars(pipe.vae.decoder.conv_in).pop("forward", None)
    assert pipe.vae.dtype == torch.float16
    assert torch.equal(draw(sampler, output="pt"), expected)


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")
