"""Checkpoints: complete, whole or passed over, resumed by any number of ranks, never unpickled."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import crash
import diffusers
import pytest
import tiny
import torch
from runs import CASE, run
from safetensors.torch import load_file

import selfnpo_fast
from selfnpo_fast.config import DataConfig, TrainConfig
from selfnpo_fast.runtime.folders import why_not_whole, write_manifest
from selfnpo_fast.runtime.world import init_world
from selfnpo_fast.training.engine import StudentEngine, start_deepspeed
from selfnpo_fast.training.engine_state import EngineCounters, loss_scale
from selfnpo_fast.training.resumable import recipe

PACKAGE = Path(__file__).parents[2] / "selfnpo_fast"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> Path:
    """The folder of a run of 12 updates that keeps four checkpoints; tests change copies of it."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert run(model, output, "--log.keep", "4") == 0
    return output


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def newest(output: Path) -> Path:
    return max((output / "checkpoints").iterdir())


def test_a_resumed_run_may_keep_its_latents_elsewhere():
    assert recipe(TrainConfig(data=DataConfig(store="a"))) == recipe(TrainConfig(data=DataConfig(store="b")))
    assert recipe(TrainConfig(data=DataConfig(stride=1))) == recipe(TrainConfig(data=DataConfig(stride=2)))
    assert recipe(TrainConfig(data=DataConfig(source="a"))) != recipe(TrainConfig(data=DataConfig(source="b")))


def test_a_checkpoint_holds_everything(finished, model):
    names = [path.name for path in sorted((finished / "checkpoints").iterdir())]
    assert names == [f"update-{update:07d}" for update in (6, 8, 10, 12)]
    folder = newest(finished)
    assert why_not_whole(folder) is None
    assert {path.name for path in folder.iterdir()} == {
        *("student.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors", "reference.safetensors"),
        *("rank0.safetensors", "state.json", "manifest.json"),
    }
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    shapes = {name: p.shape for name, p in unet.named_parameters()}
    for name in ("student", "exp_avg", "exp_avg_sq", "reference"):
        tensors = load_file(folder / f"{name}.safetensors")
        for counter in ("version", "updates"):
            tensors.pop(counter, None)
        assert {key: value.shape for key, value in tensors.items()} == shapes, name
        assert all(value.dtype == torch.float32 for value in tensors.values())
    of_rank = load_file(folder / "rank0.safetensors")
    assert {"rng.cpu", "method.ids", "method.index", "method.x", "recorder.loss"} <= of_rank.keys()
    state = json.loads((folder / "state.json").read_text())
    assert state["update"] == state["engine"]["steps"] == state["engine"]["lr_steps"] == 12
    assert state["config"]["optimizer"]["lr"] == 1e-2
    assert state["versions"]["torch"] == torch.__version__


def truncate(folder: Path) -> str:
    path = folder / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "student.safetensors has"


def flip(folder: Path) -> str:
    path = folder / "exp_avg.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    return "exp_avg.safetensors has changed"


def lose(folder: Path) -> str:
    (folder / "rank0.safetensors").unlink()
    return "rank0.safetensors is missing"


def no_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json is not readable"


def half_manifest(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:40])
    return "manifest.json is not readable"


@pytest.mark.parametrize("damage", [truncate, flip, lose, no_manifest, half_manifest])
def test_what_is_not_whole_is_passed_over_and_the_run_ends_alike(damage, finished, copied, model, capfd):
    folder = newest(copied)
    reason = damage(folder)
    assert run(model, copied, "--log.keep", "4", "--resume") == 0
    log = capfd.readouterr().err
    line = next(line for line in log.splitlines() if "passing over" in line)
    assert str(folder) in line
    assert reason in line
    assert "resumed from" in log
    assert "update-0000010" in log
    crash.assert_equal(finished, copied)


def test_where_none_is_whole_no_run_starts_again_in_silence(copied, model, capfd):
    for folder in (copied / "checkpoints").iterdir():
        lose(folder)
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    assert run(model, copied, "--resume") == 2
    assert "--overwrite" in capfd.readouterr().err.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


def test_another_config_is_refused_with_every_field_named(copied, model, capfd):
    words = ["--seed", "9", "--rollout.omega", "3", "--optimizer.betas", "[0.5, 0.9]"]
    assert run(model, copied, *words, "--resume") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    for field in ("seed is 9, but was 0", "rollout.omega is 3.0, but was -1.0", "optimizer.betas is [0.5, 0.9]"):
        assert field in error


def test_length_log_folder_and_graphs_may_change(copied, model, tmp_path):
    moved = copied.rename(tmp_path / "moved")
    assert run(model, moved, "--updates", "15", "--log.every", "5", "--engine.graphs", "false", "--resume") == 0
    assert [row["update"] for row in crash.metrics(moved)] == [3, 6, 9, 12, 15]
    assert newest(moved).name == "update-0000015"


def test_an_option_that_came_later_is_at_its_default(copied, model, capfd):
    path = newest(copied) / "state.json"
    state = json.loads(path.read_text())
    del state["config"]["rollout"]["s_shift"], state["config"]["model"]["frames"]
    path.write_text(json.dumps(state))
    write_manifest_again(newest(copied))
    assert run(model, copied, "--rollout.s_shift", "2", "--resume") == 2
    assert "rollout.s_shift is 2.0, but was 1.0" in capfd.readouterr().err.splitlines()[-1]
    assert run(model, copied, "--resume") == 0


def test_other_versions_are_logged(copied, model, capfd):
    path = newest(copied) / "state.json"
    path.write_text(path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    write_manifest_again(newest(copied))
    assert run(model, copied, "--resume") == 0
    assert f"version of torch is '{torch.__version__}', but was '1.0'" in capfd.readouterr().err


def test_a_checkout_that_is_not_installed_writes_checkpoints(model, tmp_path, monkeypatch):
    """Nor need an optimizer be installed that the run does not use."""
    original = importlib.metadata.version

    def version(name: str) -> str:
        if name.lower().replace("_", "-") in ("selfnpo-fast", "bitsandbytes"):
            raise importlib.metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert run(model, tmp_path / "run", "--updates", "3") == 0
    found = json.loads((newest(tmp_path / "run") / "state.json").read_text())["versions"]
    assert found["selfnpo-fast"] == selfnpo_fast.__version__
    assert found["torch"] == torch.__version__
    assert found["bitsandbytes"] == "not installed"
    assert found["diffusers"] == diffusers.__version__


def write_manifest_again(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    write_manifest(folder)


def test_leftovers_of_a_killed_run_are_no_checkpoints_and_go(copied, model):
    folder = copied / "checkpoints"
    shutil.copytree(newest(copied), folder / ".writing-update-0000099")
    (folder / ".deleting-update-0000002").mkdir()
    assert run(model, copied, "--updates", "14", "--resume") == 0
    assert all(path.name.startswith("update-") for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "ranks"), [(2, (1, 2)), (0, (2, 1)), (3, (2, 1)), (3, (1, 2))], ids=str)
def test_another_number_of_ranks_goes_on(zero, ranks, model, tmp_path):
    """The same pairs, and losses and moments to rounding.

    The sums of the metrics continue in the middle of an interval.
    """
    case = CASE | {"zero": zero}
    more = ["--log.every", "4", "--log.keep", "9", "--optimizer.lr", "1e-4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(model, whole, *more, zero=zero) == 0
    for count in ranks:
        processes = crash.start(count, [*crash.words(case, model, parts), *more, "--resume"], tmp_path)
        assert crash.finish(processes, tmp_path) == [0] * count, crash.tail(tmp_path)
        if count == ranks[0]:
            for folder in (parts / "checkpoints").iterdir():
                if folder.name > "update-0000006":
                    shutil.rmtree(folder)
    for expected, found in zip(crash.metrics(whole), crash.metrics(parts), strict=True):
        # Each rank fills its slots until its last sample has arrived: forwards depend on the split.
        expected.pop("reference_forwards_per_pair"), found.pop("reference_forwards_per_pair")
        for key, value in expected.items():
            assert found[key] == (value and pytest.approx(value, rel=5e-6)), key  # observed: 6e-7
    expected, found = (load_file(newest(folder) / "exp_avg.safetensors") for folder in (whole, parts))
    scale = max(value.abs().max() for value in expected.values())
    assert max((expected[key] - found[key]).abs().max() for key in expected) < 1e-5 * scale  # observed: 1.4e-6
    one, other = (load_file(newest(folder) / "rank0.safetensors") for folder in (whole, parts))
    lanes = slice(0, 4 // ranks[1])
    assert torch.equal(one["method.ids"][:, lanes], other["method.ids"])
    torch.testing.assert_close(one["method.x"][:, lanes], other["method.x"], rtol=1e-3, atol=1e-4)


def test_8_bit_moments_are_refused_elsewhere_with_a_reason(model, tmp_path):
    words = [*crash.words(CASE, model, tmp_path / "run"), "--optimizer.name", "adamw8bit", "--updates", "2"]
    processes = crash.start(2, words, tmp_path)
    assert crash.finish(processes, tmp_path) == [0, 0], crash.tail(tmp_path)
    processes = crash.start(1, [*words, "--resume"], tmp_path)
    assert crash.finish(processes, tmp_path) == [2]
    error = (tmp_path / "rank0.log").read_text().splitlines()[-1]
    assert "8-bit" in error
    assert "2 ranks" in error


class Bomb:
    """An object whose unpickling leaves the file `trace`."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["student", "exp_avg", "reference", "rank0"])
def test_a_hostile_pickle_in_a_checkpoint_is_refused(name, copied, model, tmp_path, capfd):
    trace, folder = tmp_path / "executed", newest(copied)
    (folder / f"{name}.safetensors").write_bytes(pickle.dumps(Bomb(trace)))
    (folder / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Bomb(trace)))
    write_manifest_again(folder)  # the attacker knows how
    assert run(model, copied, "--resume") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert f"{name}.safetensors is not readable" in error
    assert not trace.exists()


def test_a_manifest_names_only_files_of_its_folder(copied):
    folder = newest(copied)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"../../config.yaml": {"bytes": 1, "sha256": ""}}))
    assert why_not_whole(folder) == "../../config.yaml is missing"


def test_nothing_in_the_package_unpickles():
    """No torch.load, no pickle, no weights_only anywhere."""
    words = ("torch.load", "pickle.", "weights_only=False", "allow_pickle", "trust_remote_code", "joblib", "dill")
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call | ast.Import | ast.ImportFrom):
                text = ast.unparse(node)
                assert not any(word in text for word in words), f"{path}:{node.lineno}: {text}"


def test_the_loss_scale_of_fp16_is_saved():
    """fp16 needs a GPU; the scaler itself does not."""
    start_deepspeed(init_world())  # its scaler asks for the rank
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    def engine(scale: float) -> StudentEngine:
        scaler = DynamicLossScaler(scale, 100, 1.0, 2, False)
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.5)
        student = object.__new__(StudentEngine)
        student.stage = 1
        student.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        student.engine = SimpleNamespace(basic_optimizer=optimizer, optimizer=SimpleNamespace(loss_scaler=scaler))
        return student

    first, second = engine(2.0**16), engine(2.0**4)
    for overflow in (False, True, False, False, True):
        first.engine.optimizer.loss_scaler.update_scale(overflow)
    first.lr_scheduler.last_epoch = 3
    EngineCounters(second).load_state_dict(json.loads(json.dumps(EngineCounters(first).state_dict())))
    assert loss_scale(second)["cur_scale"] == loss_scale(first)["cur_scale"] < 2.0**16
    assert second.lr == 0.5 / 4
    for overflow in (True, False, True):
        for student in (first, second):
            student.engine.optimizer.loss_scaler.update_scale(overflow)
        assert vars(first.engine.optimizer.loss_scaler) == vars(second.engine.optimizer.loss_scaler)
