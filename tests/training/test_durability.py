"""What can happen to a run: signals, lost ranks, full or lost disks, losses that are not finite."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import crash
import pytest
import tiny
import torch
from safetensors.torch import load_file

from selfnpo_fast import train
from selfnpo_fast.rollout import ContinuousRollout, Pairs
from selfnpo_fast.runtime.folders import why_not_whole
from selfnpo_fast.training.trainer import Trainer

CASE = {"ranks": 1, "zero": 0, "reference": "ema", "mode": "continuous", "lora": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("model"))


def run(model: Path, output: Path, *more: str, **changes) -> int:
    return train.main([*crash.words(CASE | changes, model, output), *more])


def at_update(monkeypatch, update: int, action) -> None:
    """Call `action(trainer)` after this update, before anything is saved."""
    original = Trainer.train_update

    def train_update(self, recorder):
        original(self, recorder)
        if self.update == update:
            action(self)

    monkeypatch.setattr(Trainer, "train_update", train_update)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert run(model, output) == 0
    return output


# Requests to stop.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_update_saves_and_leaves_with_0(number, model, whole, tmp_path, monkeypatch, capfd):
    output, handler = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_update(patch, 5, lambda trainer: os.kill(os.getpid(), number))
        assert run(model, output) == 0
    log = capfd.readouterr().err
    assert f"{number.name}: stopped after update 5; checkpoint {output}/checkpoints/update-0000005" in log
    assert not (output / "negative").exists()
    assert signal.getsignal(number) is handler, "the handlers of the program that called us are back"
    assert run(model, output, "--resume") == 0
    crash.assert_equal(whole, output)


def test_sigterm_to_one_of_two_ranks_ends_both_with_a_checkpoint(model, tmp_path):
    case = CASE | {"ranks": 2, "zero": 2}
    argv = [*crash.words(case, model, tmp_path / "run"), "--updates", "100000", "--log.checkpoint_every", "0"]
    processes = crash.start(2, argv, tmp_path)
    deadline = time.monotonic() + crash.LOST_WITHIN
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert crash.finish(processes, tmp_path) == [0, 0], crash.tail(tmp_path)
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert why_not_whole(saved) is None
    assert {"rank0.safetensors", "rank1.safetensors"} <= {path.name for path in saved.iterdir()}


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_rank_ends_the_other_with_a_line_that_names_it(victim, model, tmp_path):
    case = CASE | {"ranks": 2}
    processes = crash.start(2, [*crash.words(case, model, tmp_path / "run"), "--updates", "100000"], tmp_path)
    deadline = time.monotonic() + crash.LOST_WITHIN
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(processes[victim].pid, signal.SIGKILL)
    codes = crash.finish(processes, tmp_path, crash.LOST_WITHIN)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    assert f"rank {victim} is lost" in (tmp_path / f"rank{1 - victim}.log").read_text()


@pytest.mark.slow
def test_an_error_of_only_one_rank_ends_the_other_with_its_message(model, tmp_path):
    """Only rank 1 cannot read its model: rank 0 would wait for it in the first collective."""
    case = CASE | {"ranks": 2}
    argv = crash.words(case, model, tmp_path / "run")
    processes = crash.start(2, argv, tmp_path, _rank_1_has_another_model)
    assert crash.finish(processes, tmp_path, crash.LOST_WITHIN) == [1, 2]
    assert "rank 1 is lost: it has left: model.path: no such folder" in (tmp_path / "rank0.log").read_text()


def _rank_1_has_another_model(argv, env, log):
    if env["RANK"] == "1":
        argv = [*argv, "--model.path", "./nowhere"]
    crash.run_child(argv, env, log)


# Disks.


def limited(argv, env, log):
    """A child that can write no file beyond 100 kB.

    The kernel's error is "File too large", in place of "No space left".
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    crash.run_child(argv, env, log)


@pytest.mark.parametrize("policy", [pytest.param("continue", marks=pytest.mark.slow), "stop"])
def test_a_full_disk_leaves_the_checkpoint_before_intact(policy, model, tmp_path):
    output = tmp_path / "run"
    argv = [*crash.words(CASE, model, output), "--log.on_save_error", policy]
    assert crash.finish(crash.start(1, [*argv, "--updates", "4"], tmp_path), tmp_path) == [0]
    processes = crash.start(1, [*argv, "--resume"], tmp_path, limited)
    assert crash.finish(processes, tmp_path) == [1], crash.tail(tmp_path)
    log = (tmp_path / "rank0.log").read_text()
    assert "student.safetensors" in log
    assert "File too large" in log
    names = [path.name for path in sorted((output / "checkpoints").iterdir())]
    assert names == ["update-0000002", "update-0000004"], "and nothing half-written"
    assert all(why_not_whole(output / "checkpoints" / name) is None for name in names)
    assert ("training goes on" in log) == (policy == "continue")
    assert [row["update"] for row in crash.metrics(output)][-1] == (12 if policy == "continue" else 6)
    assert log.strip().splitlines()[-1].startswith("error: "), "the negative model could not be written, either"
    assert crash.files(output)["negative/unet/diffusion_pytorch_model.safetensors"], "that of the first run is whole"
    assert crash.finish(crash.start(1, [*argv, "--resume"], tmp_path), tmp_path) == [0], "with room again"


def test_a_folder_that_takes_nothing_is_tried_again_at_the_next_checkpoint(model, whole, tmp_path, monkeypatch, capfd):
    """/sys is read-only for everybody, root included."""
    output = tmp_path / "run"
    good = output / "checkpoints"

    def block(trainer):
        good.rename(output / "hidden")
        good.symlink_to("/sys")

    def unblock(trainer):
        good.unlink()
        (output / "hidden").rename(good)

    at_update(monkeypatch, 5, block)
    at_update(monkeypatch, 9, unblock)
    assert run(model, output) == 0
    log = capfd.readouterr().err
    assert log.count("could not be written") == 2
    for update in (6, 8):
        assert f"update-{update:07d} could not be written (rank 0, folder: " in log
    crash.assert_equal(whole, output)


def test_a_vanished_folder_is_made_again(model, whole, tmp_path, monkeypatch):
    output = tmp_path / "run"
    at_update(monkeypatch, 5, lambda trainer: shutil.rmtree(output))
    assert run(model, output) == 0
    expected, found = crash.files(whole), crash.files(output)
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert all(torch.equal(value, found[name][key]) for key, value in tensors.items())


# Losses and gradients that are not finite.


def poison(monkeypatch, updates: set[int], value: float = float("nan")) -> None:
    """Make a target of these updates useless."""
    original, calls = ContinuousRollout.next_pairs, []

    def next_pairs(self) -> Pairs:
        pairs = original(self)
        calls.append(None)
        if len(calls) in updates:
            pairs.target[0].fill_(value)
        return pairs

    monkeypatch.setattr(ContinuousRollout, "next_pairs", next_pairs)


ENGINES = {
    "zero 0": [],
    "zero 1": ["--engine.zero_stage", "1"],
    "zero 2": ["--engine.zero_stage", "2"],
    "zero 3": ["--engine.zero_stage", "3"],
    "bf16": ["--engine.precision", "bf16"],
    "bf16, zero 2": ["--engine.precision", "bf16", "--engine.zero_stage", "2"],
    "8 bit": ["--optimizer.name", "adamw8bit"],
}


SLOW = ("zero 1", "zero 2", "bf16, zero 2", "8 bit")


@pytest.mark.parametrize("engine", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ENGINES])
def test_a_useless_update_is_skipped_and_counted(engine, model, tmp_path, monkeypatch, capfd):
    """Weights and moments after updates 1, 2, (3 skipped) are those after update 2.

    The average still follows the weights.
    """
    words = [*ENGINES[engine], "--log.checkpoint_every", "1", "--log.keep", "9", "--log.every", "1"]
    output = tmp_path / "run"
    poison(monkeypatch, {3})
    assert run(model, output, *words, "--updates", "4") == 0
    rows = crash.metrics(output)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1]
    assert all(row["loss"] > 0 and row["grad_norm"] >= 0 for row in rows), "of the finite pairs"
    assert "update 3 skipped: its loss or gradient is not finite (1 in a row, 1 in all)" in capfd.readouterr().err
    before, after, later = (output / "checkpoints" / f"update-000000{update}" for update in (2, 3, 4))
    for name in [path.name for path in before.glob("*.safetensors") if not path.name.startswith("rank")]:
        expected, found, moved = (load_file(folder / name) for folder in (before, after, later))
        if name == "reference.safetensors":
            for key, value in load_file(before / "student.safetensors").items():
                if "bf16" in engine:  # the average follows the network's weights, not their masters
                    value = value.bfloat16().float()
                torch.testing.assert_close(found[key], torch.lerp(value, expected[key], 0.9), rtol=1e-5, atol=1e-7)
            assert found["version"] == expected["version"] + 1 == 3
            continue
        assert all(torch.equal(expected[key], found[key]) for key in expected), name
        assert any(not torch.equal(found[key], moved[key]) for key in expected), f"{name} goes on after it"


def test_an_infinite_loss_with_finite_gradients_is_skipped_too(model, tmp_path, monkeypatch):
    """L2 of a difference of 1e20 overflows; its gradient, 2e20 over the size, does not."""
    poison(monkeypatch, {3}, 1e20)
    assert run(model, tmp_path / "run", "--loss.kind", "l2", "--log.every", "1", "--updates", "4") == 0
    assert crash.metrics(tmp_path / "run")[-1]["skipped"] == 1


def test_too_many_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(model, tmp_path, monkeypatch, capfd):
    output = tmp_path / "run"
    poison(monkeypatch, {2, *range(5, 99)})
    assert run(model, output, "--optimizer.max_skipped", "3", "--log.every", "1") == 1
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: 3 updates in a row")
    assert f"{output}/checkpoints/update-0000006" in error, "skipped updates leave the weights good"
    assert not (output / "negative").exists()


# Spikes and their replay.

SPIKED = ["--optimizer.lr", "1e-5", "--updates", "35"]
SPIKED += ["--log.every", "10", "--log.checkpoint_every", "8", "--log.keep", "9"]


@pytest.fixture(scope="module")
def spiked(model, tmp_path_factory) -> tuple[Path, Pairs, str]:
    """A run with a spike at update 31 of 35, the pairs behind it, and its log."""
    output, seen = tmp_path_factory.mktemp("spiked") / "run", []
    original = ContinuousRollout.next_pairs

    def next_pairs(self) -> Pairs:
        pairs = original(self)
        seen.append(pairs)
        if len(seen) == 31:
            pairs.target[2].add_(400)
        return pairs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContinuousRollout, "next_pairs", next_pairs)
        words = SPIKED
        assert run(model, output, *words) == 0
    return output, seen[30], (output / "train.log").read_text()


def test_a_spike_is_logged_with_noise_levels_and_sample_ids(spiked):
    _, pairs, log = spiked
    (line,) = [line for line in log.splitlines() if "times the median" in line]
    assert "update 31: loss" in line
    first = line.partition("worst pairs: ")[2].partition(" loss")[0]
    assert first == f"sample {pairs.sample_ids[2]} t {pairs.t[2]} s {pairs.s[2]}"
    assert line.endswith("--replay-step 31")


@pytest.mark.parametrize("with_checkpoints", [True, False])
def test_replay_makes_the_same_pairs_and_touches_nothing_else(with_checkpoints, spiked, model, tmp_path, capfd):
    run_folder, pairs, _ = spiked
    output = shutil.copytree(run_folder, tmp_path / "run")
    if not with_checkpoints:
        shutil.rmtree(output / "checkpoints")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    words = SPIKED
    assert run(model, output, *words, "--replay-step", "31") == 0
    folder = output / "replay" / "update-0000031"
    again = load_file(folder / "pairs.safetensors")
    order = torch.argsort(again["sample_ids"])
    mine = torch.argsort(pairs.sample_ids)
    for name in ("x_s", "s", "t", "rows", "weight"):
        assert torch.equal(again[name][order], getattr(pairs, name)[mine]), name
    target = pairs.target.clone()
    target[2] -= 400
    torch.testing.assert_close(again["target"][order], target[mine], rtol=0, atol=1e-4)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == sorted((row["loss"] for row in rows), reverse=True)
    assert (folder / "grid.png").stat().st_size > 1000
    assert f"making updates {25 if with_checkpoints else 1} to 31" in capfd.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in before}
    new = {path for path in output.rglob("*") if path.is_file()} - before.keys()
    assert all(path.is_relative_to(folder) for path in new)


def test_replay_of_an_update_that_is_not_there_is_refused(model, tmp_path, capfd):
    assert run(model, tmp_path / "run", "--replay-step", "13") == 2
    assert "--replay-step: 13 is not possible; expected an update from 1 to 12" in capfd.readouterr().err
