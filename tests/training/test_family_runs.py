"""Every trained family makes real runs: trained, sampled, attached, merged, and held to diffusers.

The networks are tiny and random, of the real classes; `family_runs.CASES` lists them.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import family_runs
import pytest
import torch
from family_runs import CASES, GRID, PROMPTS, ByBranch, Truth
from safetensors.torch import load_file

from selfnpo_fast import GuidedSampler, attach_negative, cli
from selfnpo_fast.guidance.sampler import start_noise
from selfnpo_fast.models import load_adapter
from selfnpo_kernels import Draw, NoiseKey, draw_id, normal

pytestmark = pytest.mark.slow
STEPS, SCALE = 4, 3.0
CPU = torch.device("cpu")
LORA = "pytorch_lora_weights.safetensors"


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


@pytest.mark.parametrize("mode", ["continuous", "lockstep", "lockstep, naive"])
@pytest.mark.parametrize("name", CASES)
def test_the_first_update_is_that_of_a_plain_loop_with_diffusers(root, tmp_path, name, mode):
    """States, targets (x0 estimates), inputs by Eq. 16 or 15 and the loss of Eq. 17, pair by pair."""
    naive = mode == "lockstep, naive"
    more = {
        "rollout__mode": mode.split(",")[0],
        "rollout__noising": "naive" if naive else "from_x_t",
        "loss__kind": "l2",
        "log__sample_every": -1,
        "updates": 1,
        "seed": 3,
    }
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
        x_t = truth.trajectory(noise, functools.partial(truth.predict, text=rollout_text))[t]
        if t == 0 and mode == "continuous":
            target = x_t  # the end of a trajectory
        else:
            target = truth.x0(x_t, truth.predict(x_t, t, rollout_text), t)
        index = (t + 1) * GRID // 1000 - 1
        noise = normal(NoiseKey(3, ids, draw_id(Draw.RENOISE, index)), x_t.shape[1:])
        x_s = truth.noised(target, noise, s) if naive else truth.renoised(x_t, noise, t, s)
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


def size_of(name: str) -> dict[str, int]:
    """Height, width and frames of a case, as far as its runs name them."""
    return {key.removeprefix("model."): value for key, value in CASES[name].size.items()}


def shape_of(name: str, folder: Path) -> tuple[int, ...]:
    """The shape of a latent."""
    return load_adapter(str(folder), **size_of(name)).latent_shape


def negative_networks(name: str, folder: Path, run: Path) -> list[torch.nn.Module]:
    """Networks that are the negative's, by diffusers alone."""
    pipe, denoisers = CASES[name].open(folder), CASES[name].denoisers
    for denoiser in denoisers:
        part = run / "negative" / denoiser if len(denoisers) > 1 else run / "negative"
        if (part / LORA).is_file():
            second = {"load_into_transformer_2": True} if denoiser == "transformer_2" else {}
            pipe.load_lora_weights(part, weight_name=LORA, **second)
        else:
            setattr(pipe, denoiser, type(getattr(pipe, denoiser)).from_pretrained(run / "negative" / denoiser))
    return [getattr(pipe, denoiser).eval() for denoiser in denoisers]


def negative_weights(base: dict, folder: Path) -> dict:
    """A denoiser's weights in the negative's folder, where LoRA files hold W + up down."""
    if not (folder / LORA).is_file():
        return load_file(folder / "diffusion_pytorch_model.safetensors")
    weights, lora = dict(base), load_file(folder / LORA)
    for key, down in lora.items():
        path, found, _ = key.partition(".lora_A.weight")
        if found:
            at = f"{path.partition('.')[2]}.weight"
            weights[at] = weights[at] + lora[f"{path}.lora_B.weight"] @ down
    return weights


def picture(name: str, pipe, start: torch.Tensor, **changes) -> torch.Tensor:
    """Latents of a short guided call of the stock pipeline, from the noise `start`."""
    size = {key.replace("frames", "num_frames"): value for key, value in size_of(name).items()}
    options = size | {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "latent"} | changes
    return pipe("a cat", latents=start.clone(), **options)[0]


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("name", CASES)
def test_a_run_is_sampled_attached_and_merged(root, tmp_path, name, kind):
    """Attached and sampled, its picture is the stock pipeline's with a second network in its loop."""
    case, folder, run = CASES[name], model(root, name), run_of(root, name, kind)
    assert all(0 < row["loss"] < 100 for row in metrics(run)) and len(metrics(run)) == 2
    assert (run / "samples" / "samples-000002.png").is_file()
    pipe, other = case.open(folder), case.open(folder)
    start = start_noise([3], shape_of(name, folder), CPU)
    for denoiser, network in zip(case.denoisers, negative_networks(name, folder, run), strict=True):
        setattr(other, denoiser, ByBranch(getattr(other, denoiser), network, case.two_calls))
    expected, plain = picture(name, other, start), picture(name, pipe, start)
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()

    def assert_same(found: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))

    with attach_negative(pipe, run):
        assert_same(picture(name, pipe, start))
    assert torch.equal(picture(name, pipe, start), plain)
    sampler = GuidedSampler.from_pipeline(pipe, run)
    assert_same(sampler("a cat", seeds=3, steps=STEPS, guidance_scale=SCALE, output="latent", **size_of(name)).images)
    # Merged, the negative is whole networks, here half as far from the base.
    words = ["merge", "--base", str(folder), "--negative", str(run), "--beta", "0.5", "--output", str(tmp_path / "m")]
    assert cli.main(words) == 0
    for denoiser in case.denoisers:
        base = getattr(pipe, denoiser).state_dict()
        part = run / "negative" if kind.startswith("lora") and len(case.denoisers) == 1 else run / "negative" / denoiser
        negative = negative_weights(base, part)
        merged = type(getattr(pipe, denoiser)).from_pretrained(tmp_path / "m" / denoiser).state_dict()
        for key, value in base.items():
            wanted = value + 0.5 * (negative[key] - value)
            torch.testing.assert_close(merged[key], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_line_about_guidance_is_that_of_a_plain_loop(root, name):
    """How far the negative moves guided predictions, on the way of guided sampling with the base."""
    folder, run = model(root, name), run_of(root, name, "full, continuous, noise")
    said = re.findall(
        r"moves guided predictions by ([\d.]+)% at guidance_scale ([\d.]+)", (run / "train.log").read_text()
    )
    told, scale = map(float, said[-1])
    base, moved = (Truth(CASES[name], folder, grid=5) for _ in range(2))
    moved.networks = negative_networks(name, folder, run)
    sums = [0.0, 0.0]
    shape = shape_of(name, folder)

    def guided(x: torch.Tensor, level: int, text: str) -> torch.Tensor:
        positive, negative = base.predict(x, level, text), base.predict(x, level, "")
        change = (1 - scale) * (moved.predict(x, level, "") - negative)
        prediction = negative + scale * (positive - negative)
        sums[0] += float(change.double().square().sum())
        sums[1] += float(prediction.double().square().sum())
        return prediction

    for i, text in enumerate(PROMPTS[:2]):
        base.trajectory(start_noise([i], shape, CPU), functools.partial(guided, text=text))
    assert 100 * (sums[0] / sums[1]) ** 0.5 == pytest.approx(told, abs=0.02)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_exports_the_same_negative(root, tmp_path, name):
    run = run_of(root, name, "full, lockstep, data")
    assert cli.main(["export", "--checkpoint", str(run), "--output", str(tmp_path / "exported")]) == 0
    for file in (run / "negative").rglob("*.safetensors"):
        found, expected = load_file(tmp_path / "exported" / file.relative_to(run / "negative")), load_file(file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("name", ["sd3", "cogvideox_5b", "wan"])
def test_doctor_s_memory_is_that_of_an_update(root, tmp_path, name, lora):
    words = family_runs.words(CASES[name], model(root, name), tmp_path / "run", lora__rank=lora)
    assert cli.main(["doctor", *words, "--verify"]) == 0


@pytest.mark.parametrize("name", CASES)
def test_texts_on_the_host_and_channels_last_change_no_more_than_rounding(root, tmp_path, name):
    plain = metrics(run_of(root, name, "full, continuous, noise"))
    for i, changes in enumerate(({"prompts__device_mib": 0}, {"engine__channels_last": "true"})):
        run = train(root, name, tmp_path / f"{i}", **changes, log__sample_every=-1)
        for found, expected in zip(metrics(run), plain, strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
