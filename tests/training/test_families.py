"""Every trained family makes real runs: trained, sampled, attached, merged, and held to diffusers.

The networks are tiny and random, of the real classes; `family_runs.CASES` lists them.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import family_runs
import pytest
import torch
from family_runs import CASES, GRID, ByBranch, Truth
from safetensors.torch import load_file

from selfnpo_fast import GuidedSampler, attach_negative, cli
from selfnpo_fast.guidance.sampler import start_noise
from selfnpo_fast.guidance.settings import SamplerConfig
from selfnpo_fast.models import load_adapter
from selfnpo_fast.negatives.load import load_negative
from selfnpo_kernels import Draw, NoiseKey, draw_id, normal

pytestmark = pytest.mark.slow
STEPS, SCALE = 4, 3.0
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("families")


@functools.cache
def model(root: Path, name: str) -> Path:
    """The tiny pipeline of a case."""
    return CASES[name].write(root / name)


def train(root: Path, name: str, output: Path, *more: str, **changes) -> Path:
    """A run of a case; returns its folder."""
    assert cli.main(["train", *family_runs.words(CASES[name], model(root, name), output, **changes), *more]) == 0
    return output


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", ["continuous", "lockstep"])
@pytest.mark.parametrize("name", CASES)
def test_the_first_update_is_that_of_a_plain_loop_with_diffusers(root, tmp_path, name, mode):
    """States, targets (x0 estimates), Eq. 16's inputs and the loss of Eq. 17, pair by pair."""
    more = {"rollout__mode": mode, "loss__kind": "l2", "log__sample_every": -1, "updates": 1, "seed": 3}
    if mode == "continuous":
        more["rollout__omega"] = 0.0  # by the prompts; lockstep is without them (-1)
    run = train(root, name, tmp_path / "run", **more)
    train(root, name, run, "--replay-step", "1", **more)
    folder = run / "replay" / "update-0000001"
    pairs = load_file(folder / "pairs.safetensors")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    truth, losses = Truth(CASES[name], model(root, name)), []
    for i, row in enumerate(rows):
        ids, t, s = torch.tensor([row["sample_id"]]), row["t"], row["s"]
        rollout_text = row["prompt"] if mode == "continuous" else ""
        noise = normal(NoiseKey(3, ids, draw_id(Draw.START_NOISE)), pairs["x_s"].shape[1:])
        x_t = truth.trajectory(noise, rollout_text)[t]
        if t == 0 and mode == "continuous":
            target = x_t  # the end of a trajectory
        else:
            target = truth.x0(x_t, truth.predict(x_t, t, rollout_text), t)
        index = (t + 1) * GRID // 1000 - 1
        noise = normal(NoiseKey(3, ids, draw_id(Draw.RENOISE, index)), x_t.shape[1:])
        x_s = truth.renoised(x_t, noise, t, s)
        torch.testing.assert_close(pairs["target"][i : i + 1], target, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pairs["x_s"][i : i + 1], x_s, rtol=1e-4, atol=1e-4)
        x0 = truth.x0(x_s, truth.predict(x_s, s, row["prompt"]), s)
        losses.append((x0 - target).square().mean())
    assert metrics(run)[0]["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    assert len({row["t"] for row in rows}) > 1


# Runs of every family, with noise and data, both modes, LoRA and full weights


RUNS = {
    "full, continuous, noise": {},
    "lora, lockstep, noise": {"lora__rank": 2, "rollout__mode": "lockstep", "rollout__omega": 1.5},
    "full, lockstep, data": {"rollout__mode": "lockstep", "rollout__start": "data", "rollout__k": 2},
    "lora, continuous, data": {"lora__rank": 2, "rollout__start": "data", "engine__gradient_checkpointing": "true"},
}
SOURCES = {"full, lockstep, data": "mp4", "lora, continuous, data": "frames"}


@functools.cache
def run_of(root: Path, name: str, kind: str) -> Path:
    """A run of a case, of one of the RUNS."""
    case, changes = CASES[name], dict(RUNS[kind])
    output = root / f"{name} {kind}"
    if kind in SOURCES:
        source = family_runs.write_data(
            root / f"{name} {kind} data", case, SOURCES[kind] if case.videos else "pictures"
        )
        changes["data__source"] = source
    return train(root, name, output, **changes)


def negative_network(name: str, folder: Path, run: Path) -> torch.nn.Module:
    """A network that is the negative, by diffusers alone."""
    pipe, denoiser = CASES[name].open(folder), CASES[name].denoiser
    if (run / "negative" / denoiser).is_dir():
        return type(getattr(pipe, denoiser)).from_pretrained(run / "negative" / denoiser).eval()
    pipe.load_lora_weights(run / "negative")
    return getattr(pipe, denoiser).eval()


def picture(name: str, pipe, start: torch.Tensor, **changes) -> torch.Tensor:
    """Latents of a short guided call of the stock pipeline, from the noise `start`."""
    size = {
        key.removeprefix("model.").replace("frames", "num_frames"): value for key, value in CASES[name].size.items()
    }
    options = size | {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "latent"} | changes
    return pipe("a cat", latents=start.clone(), **options)[0]


def adapter_of(name: str, folder: Path):
    return load_adapter(str(folder), **{key.removeprefix("model."): value for key, value in CASES[name].size.items()})


def sampled(name: str, pipe, folder: Path, run: Path) -> torch.Tensor:
    """What the product's sampler draws from the same noise as `picture`, by the pipeline's solver."""
    settings = {"steps": STEPS, "guidance_scale": SCALE}
    if name != "wan":
        return GuidedSampler.from_pipeline(pipe, run)("a cat", seeds=3, output="latent", **settings).images
    # Its own size would be that of a whole video.
    adapter = adapter_of(name, folder)
    network = adapter.load_denoiser(torch.float32)
    sampler = GuidedSampler(adapter, network, load_negative(network, run))
    rows, empty = adapter.encode_prompts(["a cat"], CPU), adapter.encode_empty(CPU)
    return sampler.latents(rows, empty, [3], SamplerConfig(solver="own", **settings))


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("name", CASES)
def test_a_run_is_sampled_attached_and_merged(root, tmp_path, name, kind):
    """Attached and sampled, its picture is the stock pipeline's with a second network in its loop."""
    case, folder, run = CASES[name], model(root, name), run_of(root, name, kind)
    assert all(0 < row["loss"] < 100 for row in metrics(run)) and len(metrics(run)) == 2
    assert (run / "samples" / "samples-000002.png").is_file()
    pipe, denoiser = case.open(folder), case.denoiser
    start = start_noise([3], adapter_of(name, folder).latent_shape, CPU)
    negative = negative_network(name, folder, run)
    other = case.open(folder)
    setattr(other, denoiser, ByBranch(getattr(other, denoiser), negative, case.two_calls))
    expected, plain = picture(name, other, start), picture(name, pipe, start)
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()

    def assert_same(found: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))

    with attach_negative(pipe, run):
        assert_same(picture(name, pipe, start))
    assert torch.equal(picture(name, pipe, start), plain)
    assert_same(sampled(name, pipe, folder, run))
    # Merged, the negative is one network, half as far from the base.
    words = ["merge", "--base", str(folder), "--negative", str(run), "--beta", "0.5", "--output", str(tmp_path / "m")]
    assert cli.main(words) == 0
    merged = type(getattr(pipe, denoiser)).from_pretrained(tmp_path / "m" / denoiser).state_dict()
    if kind.startswith("lora"):
        other = case.open(folder)
        other.load_lora_weights(run / "negative")
        other.fuse_lora(components=[denoiser])
        other.unload_lora_weights()
        negative = getattr(other, denoiser)
    for key, value in getattr(pipe, denoiser).state_dict().items():
        wanted = value + 0.5 * (negative.state_dict()[key] - value)
        torch.testing.assert_close(merged[key], wanted, rtol=0, atol=1e-6)
