"""NaN and infinity: never saved, never in place of what is good, and an error that names what is."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import crash
import pytest
import tiny
import torch
from runs import CASE, run
from safetensors.torch import load_file, save_file
from test_durability import at_update, poison

from selfnpo_fast.runtime.errors import NotFiniteError
from selfnpo_fast.runtime.finite import first_not_finite, is_finite
from selfnpo_fast.runtime.folders import MANIFEST, write_manifest
from selfnpo_fast.runtime.world import World
from selfnpo_fast.runtime.writer import Writer
from selfnpo_fast.training.engine_state import Moment, StudentWeights
from selfnpo_fast.training.trainer import Trainer

NAN = float("nan")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("model"))


def checkpoints(output: Path) -> list[str]:
    return [path.name for path in sorted((output / "checkpoints").iterdir())]


def last_line(capfd) -> str:
    return capfd.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_one_bad_value_anywhere_is_seen(dtype, value):
    for size, at in ((1, 0), (7, 6), (4097, 0), (4097, 4096), (100_000, 54_321)):
        tensor = torch.zeros(size, dtype=dtype)
        assert is_finite(tensor)
        tensor[at] = value
        assert not is_finite(tensor)
        assert first_not_finite([("good", torch.ones(3)), ("bad", tensor), ("worse", tensor)]) == "bad"


def test_numbers_and_nothing_are_finite():
    largest = torch.full((3, 3), torch.finfo(torch.float32).max)
    for tensor in (largest, -largest, torch.empty(0), torch.empty(0, 4), torch.tensor(2**62), torch.tensor(True)):
        assert is_finite(tensor)


def test_a_weight_that_no_longer_fits_is_not_written(tmp_path):
    """1e5 is a number in float32 and infinite in float16."""
    writer = Writer(tmp_path / "new", World(0, 1, torch.device("cpu")))
    writer.save("a", [("w", torch.tensor([1e5]))], write=True, finite=True, dtype=torch.float16)
    with pytest.raises(NotFiniteError, match=r"its values are not finite \(a: w \(float16\)\)"):
        writer.finish()
    assert not list(tmp_path.iterdir())


# What turns bad in a run.


def bad_weights(trainer: Trainer) -> None:
    """One value, in the weights and in what ZeRO keeps of them."""
    weights = {name: value.clone() for name, value in trainer.engine.full_weights()}
    next(iter(weights.values())).view(-1)[0] = NAN
    StudentWeights(trainer.engine).load_state_dict(weights)


def bad_reference(trainer: Trainer) -> None:
    """In one average alone: the losses so far are finite."""
    dict(trainer.reference.state_dict())["conv_in.bias"][0] = float("inf")


def bad_moment(trainer: Trainer) -> None:
    parts = trainer._parts(SimpleRecorder())
    moment: Moment = parts.whole["exp_avg_sq"]
    values = {name: value.clone() for name, value in moment.state_dict()}
    values["conv_in.bias"][0] = float("inf")
    parts.whole["exp_avg_sq"].counters.steps = trainer.update
    moment.load_state_dict(values)


class SimpleRecorder:
    """The parts of a recorder that a list of parts names."""

    metrics = counters = None


def bad_eight_bits(trainer: Trainer) -> None:
    for state in trainer.engine.engine.basic_optimizer.state.values():
        state.get("absmax1", state["state1"])[0] = NAN


BAD = {
    "weights": (bad_weights, [], "student.safetensors: "),
    "weights, zero 2": (bad_weights, ["--engine.zero_stage", "2"], "student.safetensors: "),
    "weights, zero 3": (bad_weights, ["--engine.zero_stage", "3"], "student.safetensors: "),
    "lora": (bad_weights, ["--lora.rank", "2"], "student.safetensors: "),
    "reference": (bad_reference, [], "reference.safetensors: conv_in.bias"),
    "reference, bf16": (bad_reference, ["--engine.precision", "bf16"], "reference.safetensors: conv_in.bias"),
    "moment": (bad_moment, [], "exp_avg_sq.safetensors: conv_in.bias"),
    "8 bit": (bad_eight_bits, ["--optimizer.name", "adamw8bit"], "rank0.safetensors: 0."),
}
SLOW = ("weights, zero 2", "lora", "reference, bf16")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in BAD])
def test_a_state_that_is_not_finite_ends_the_run_and_costs_no_checkpoint(name, model, tmp_path, monkeypatch, capfd):
    """Checkpoints at 2, 4, 6, ...; the state turns bad after 6, before it is saved there."""
    action, words, place = BAD[name]
    output = tmp_path / "run"
    at_update(monkeypatch, 6, action)
    assert run(model, output, *words) == 1
    error = last_line(capfd)
    assert f"update-0000006 is not written: its values are not finite ({place}" in error
    assert f"the newest finite checkpoint is {output}/checkpoints/update-0000004" in error
    assert checkpoints(output) == ["update-0000002", "update-0000004"]
    assert not (output / "negative").exists()


@pytest.mark.slow
def test_a_bad_shard_of_another_rank_is_seen(model, tmp_path):
    processes = crash.start(2, crash.words(CASE | {"zero": 2}, model, tmp_path / "run"), tmp_path, spoiled_shard)
    assert crash.finish(processes, tmp_path) == [1, 1], crash.tail(tmp_path)
    assert "update-0000006 is not written" in (tmp_path / "rank0.log").read_text()
    assert checkpoints(tmp_path / "run") == ["update-0000002", "update-0000004"]


def spoiled_shard(argv, env, log):
    """A child whose second rank spoils its own share of the masters."""

    def spoil(trainer: Trainer) -> None:
        if trainer.world.rank == 1:
            for group in trainer.engine.engine.basic_optimizer.param_groups:
                group["params"][0].data[0] = NAN

    with pytest.MonkeyPatch.context() as patch:
        at_update(patch, 6, spoil)
        crash.run_child(argv, env, log)


def test_a_learning_rate_beyond_all_numbers_ends_with_a_line(model, tmp_path, capfd):
    assert run(model, tmp_path / "run", "--optimizer.lr", "1e300", "--optimizer.warmup", "0") == 1
    error = last_line(capfd)
    assert error.startswith("error: ")
    assert "the newest finite checkpoint is none: none was written; start again with a lower optimizer.lr" in error
    assert checkpoints(tmp_path / "run") == []


def test_no_negative_is_made_of_weights_that_are_not_finite(model, tmp_path, monkeypatch, capfd):
    """Also where no checkpoint could be written at the end: the negative is looked at by itself."""
    output = tmp_path / "run"
    at_update(monkeypatch, 2, bad_weights)
    monkeypatch.setattr(Trainer, "_try_to_save", lambda self, recorder: None)
    for words in ([], ["--lora.rank", "2"]):
        assert run(model, output, *words, "--updates", "2", "--overwrite") == 1
        assert f"error: {output}/negative is not written: its values are not finite" in last_line(capfd)
        assert not (output / "negative").exists()


def test_a_request_to_stop_does_not_save_it_either(model, tmp_path, monkeypatch, capfd):
    output = tmp_path / "run"
    at_update(monkeypatch, 5, lambda trainer: (bad_weights(trainer), os.kill(os.getpid(), signal.SIGTERM)))
    assert run(model, output) == 1
    assert f"the newest finite checkpoint is {output}/checkpoints/update-0000004" in last_line(capfd)
    assert checkpoints(output) == ["update-0000002", "update-0000004"]


# Checkpoints that were written before anybody looked.


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> Path:
    """The folder of a run that keeps four checkpoints: 6, 8, 10 and 12."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert run(model, output, "--log.keep", "4") == 0
    return output


def spoil(checkpoint: Path, file: str = "reference", key: str = "conv_in.bias", row: int = 0) -> None:
    """Put a NaN into a file of a checkpoint, and write the hashes again."""
    path = checkpoint / f"{file}.safetensors"
    tensors = load_file(path)
    tensors[key].flatten(0, min(1, tensors[key].ndim - 1))[row].fill_(NAN)
    save_file(tensors, path)
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)


@pytest.fixture
def spoiled(finished, tmp_path) -> Path:
    """A copy whose checkpoints 10 and 12 hold NaN."""

    output = shutil.copytree(finished, tmp_path / "run")
    for update in (10, 12):
        spoil(output / "checkpoints" / f"update-00000{update}")
    return output


def test_resuming_passes_over_them_and_ends_in_the_right_bits(spoiled, finished, model, capfd):
    assert run(model, spoiled, "--log.keep", "4", "--resume") == 0
    log = capfd.readouterr().err
    for update in (10, 12):
        assert f"update-00000{update}, which is not finite: reference.safetensors: conv_in.bias" in log
    assert "update-0000008" in next(line for line in log.splitlines() if line.startswith("resumed from"))
    crash.assert_equal(finished, spoiled)


def test_a_line_names_none_of_them(spoiled, model, monkeypatch, capfd):
    """Resumed from 8, bad at 9, before 10 and 12 are written again."""
    at_update(monkeypatch, 9, bad_weights)
    assert run(model, spoiled, "--resume") == 1
    assert f"the newest finite checkpoint is {spoiled}/checkpoints/update-0000008;" in last_line(capfd)


def test_what_was_passed_over_does_not_count_among_those_that_are_kept(spoiled, model, monkeypatch):
    """With `log.keep 1` the newest by name is a bad one: the one just written has to stay."""

    at_update(monkeypatch, 9, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    assert run(model, spoiled, "--log.keep", "1", "--resume") == 0
    assert checkpoints(spoiled) == ["update-0000009", "update-0000010", "update-0000012"]


def test_states_of_a_rollout_may_be_lost(finished, tmp_path, model):
    """A NaN among the slots costs the updates that it spoils, and goes with its sample."""
    output = shutil.copytree(finished, tmp_path / "run")
    checkpoint = output / "checkpoints" / "update-0000012"
    left = load_file(checkpoint / "rank0.safetensors")["method.left"]
    spoil(checkpoint, "rank0", "method.x", slot := int(left.argmin()))
    assert left.view(-1)[slot] == 0, "this sample ends first"
    assert run(model, output, "--updates", "21", "--log.keep", "9", "--resume") == 0
    rows = crash.metrics(output)
    assert rows[-2]["skipped"] > 0
    assert rows[-1]["skipped"] == rows[-2]["skipped"], "the last updates were applied"


def test_skipped_updates_are_no_error(model, tmp_path, monkeypatch):
    """A loss that is not finite leaves the state as it was, and that is saved."""
    poison(monkeypatch, {2, 4})
    assert run(model, tmp_path / "run", "--log.keep", "9", "--updates", "4") == 0
    assert checkpoints(tmp_path / "run") == ["update-0000002", "update-0000004"]
