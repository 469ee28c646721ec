"""`selfnpo merge`: it writes Eq. 7, every loader reads the result, and it writes all or nothing."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from fuzzing import assert_one_line, assert_refused, call
from safetensors.torch import load_file, save_file
from tiny_negatives import merged, moved, save_with_diffusers, with_lora

from selfnpo_fast import cli
from selfnpo_fast.models import load_adapter
from selfnpo_fast.negatives import merge as merge_module
from selfnpo_fast.negatives import write as write_module
from selfnpo_fast.negatives.load import load_negative
from selfnpo_fast.negatives.merge import merge
from selfnpo_fast.negatives.sources import RECORD
from selfnpo_fast.runtime.errors import RunError, UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Models:
    """A base, fine-tunes and negatives of it in files, and the change of each in float64."""

    def __init__(self, folder: Path) -> None:
        self.adapter = load_adapter(str(tiny.write_sd(folder / "base")))
        self.base = self.adapter.load_denoiser(torch.float32)
        self.theta = {name: value.double() for name, value in self.base.state_dict().items()}
        self.paths: dict[str | None, str] = {"base": str(folder / "base")}
        self.changes = {None: {name: torch.zeros_like(value) for name, value in self.theta.items()}}
        for name, seed in (("tuned", 5), ("negative", 6)):
            network = moved(self.base, seed, 0.05)
            network.save_pretrained(folder / name / "unet")
            self._note(name, folder / name, network)
        for name, rank in (("tuned lora", 2), ("negative lora", 3)):
            network = with_lora(self.adapter, rank, None)
            save_with_diffusers(folder / name, network)
            self._note(name, folder / name, merged(self.adapter, network, 1.0))

    def _note(self, name: str, folder: Path, network: torch.nn.Module) -> None:
        self.paths[name] = str(folder)
        self.changes[name] = {key: value.double() - self.theta[key] for key, value in network.state_dict().items()}

    def expected(self, positive: str | None, negative: str, alpha: float, beta: float) -> dict[str, torch.Tensor]:
        eta, delta = self.changes[positive], self.changes[negative]
        return {name: value + alpha * eta[name] + beta * delta[name] for name, value in self.theta.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def assert_weights(folder: Path, expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    network = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
    stored = {}
    for file in (folder / "unet").glob("*.safetensors"):
        stored |= load_file(file)
    assert stored.keys() == expected.keys() == network.state_dict().keys()
    for name, value in stored.items():
        assert value.dtype == dtype
        # Observed 6e-7 in float32: updates are up to 10, and each source is a file in float32.
        torch.testing.assert_close(value.double(), expected[name], rtol=torch.finfo(dtype).eps / 2, atol=4e-6)
        assert torch.equal(network.state_dict()[name], value.float())


@pytest.mark.parametrize("negative", ["negative", "negative lora"])
@pytest.mark.parametrize(
    ("positive", "alpha", "beta"),
    [
        *[(None, 1.0, 1.0), (None, 1.0, 0.5), ("tuned", 1.0, 1.0), ("tuned", 0.8, 0.3), ("tuned", 0.0, 1.0)],
        ("tuned lora", 0.6, 1.0),
    ],
)
def test_every_mixture(models, tmp_path, positive, negative, alpha, beta):
    options = {"positive": models.paths[positive]} if positive else {}
    folder = merge(models.paths["base"], models.paths[negative], tmp_path / "out", alpha=alpha, beta=beta, **options)
    expected = models.expected(positive, negative, alpha, beta)
    assert_weights(folder, expected, torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_result_is_rounded_once(models, tmp_path, dtype):
    options = {"positive": models.paths["tuned"], "alpha": 0.8, "beta": 0.7}
    paths = models.paths["base"], models.paths["negative"]
    whole = load_file(merge(*paths, tmp_path / "fp32", **options) / "unet" / WEIGHTS)
    cast = load_file(merge(*paths, tmp_path / dtype, dtype=dtype, **options) / "unet" / WEIGHTS)
    for name, value in cast.items():
        assert torch.equal(value, whole[name].to(value.dtype)), name
    assert {value.dtype for value in cast.values()} == {torch.bfloat16 if dtype == "bf16" else torch.float16}


def test_shards(models, tmp_path, monkeypatch):
    monkeypatch.setattr(write_module, "SHARD_BYTES", 40_000)
    folder = merge(models.paths["base"], models.paths["negative"], tmp_path / "out")
    files = sorted((folder / "unet").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((folder / "unet" / f"{WEIGHTS}.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(4 * value.numel() for value in models.theta.values())
    assert max(sum(4 * value.numel() for value in load_file(file).values()) for file in files) <= 40_000
    assert_weights(folder, models.expected(None, "negative", 1.0, 1.0), torch.float32)


def test_the_result_is_for_its_positive(models, tmp_path):
    folder = merge(
        models.paths["base"], models.paths["negative lora"], tmp_path / "out", positive=models.paths["tuned"], alpha=0.9
    )
    tuned = UNet2DConditionModel.from_pretrained(models.paths["tuned"], subfolder="unet")
    network = load_negative(tuned, folder).network
    for name, value in load_file(folder / "unet" / WEIGHTS).items():
        assert torch.equal(network.state_dict()[name], value)
    with pytest.raises(UserError, match=r"was trained from .*tuned, and the positive model has other weights"):
        load_negative(models.base, folder)


@pytest.mark.slow  # a process that imports diffusers: 10 s
def test_the_command(models, tmp_path):
    """As a user calls it, in a separate process."""
    words = ["merge", "--base", models.paths["base"], "--positive", models.paths["tuned"], "--alpha", "0.8"]
    words += ["--negative", models.paths["negative"], "--beta", "0.5", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "selfnpo_fast.cli", *words, "--dtype", "bf16"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"negative model: {tmp_path / 'out'}\n"
    assert_weights(tmp_path / "out", models.expected("tuned", "negative", 0.8, 0.5), torch.bfloat16)
    assert json.loads((tmp_path / "out" / RECORD).read_text())["path"] == models.paths["tuned"]


def words_for(models: Models, folder: Path, **changes: str | None) -> list[str]:
    options = {"base": models.paths["base"], "negative": models.paths["negative"], "output": str(folder)} | changes
    return ["merge", *(word for name, value in options.items() if value is not None for word in (f"--{name}", value))]


MISTAKES = {
    "base: none given; expected --base": {"base": None},
    "negative: none given; expected --negative": {"negative": None},
    "output: none given; expected --output": {"output": None},
    "alpha: 1.5 is not possible": {"alpha": "1.5"},
    "alpha: 0.5 has no effect without a positive model": {"alpha": "0.5"},
    "beta: -1.0 is not possible": {"beta": "-1"},
    "equals the positive model": {"beta": "0"},
    "no such folder or file": {"negative": "/nowhere"},
    "positive: no such folder or file": {"positive": "/nowhere"},
    "base: cannot load x.ckpt: it is a pickle": {"base": "x.ckpt"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_leave_nothing_behind(models, tmp_path, message):
    code, error = call(cli.main, words_for(models, tmp_path / "out", **MISTAKES[message]))
    assert_refused(code, error, message)
    assert not list(tmp_path.iterdir())


def test_bases_that_are_none(models, tmp_path):
    lora, file = models.paths["negative lora"], str(Path(models.paths["tuned"]) / "unet" / WEIGHTS)
    for base in (lora, file):
        code, error = call(cli.main, words_for(models, tmp_path / "out", base=base))
        assert_refused(code, error, "is no diffusers folder with a config.json")
    for name, value, message in (
        ("_class_name", "AutoencoderKL", "supported are UNet2DConditionModel"),
        ("block_out_channels", "x", "base: cannot load"),
    ):
        folder = tmp_path / name
        models.base.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
        code, error = call(cli.main, words_for(models, tmp_path / "out", base=str(folder)))
        assert_refused(code, error, message)


def test_a_folder_in_use_is_not_changed(models, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code, error = call(cli.main, words_for(models, tmp_path))
    assert_refused(code, error, "is not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_tensor_that_is_not_finite_in_the_last_place(models, tmp_path):
    """The files before it are already written: they are removed."""
    weights = load_file(Path(models.paths["negative"]) / "unet" / WEIGHTS)
    last = sorted(weights)[-1]
    weights[last].view(-1)[-1] = float("inf")
    save_file(weights, tmp_path / "negative.safetensors")
    words = words_for(models, tmp_path / "out", negative=str(tmp_path / "negative.safetensors"))
    code, error = call(cli.main, words)
    assert_refused(code, error, f"{last} is not finite")
    assert [path.name for path in tmp_path.iterdir()] == ["negative.safetensors"]


def test_a_result_too_large_for_fp16(models, tmp_path):
    network = moved(models.base, 1, 0.05)
    network.conv_in.weight.data[0, 0, 0, 0] = 1e5
    network.save_pretrained(tmp_path / "negative/unet")
    words = words_for(models, tmp_path / "out", negative=str(tmp_path / "negative"), dtype="fp16")
    code, error = call(cli.main, words)
    assert_refused(code, error, "does not fit into fp16: conv_in.weight is not finite")


def test_a_full_disk_leaves_nothing_behind(models, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_module, "_write_file", full)
    with pytest.raises(RunError, match=r"out could not be written: .*No space left"):
        merge(models.paths["base"], models.paths["negative"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 5_000])
def test_a_disk_that_fills_up_on_the_way_is_one_line(models, tmp_path, size):
    """It takes nothing, a part of config.json, or a part of the weights."""
    with largest_file(size):
        code, error = call(cli.main, words_for(models, tmp_path / "out"))
    assert code == 1
    assert_one_line(error.removesuffix("\n"), f"error: {tmp_path}/out could not be written")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["sync", "record", "removal"])
def test_a_disk_that_fails_in_the_end_is_one_line(models, tmp_path, monkeypatch, place):
    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    if place == "record":
        monkeypatch.setattr(Path, "write_text", fail)
    else:
        monkeypatch.setattr(os, "fsync", fail)
    if place == "removal":
        monkeypatch.setattr(merge_module, "remove", fail)
    with pytest.raises(RunError, match=r"out could not be written: .*Input/output error") as caught:
        merge(models.paths["base"], models.paths["negative"], tmp_path / "out")
    assert_one_line(str(caught.value))
    assert bool(list(tmp_path.iterdir())) == (place == "removal")


@pytest.mark.parametrize("name", ["x\0y", "x\ud800y", "n" * 250, "loop/x", "file/x"])
def test_odd_output_folders(models, tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, RunError)) as caught:
        merge(models.paths["base"], models.paths["negative"], tmp_path / name)
    assert_one_line(str(caught.value))
    assert {path.name for path in tmp_path.iterdir()} == {"loop", "file"}
