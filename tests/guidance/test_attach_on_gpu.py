"""attach_negative on a GPU: the pictures of a CPU, under offload, and in half precision."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_guided_sampler import PROMPTS, SEEDS, assert_same, negatives, pipeline

from selfnpo_fast import attach_negative
from selfnpo_fast.guidance.sampler import start_noise

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def latents(pipe, device: torch.device | None = None) -> torch.Tensor:
    """The latents that a pipeline draws; its start noise is keyed, and so the same everywhere."""
    noise = start_noise(SEEDS, (4, 8, 8), torch.device("cpu")).to(device or pipe.device, pipe.unet.dtype)
    call = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "latent", "latents": noise}
    return pipe(PROMPTS, **call).images.float().cpu()


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("offload", ["none", "model"])
def test_pictures_are_those_of_a_cpu(tmp_path, kind, offload):
    pipe = pipeline(tiny.write_sd(tmp_path))
    plain = latents(pipe)
    with attach_negative(pipe, negatives(pipe.unet)[kind]):
        expected = latents(pipe)
    assert (expected - plain).abs().max() > 0.01
    with attach_negative(pipe, negatives(pipe.unet)[kind]):
        if offload == "model":
            pipe.enable_model_cpu_offload(device=DEVICE)
        else:
            pipe.to(DEVICE)
        assert_same(latents(pipe, DEVICE), expected, 1e-3)
    if offload == "model":
        pipe.remove_all_hooks()
    assert_same(latents(pipe.to(DEVICE)), plain, 1e-3)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_channels_last(tmp_path, kind, dtype):
    pipe = pipeline(tiny.write_sd(tmp_path))
    with attach_negative(pipe, negatives(pipe.unet)[kind]):
        expected = latents(pipe)
    negative = negatives(pipe.unet)[kind]
    pipe.to(DEVICE, dtype)
    pipe.unet.to(memory_format=torch.channels_last)
    with attach_negative(pipe, negative):
        assert_same(latents(pipe), expected, 0.15 if dtype == torch.bfloat16 else 0.03)
