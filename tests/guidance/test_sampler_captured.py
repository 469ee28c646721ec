"""Captured steps of the sampler: under a stand-in for CUDA graphs, and on a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler
from recording import Recording
from test_guided_sampler import STEPS, assert_same, draw, lora, merged, negatives, pipeline

from selfnpo_fast import GuidedSampler


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return pipeline(tiny.write_sd(tmp_path_factory.mktemp("captured")))


@pytest.mark.parametrize("kind", ["none", "lora", "full"])
def test_captured_steps_replay_with_the_same_memory_and_ask_nothing(sd, kind):
    """With the stand-in for CUDA graphs: other lengths and scales replay the same steps."""
    negative = negatives(sd.unet).get(kind)
    plain = GuidedSampler.from_pipeline(sd, negative, branches="batched")
    captured = GuidedSampler.from_pipeline(sd, negative, branches="batched")
    recording = captured._trajectories.capture = Recording()
    replays = 0
    for options in ({}, {"steps": 4, "guidance_scale": 2.0, "seeds": 3}, {"guidance_interval": (0.3, 0.8)}):
        assert torch.equal(draw(captured, **options), draw(plain, **options))
        assert recording.replays > replays
        replays = recording.replays


@pytest.mark.parametrize("moved", ["positive", "negative"])
def test_captured_steps_are_made_again_where_a_network_has_moved(sd, moved):
    """As by `pipe.to("cpu")` and back, after which the weights are at other addresses."""
    negative = negatives(sd.unet)["full"]
    sampler = GuidedSampler.from_pipeline(sd, negative)
    recording = sampler._trajectories.capture = Recording()
    expected = draw(sampler)
    for parameter in (sd.unet if moved == "positive" else negative.network).parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(draw(sampler), expected)
    replays = recording.replays
    assert torch.equal(draw(sampler), expected)
    assert recording.replays == replays + STEPS, "kept where nothing has moved"


def test_autocast_around_a_call_changes_nothing(sd):
    """A captured step would read casts of weights, which autocast frees at its end."""
    sampler = GuidedSampler.from_pipeline(sd, branches="batched")
    recording = sampler._trajectories.capture = Recording()
    expected = draw(sampler)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(draw(sampler), expected)
    assert recording.replays > STEPS


@pytest.fixture
def plain_arithmetic(monkeypatch):
    """float32 is float32, and cuDNN takes the same algorithm again."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def no_graph_was_given_up(caplog) -> bool:
    return "CUDA graphs: off" not in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_cuda_graphs_draw_the_same(tmp_path, kind, algorithm, plain_arithmetic, caplog):
    """Captured steps, of several lengths and with single branches, against plain ones."""
    pipe = pipeline(tiny.write_sd(tmp_path))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type=algorithm)
    negative = negatives(pipe.unet)[kind]
    pipe.to("cuda")
    # Timed branches might differ between the two, and with them the rounding.
    choices = {"branches": "batched"}
    plain, captured = (GuidedSampler.from_pipeline(pipe, negative, graphs=on, **choices) for on in (False, True))
    for options in ({}, {"steps": 12}, {"guidance_interval": (0.3, 0.8)}, {"batch_size": 1}, {"height": 128}):
        assert_same(draw(captured, **options), draw(plain, **options), 1e-3)
    captured.close()
    assert_same(draw(captured), draw(plain), 1e-3)
    assert no_graph_was_given_up(caplog)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_graphs(tmp_path, dtype, caplog):
    pipe = pipeline(tiny.write_sd(tmp_path)).to("cuda", dtype)
    drawn = draw(GuidedSampler.from_pipeline(pipe, lora(pipe.unet), branches="batched"))
    assert drawn.isfinite().all()
    assert no_graph_was_given_up(caplog)


@pytest.mark.gpu
def test_threads_draw_beside_captures_on_a_gpu(tmp_path, plain_arithmetic, caplog):
    """Each on a stream of its own: two samplers capture, wait for the device, and draw the same."""
    pipe = pipeline(tiny.write_sd(tmp_path)).to("cuda")
    expected = draw(GuidedSampler.from_pipeline(pipe, graphs=False, branches="batched"))
    samplers = [GuidedSampler.from_pipeline(pipe, branches=branches) for branches in ("auto", "batched")]

    def work(i: int) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            return draw(samplers[i % 2], steps=STEPS)

    with ThreadPoolExecutor(4) as threads:
        for drawn in threads.map(work, range(12)):
            assert_same(drawn, expected, 1e-3)
    assert no_graph_was_given_up(caplog)


@pytest.mark.gpu
def test_a_sampler_on_another_device_than_the_present_one(tmp_path, plain_arithmetic, caplog):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    first = pipeline(tiny.write_sd(tmp_path)).to("cuda:0")
    second = pipeline(tmp_path).to("cuda:1")
    expected = draw(GuidedSampler.from_pipeline(first, branches="batched"))
    with torch.cuda.device(0):
        found = draw(GuidedSampler.from_pipeline(second, branches="batched"))
    assert_same(found, expected, 1e-3)
    assert no_graph_was_given_up(caplog)


@pytest.mark.gpu
def test_a_network_that_cannot_be_captured_costs_its_graphs_alone(tmp_path, caplog):
    """A layer asks the device for a value: the pictures are drawn, and random numbers still are."""
    pipe = pipeline(tiny.write_sd(tmp_path)).to("cuda")
    expected = draw(GuidedSampler.from_pipeline(pipe, branches="batched"))
    hook = pipe.unet.conv_in.register_forward_hook(lambda module, args, out: out * (out.sum().item() * 0 + 1))
    asking = GuidedSampler.from_pipeline(pipe, branches="batched")
    assert_same(draw(asking), expected, 1e-3)
    assert caplog.text.count("CUDA graphs: off for the sampler's steps") == 1
    torch.randn(4, device="cuda")
    caplog.clear()
    hook.remove()
    assert_same(draw(GuidedSampler.from_pipeline(pipe, branches="batched")), expected, 1e-3)
    assert no_graph_was_given_up(caplog)


@pytest.mark.gpu
def test_a_pipeline_that_was_on_the_host_meanwhile_draws_the_same(tmp_path, plain_arithmetic, caplog):
    """Its weights are at other addresses then, and others' tensors at theirs."""
    pipe = pipeline(tiny.write_sd(tmp_path)).to("cuda")
    sampler = GuidedSampler.from_pipeline(pipe, merged(pipe.unet, lora(pipe.unet)), branches="batched")
    expected = draw(sampler)
    pipe.to("cpu")
    others = [torch.full((2**k,), torch.nan, device="cuda") for k in range(4, 16) for _ in range(16)]
    pipe.to("cuda")
    assert_same(draw(sampler), expected, 1e-3)
    assert no_graph_was_given_up(caplog)
    del others


@pytest.mark.gpu
def test_autocast_leaves_no_casts_in_a_graph(tmp_path, plain_arithmetic, caplog):
    pipe = pipeline(tiny.write_sd(tmp_path)).to("cuda")
    sampler = GuidedSampler.from_pipeline(pipe, branches="batched")
    with torch.autocast("cuda", torch.float16):
        first = draw(sampler)
    assert_same(draw(sampler), first, 1e-3)
    assert no_graph_was_given_up(caplog)
