"""What a run has read is in its checkpoints: other inputs at the same paths are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import crash
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from selfnpo_fast import train
from selfnpo_fast.runtime.folders import MANIFEST, write_manifest
from selfnpo_fast.training import input_record

CASE = {"ranks": 1, "zero": 0, "reference": "ema", "mode": "continuous", "lora": 0}
PROMPTS = ["a cat", "a blue dog", "two birds", "a red house"]


def write_prompts(path: Path, prompts: list[str]) -> None:
    path.write_text("\n".join(prompts) + "\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder of a model, prompts and a run of two updates; tests change copies of it."""
    folder = tmp_path_factory.mktemp("finished")
    tiny.write_sd(folder / "model")
    write_prompts(folder / "prompts.txt", PROMPTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run() == 0
    return folder


def run(*more: str) -> int:
    """A run with relative paths in the present folder, so that its copies have the same recipe."""
    words = crash.words(CASE, Path("model"), Path("run"))
    return train.main([*words, "--prompts.source", "prompts.txt", "--updates", "2", *more])


@pytest.fixture
def copied(finished, tmp_path, monkeypatch) -> Path:
    folder = shutil.copytree(finished, tmp_path / "copied")
    monkeypatch.chdir(folder)
    return folder


def refusal(capfd, *more: str) -> str:
    """The line with which the run is refused, which leaves its folder as it was."""
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    capfd.readouterr()
    assert run("--updates", "4", *(more or ("--resume",))) == 2
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before
    return capfd.readouterr().err.strip().splitlines()[-1]


def rewrite(path: Path, change) -> None:
    """Change tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def nudge(path: Path, key: str) -> None:
    """Move one value of one tensor by as little as float32 can tell."""

    def change(tensors) -> None:
        tensors[key].view(-1)[7] *= 1 + 2**-22

    rewrite(path, change)


def test_the_same_inputs_at_another_place_go_on(copied, tmp_path):
    """Copied files have other time stamps, and that is all."""
    assert run("--updates", "4", "--resume") == 0
    assert [row["update"] for row in crash.metrics(Path("run"))] == [2, 3, 4]


CHANGED_PROMPTS = {
    "sorted": (sorted(PROMPTS), "4 before, 4 now, of which some are others or in another place"),
    "replaced": ([*PROMPTS[:3], "a green house"], "4 before, 4 now, of which some are others or in another place"),
    "one less": (PROMPTS[:3], "4 before, 3 now"),
    "joined otherwise": (["a ca", "ta blue dog", *PROMPTS[2:]], "4 before, 4 now"),
}


@pytest.mark.parametrize("name", CHANGED_PROMPTS)
def test_other_prompts_are_refused(name, copied, capfd):
    prompts, words = CHANGED_PROMPTS[name]
    write_prompts(copied / "prompts.txt", prompts)
    error = refusal(capfd)
    assert error.startswith(f"error: prompts: they have changed ({words}")
    assert "since run/checkpoints/update-0000002 was written" in error


@pytest.mark.parametrize("step", ["1", "3"])
def test_a_replay_is_refused_too(step, copied, capfd):
    """Also of an update before the first checkpoint."""
    write_prompts(copied / "prompts.txt", sorted(PROMPTS))
    assert refusal(capfd, "--replay-step", step).startswith("error: prompts: they have changed")


def test_one_weight_of_the_base_is_enough(copied, capfd):
    """A fingerprint of a few weights, up to casts, would not see it."""
    nudge(copied / "model/unet/diffusion_pytorch_model.safetensors", "conv_out.weight")
    assert refusal(capfd).startswith("error: model.path: the base's weights have changed since")


def test_another_text_encoder_is_refused(copied, capfd):
    other = tiny.write_sd(copied / "other", seed=1)
    shutil.copytree(other / "text_encoder", copied / "model/text_encoder", dirs_exist_ok=True)
    assert refusal(capfd).startswith("error: model.path: the base's text encoders have changed since")


SCHEDULES = {
    "prediction_type": ({"prediction_type": "v_prediction"}, "the base's prediction type or noise levels have changed"),
    "beta_end": ({"beta_end": 0.01201}, "the base's prediction type or noise levels have changed"),
    "beta_schedule": ({"beta_schedule": "linear"}, "the base's prediction type or noise levels have changed"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_another_noise_schedule_is_refused(name, copied, capfd):
    change, words = SCHEDULES[name]
    path = copied / "model/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert words in refusal(capfd)


def edit_state(change) -> None:
    """Change state.json of the newest checkpoint, and write the hashes again."""
    folder = max(Path("run/checkpoints").iterdir())
    path = folder / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    (folder / MANIFEST).unlink()
    write_manifest(folder)


def test_a_commit_of_the_hub_is_named_and_a_revision_may_be_pinned_later(copied, capfd):
    edit_state(lambda state: state["inputs"]["base"].update(commit="0123abcd"))
    assert run("--updates", "3", "--model.revision", "0123abcd", "--resume") == 0
    nudge(copied / "model/unet/diffusion_pytorch_model.safetensors", "conv_in.bias")
    edit_state(lambda state: state["inputs"]["base"].update(commit="0123abcd"))
    assert "the base's weights have changed (commit 0123abcd before, None now)" in refusal(capfd)


def test_checkpoints_without_a_record_go_on_and_say_so(copied, capfd):
    edit_state(lambda state: (state.pop("inputs"), state.pop("files")))
    assert run("--updates", "3", "--resume") == 0
    assert "does not record its inputs: whether prompts, data and base are still the same" in capfd.readouterr().err


BAD_RECORDS = [3, [], {}, {"prompts": 3}, {"prompts": {"count": 4, "sha256": 3}, "base": []}]


@pytest.mark.parametrize("record", BAD_RECORDS, ids=str)
def test_a_record_that_is_none_is_one_line(record, copied, capfd):
    edit_state(lambda state: state.update(inputs=record))
    error = refusal(capfd)
    assert "update-0000002" in error
    assert len(error) < 400


# Pictures


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """A folder of a model, four pictures and a run from them, which is the present one."""
    monkeypatch.chdir(tmp_path)
    tiny.write_sd(Path("model"))
    write_prompts(Path("prompts.txt"), PROMPTS)
    Path("images").mkdir()
    for i, prompt in enumerate(PROMPTS):
        Image.new("RGB", (64, 64), (60 * i, 100, 200)).save(f"images/{i}.png")
        Path(f"images/{i}.txt").write_text(prompt)
    return tmp_path


FROM_DATA = ["--rollout.start", "data", "--data.source", "images"]


def test_other_captions_and_other_pictures_are_refused(pictures, capfd):
    assert run(*FROM_DATA) == 0
    Path("images/1.txt").write_text("a green dog")
    error = refusal(capfd, *FROM_DATA, "--resume")
    assert error.startswith("error: captions: they have changed (4 before, 4 now, of which some are others")
    Path("images/1.txt").write_text(PROMPTS[1])
    Image.new("RGB", (64, 64), (255, 0, 0)).save("images/2.png")
    error = refusal(capfd, *FROM_DATA, "--resume")
    assert error.startswith("error: data.source: 1 of its 4 pictures have changed since")


def test_latents_that_were_rounded_otherwise_go_on_and_say_so(pictures, capfd):
    assert run(*FROM_DATA) == 0
    store = next(path for path in Path("latents").iterdir() if path.is_dir())

    def change(tensors) -> None:
        tensors["latents"].mul_(1 + 2**-12)

    rewrite(store / "latents.safetensors", change)
    (store / MANIFEST).unlink()
    write_manifest(store)
    capfd.readouterr()
    assert run(*FROM_DATA, "--updates", "3", "--resume") == 0
    assert "the latents are those of the checkpoint but for their rounding" in capfd.readouterr().err


# The hashes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_the_hash_of_weights_sees_every_bit(dtype):
    torch.manual_seed(0)
    weights = {"a": torch.randn(3, 5).mul(100).to(dtype), "b": torch.randn(4).mul(100).to(dtype), "c": torch.ones(())}
    expected = input_record.weights_sha256(weights.items())
    assert expected == input_record.weights_sha256(reversed(weights.items()))
    for name in ("a", "b"):
        for i in range(weights[name].numel()):
            changed = {key: value.clone() for key, value in weights.items()}
            changed[name].view(-1).view(torch.uint8)[i * weights[name].element_size()] ^= 1
            assert input_record.weights_sha256(changed.items()) != expected
    assert input_record.weights_sha256([("a", weights["a"].T.contiguous().T)]) == input_record.weights_sha256(
        [("a", weights["a"])]
    ), "the order in memory does not count"
    assert input_record.weights_sha256([("a", weights["a"])]) != input_record.weights_sha256([("b", weights["a"])])
    assert input_record.weights_sha256([("a", weights["a"])]) != input_record.weights_sha256([("a", weights["a"].T)])


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 4, 4), (16, 32, 32)])
def test_codes_of_latents_tell_every_picture_and_no_rounding(shape):
    torch.manual_seed(0)
    latents = torch.randn(300, *shape)
    codes = input_record.latent_codes(latents)
    rounded = latents.bfloat16().float() * (1 + 1e-3 * torch.randn_like(latents))
    assert input_record.changed_latents(codes, input_record.latent_codes(rounded)) == 0
    changed = latents.clone()
    changed[[0, 17, 299]] = torch.randn(3, *shape)
    assert input_record.changed_latents(codes, input_record.latent_codes(changed)) == 3
    assert input_record.changed_latents(codes, input_record.latent_codes(latents.flip(0))) == 300
    with pytest.raises(ValueError, match="codes of 300 and 299 latents"):
        input_record.changed_latents(codes, input_record.latent_codes(latents[1:]))


@pytest.mark.parametrize("codes", ["", "x", "AAAA", 3, "*" * 3200])
def test_codes_that_are_none_are_refused(codes):
    with pytest.raises((ValueError, TypeError)):
        input_record.changed_latents(codes, input_record.latent_codes(torch.ones(300, 2)))
