"""What can happen to a run: signals, lost ranks, full or lost disks, losses that are not finite."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import crash
import psutil
import pytest
import tiny
import torch
from PIL import Image
from runs import CASE, at_update, run
from safetensors import SafetensorError
from safetensors.torch import load_file

from selfnpo_fast import train
from selfnpo_fast.data import latent_store
from selfnpo_fast.models.sd import StableDiffusionAdapter
from selfnpo_fast.rollout import ContinuousRollout, Pairs, continuous
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.folders import why_not_whole
from selfnpo_fast.runtime.world import World
from selfnpo_fast.training import replay
from selfnpo_fast.training.inputs import load_inputs
from selfnpo_fast.training.trainer import Trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert run(model, output) == 0
    return output


# Requests to stop.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
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


def signal_at_call(monkeypatch, owner, name: str, call: int) -> None:
    """Send SIGTERM to this process at that call of a function."""
    original, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def test_a_stop_while_prompts_are_encoded_leaves_nothing_behind(model, tmp_path, monkeypatch, capfd):
    output = tmp_path / "run"
    signal_at_call(monkeypatch, StableDiffusionAdapter, "encode_batch", 1)
    assert run(model, output, "--prompts.limit", "65") == 0, "two rounds"
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "prompts are longer" not in line] == [
        "SIGTERM: the run saves and stops; a later Ctrl-C ends it without a checkpoint",
        "SIGTERM: stopped while prompts were encoded; nothing is written, the same command starts again",
    ]
    assert not output.exists()


def test_a_stop_while_images_are_encoded_keeps_what_is_encoded(model, tmp_path, monkeypatch, capfd):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(5):
        Image.new("RGB", (16, 16), (50 * i, 0, 0)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text("a square")
    monkeypatch.setattr(latent_store, "BATCH", 2)
    words = ["--rollout.start", "data", "--data.source", str(images), "--data.store", str(tmp_path / "latents")]
    with monkeypatch.context() as patch:
        signal_at_call(patch, StableDiffusionAdapter, "encode", 2)
        assert run(model, tmp_path / "run", *words) == 0
    assert "SIGTERM: stopped after 4 of 5 images, whose latents are kept" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run(model, tmp_path / "run", *words) == 0
    assert "going on after 4" in capfd.readouterr().err


def test_a_stop_while_slots_are_filled_saves_the_update_before(model, tmp_path, monkeypatch, capfd):
    """Update 2 fills the slots of two groups; it is not begun."""
    words = ["--engine.accumulation", "2", "--engine.batch_size", "8"]
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert run(model, whole, *words) == 0
    with monkeypatch.context() as patch:
        signal_at_call(patch, continuous, "walk", 3)
        assert run(model, output, *words) == 0
    log = capfd.readouterr().err
    assert f"SIGTERM: stopped after update 1; checkpoint {output}/checkpoints/update-0000001" in log
    assert run(model, output, *words, "--resume") == 0
    crash.assert_equal(whole, output)


def test_a_replay_can_be_stopped(model, whole, tmp_path, monkeypatch, capfd):
    output = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(output / "checkpoints")
    at_update(monkeypatch, 2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    assert run(model, output, "--replay-step", "9") == 0
    assert "SIGTERM: stopped before update 9 was reached; nothing is written" in capfd.readouterr().err
    assert not (output / "replay").exists()


def states(output: Path) -> dict[str, int]:
    """The inode of each checkpoint's state: another one, where it was written again."""
    return {path.name: (path / "state.json").stat().st_ino for path in (output / "checkpoints").iterdir()}


def test_a_state_that_is_saved_is_not_saved_again(model, tmp_path, monkeypatch, capfd):
    """By a signal just after a checkpoint, and by one before the first update of a resumed run."""
    output, seen = tmp_path / "run", []
    original = Trainer.save_checkpoint

    def save_checkpoint(self, recorder) -> Path:
        path = original(self, recorder)
        seen.append(states(output))
        return path

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", save_checkpoint)
        at_update(patch, 4, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        assert run(model, output) == 0
    assert [sorted(names) for names in seen[1:]] == [["update-0000002", "update-0000004"]] * 2
    assert seen[1] == seen[2] == states(output)
    assert f"stopped after update 4; checkpoint {output}/checkpoints/update-0000004" in capfd.readouterr().err
    resume = Trainer.resume
    monkeypatch.setattr(
        Trainer, "resume", lambda *arguments: (resume(*arguments), os.kill(os.getpid(), signal.SIGTERM))[0]
    )
    assert run(model, output, "--resume") == 0
    assert f"stopped after update 4; checkpoint {output}/checkpoints/update-0000004" in capfd.readouterr().err
    assert seen[1] == states(output)


def test_a_saved_state_whose_folder_is_gone_is_saved_again(model, tmp_path, monkeypatch):
    output = tmp_path / "run"
    original = Trainer._try_to_save

    def lost(self, recorder) -> None:
        original(self, recorder)
        if self.update == 4:
            shutil.rmtree(self.saved)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_try_to_save", lost)
    assert run(model, output) == 0
    assert why_not_whole(output / "checkpoints" / "update-0000004") is None


def test_sigterm_to_one_of_two_ranks_ends_both_with_a_checkpoint(model, tmp_path):
    case = CASE | {"ranks": 2, "zero": 2}
    argv = [*crash.words(case, model, tmp_path / "run"), "--updates", "100000", "--log.checkpoint_every", "0"]
    processes = crash.start(2, argv, tmp_path)
    deadline = time.monotonic() + crash.PATIENCE
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert crash.finish(processes, tmp_path) == [0, 0], crash.tail(tmp_path)
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert why_not_whole(saved) is None
    assert {"rank0.safetensors", "rank1.safetensors"} <= {path.name for path in saved.iterdir()}


class OtherHost(World):
    """A world whose rank 1 has read another file of prompts."""

    def gather(self, value):
        return [value, "another hash"]


def test_hosts_with_different_prompts_are_refused(model, tmp_path):
    """They would encode in different numbers of rounds, and wait for each other for ever."""
    config = train.parse(crash.words(CASE, model, tmp_path)).config
    with pytest.raises(UserError, match=r"prompts\.source: not all ranks have read the same prompts"):
        load_inputs(config, OtherHost(0, 2, torch.device("cpu")))


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["Ctrl-C", "launcher killed"])
def test_what_happens_to_deepspeeds_launcher_ends_its_ranks_with_a_checkpoint(attack, model, tmp_path):
    """Ctrl-C goes to all processes of the terminal: `deepspeed`, its launcher, and the ranks."""
    output, log = tmp_path / "run", tmp_path / "log"
    argv = [*crash.words(CASE, model, output), "--updates", "100000", "--log.checkpoint_every", "0"]
    command = [str(Path(sys.executable).parent / "deepspeed"), "--master_port", str(crash.free_port())]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--num_gpus", "2", str(ROOT / "selfnpo_fast" / "train.py"), *argv],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.PIPE,  # which ends with the last rank
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    while not (output / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    if attack == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        (launcher,) = psutil.Process(process.pid).children()
        assert "deepspeed.launcher.launch" in launcher.cmdline()
        launcher.kill()
    _, said = process.communicate()
    # Signals that come together may be seen in any order.
    name = "SIG(INT|TERM)" if attack == "Ctrl-C" else "the launcher is gone"
    assert re.search(f"{name}: the run saves and stops", said), said
    assert re.search(f"{name}: stopped after update ", said), said
    (saved,) = (output / "checkpoints").iterdir()
    assert why_not_whole(saved) is None


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_rank_ends_the_other_with_a_line_that_names_it(victim, model, tmp_path):
    case = CASE | {"ranks": 2}
    processes = crash.start(2, [*crash.words(case, model, tmp_path / "run"), "--updates", "100000"], tmp_path)
    deadline = time.monotonic() + crash.PATIENCE
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(processes[victim].pid, signal.SIGKILL)
    codes = crash.finish(processes, tmp_path, crash.PATIENCE)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    assert f"rank {victim} is lost" in (tmp_path / f"rank{1 - victim}.log").read_text()


@pytest.mark.slow
def test_an_error_of_only_one_rank_ends_the_other_with_its_message(model, tmp_path):
    """Only rank 1 cannot read its model: rank 0 would wait for it in the first collective."""
    case = CASE | {"ranks": 2}
    argv = crash.words(case, model, tmp_path / "run")
    processes = crash.start(2, argv, tmp_path, _rank_1_has_another_model)
    assert crash.finish(processes, tmp_path, crash.PATIENCE) == [1, 2]
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


def test_a_replay_that_finds_the_disk_full_is_one_line(whole, model, tmp_path, monkeypatch, capfd):
    output = shutil.copytree(whole, tmp_path / "run")

    def full(*_) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(replay, "save_file", full)
    capfd.readouterr()
    assert run(model, output, "--replay-step", "9") == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {output}/replay/update-0000009 could not be written: I/O error: No space left")


def test_replay_of_an_update_that_is_not_there_is_refused(model, tmp_path, capfd):
    assert run(model, tmp_path / "run", "--replay-step", "13") == 2
    assert "--replay-step: 13 is not possible; expected an update from 1 to 12" in capfd.readouterr().err


ROWS = [b"\xff\xfe\n", b"[" * 100_000 + b"\n", b'{"update": "x"}\n', b'{"loss": 1}\n', b"[]\n", b"x" * 200_000 + b"\n"]


def test_metrics_that_are_none_are_left_out_with_a_line(model, whole, tmp_path, capfd):
    """Also between good rows. Half a row at the end is what a kill leaves, and no news."""
    output = shutil.copytree(whole, tmp_path / "run")
    path = output / "metrics.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*rows[:2], *ROWS, *rows[2:]]))
    assert run(model, output, "--updates", "13", "--resume") == 0
    assert "lines that are no rows of metrics are left out, the first is line 3" in capfd.readouterr().err
    assert [row["update"] for row in crash.metrics(output)] == [3, 6, 9, 12, 13]
    path.write_bytes(path.read_bytes() + b'{"update": 15, "lo')
    assert run(model, output, "--updates", "14", "--resume") == 0
    assert "no rows" not in capfd.readouterr().err
    assert [row["update"] for row in crash.metrics(output)] == [3, 6, 9, 12, 13, 14]


def test_metrics_that_are_a_pipe_cost_a_line_and_are_not_waited_for(model, whole, tmp_path, capfd):
    output = shutil.copytree(whole, tmp_path / "run")
    (output / "metrics.jsonl").unlink()
    os.mkfifo(output / "metrics.jsonl")
    capfd.readouterr()
    assert run(model, output, "--updates", "13", "--resume") == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if "metrics.jsonl" in line]
    assert len(lines) == 2, "one for reading, one for writing"
    assert all(line.endswith("; training goes on") for line in lines)
    assert (output / "negative").is_dir()


def test_a_loss_that_is_not_finite_is_null_in_the_record(model, tmp_path, monkeypatch):
    """JSON knows no NaN: other programs could not read the file."""
    output = tmp_path / "run"
    poison(monkeypatch, {2})
    assert run(model, output, "--updates", "2", "--log.every", "1", "--replay-step", "2") == 0

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    lines = (output / "replay" / "update-0000002" / "pairs.jsonl").read_text().splitlines()
    losses = [json.loads(line, parse_constant=refuse)["loss"] for line in lines]
    assert losses[0] is None
    assert all(loss > 0 for loss in losses[1:])
