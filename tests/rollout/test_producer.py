"""Pairs made ahead: their reference, their memory, their errors, and their part in a checkpoint."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import threading
import traceback
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig as PeftConfig
from safetensors.torch import load_file

from selfnpo_fast import train
from selfnpo_fast.rollout import OverlappedProducer, Pairs, Producer
from selfnpo_fast.training import trainer

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"
CPU = torch.device("cpu")
FIELDS = ("x_s", "s", "target", "t", "rows", "weight", "sample_ids")


class Counting:
    """A rollout whose pairs say which call made them; every call counts three forwards.

    `threads` has the thread of each call.
    """

    def __init__(self) -> None:
        self.calls, self.forwards, self.threads, self.maker = 0, 0, [], self
        self.device, self.batch = CPU, 2

    def check_pairs(self, pairs: dict[str, torch.Tensor], lead: tuple[int, ...]) -> None:
        assert pairs.keys() == set(FIELDS)
        assert all(value.shape[:2] == lead for value in pairs.values())

    def fill(self, turns: int | None = None, before_group=None) -> None:
        """Nothing outlives its micro-batch."""

    def next_pairs(self) -> Pairs:
        self.calls += 1
        self.forwards += 3
        self.threads.append(threading.current_thread())
        assert not torch.is_grad_enabled()
        ids = torch.full((2,), self.calls)
        x = torch.full((2, 3), float(self.calls))
        return Pairs(x_s=x, s=ids, target=x + 0.5, t=ids, rows=ids, weight=torch.ones(2), sample_ids=ids)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"calls": torch.tensor(self.calls)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        assert state.keys() == {"calls"}
        self.calls = int(state["calls"])


class Moving:
    """A reference that only counts."""

    version = 0


def overlapped(rollout: Counting, reference: Moving, accumulation: int = 2) -> OverlappedProducer:
    return OverlappedProducer(rollout, rollout, accumulation, lambda: reference.version, device=CPU)


def test_pairs_of_an_update_are_made_by_the_reference_of_one_before():
    """Those of update n + 1 by the reference after n - 1 moves; without overlap, after n moves."""
    for make, lag in ((overlapped, 1), (lambda r, m: Producer(r, r, 2, lambda: m.version), 0)):
        rollout, reference = Counting(), Moving()
        producer = make(rollout, reference)
        for update in range(6):
            with torch.no_grad():
                taken = producer.take()
            assert taken.version == max(0, update - lag)
            assert taken.forwards == 6
            assert [int(pairs.sample_ids[0]) for pairs in taken.micro_batches] == [2 * update + 1, 2 * update + 2]
            producer.settle()
            reference.version += 1
        producer.close()


def test_they_are_made_in_another_thread():
    rollout, reference = Counting(), Moving()
    producer = overlapped(rollout, reference, accumulation=1)
    producer.take()
    producer.settle()
    assert [thread is threading.main_thread() for thread in rollout.threads] == [True, False]
    producer.close()


def test_two_sets_of_buffers_in_turn():
    """What the student reads stays while the next pairs are made; buffers are allocated once."""
    rollout, reference = Counting(), Moving()
    producer, seen = overlapped(rollout, reference), []
    for update in range(5):
        taken = producer.take()
        producer.settle()  # the pairs after these are in the other set by now
        for number, pairs in enumerate(taken.micro_batches):
            call = 2 * update + number + 1
            assert pairs.x_s.tolist() == [[call] * 3] * 2
            assert pairs.target.tolist() == [[call + 0.5] * 3] * 2
        seen.append([getattr(pairs, name).data_ptr() for pairs in taken.micro_batches for name in FIELDS])
    assert seen[0] == seen[2] == seen[4]
    assert seen[1] == seen[3]
    assert set(seen[0]).isdisjoint(seen[1])
    producer.close()


@pytest.mark.parametrize("device", [CPU, torch.device("cuda")], ids=str)
def test_an_error_stops_the_update_with_its_own_traceback(device, request):
    if device.type == "cuda":
        request.getfixturevalue("side_stream")
    rollout, reference = Counting(), Moving()
    make = rollout.next_pairs

    def a_broken_network():
        raise ZeroDivisionError("the reference broke")

    producer = OverlappedProducer(rollout, rollout, 1, lambda: reference.version, device=device)
    producer.take()
    producer.settle()
    rollout.next_pairs = lambda: a_broken_network() if rollout.calls >= 2 else make()
    producer.take()
    for ask in (producer.settle, producer.take, producer.state_dict):
        with pytest.raises(ZeroDivisionError, match="the reference broke") as caught:
            ask()
        assert "a_broken_network" in "".join(traceback.format_tb(caught.value.__traceback__))
    producer.close()


def test_pairs_in_flight_are_saved():
    rollout, reference = Counting(), Moving()
    producer = overlapped(rollout, reference)
    for _ in range(3):
        producer.take()
        producer.settle()
        reference.version += 1
    state = {name: value.clone() for name, value in producer.state_dict().items()}
    assert state["pending.x_s"].shape == (2, 2, 3)

    other = overlapped(Counting(), reference)
    other.load_state_dict(state)
    for _ in range(3):
        a, b = producer.take(), other.take()
        assert (a.version, a.forwards) == (b.version, b.forwards)
        for ours, theirs in zip(a.micro_batches, b.micro_batches, strict=True):
            for name in FIELDS:
                assert torch.equal(getattr(ours, name), getattr(theirs, name))
    for each in (producer, other):
        each.settle()
    assert other.rollout.calls == producer.rollout.calls
    producer.close()
    other.close()


class _SideStream:
    """torch.cuda.Stream and Event of a device that has not begun: nothing ever finishes by itself."""

    def __init__(self, *_) -> None:
        pass

    def wait_stream(self, _) -> None:
        pass

    wait_event = wait_stream

    def record(self) -> None:
        pass


@pytest.fixture
def side_stream(monkeypatch) -> None:
    """A GPU that never ends anything by itself."""
    monkeypatch.setattr(torch.cuda, "Stream", _SideStream)
    monkeypatch.setattr(torch.cuda, "Event", _SideStream)
    monkeypatch.setattr(torch.cuda, "current_stream", _SideStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())


def test_what_a_side_stream_reads_outlives_its_kernels(side_stream):
    """Resumed pairs are copied on a second stream: until that is done nobody else gets their memory."""
    first = overlapped(Counting(), Moving())
    first.take()
    state = {name: value.clone() for name, value in first.state_dict().items()}
    rollout = Counting()
    resumed = OverlappedProducer(rollout, rollout, 2, lambda: 0, device=torch.device("cuda"))
    freed = []
    weakref.finalize(state["pending.x_s"], freed.append, "x_s")
    resumed.load_state_dict(state)
    del state
    gc.collect()
    assert not freed
    resumed.settle()
    gc.collect()
    assert freed == ["x_s"]


def test_a_state_without_pairs_in_flight_is_one_too():
    rollout, reference = Counting(), Moving()
    producer = overlapped(rollout, reference)
    assert producer.state_dict().keys() == {"calls"}
    producer.load_state_dict({"calls": torch.tensor(7)})
    assert int(producer.take().micro_batches[0].sample_ids[0]) == 8
    producer.close()


# Whole runs


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("model"))


RECIPES = {
    "continuous": [],
    "lockstep": ["--rollout.mode", "lockstep", "--rollout.k", "3"],
    "guided": ["--rollout.omega", "-3", "--rollout.branches", "batched"],
    "data": ["--rollout.start", "data", "--data.source", "digits"],
    "accumulation": ["--engine.accumulation", "2"],
    "lora": ["--lora.rank", "2"],
    "checkpointing": ["--engine.gradient_checkpointing", "true"],
    "zero2": ["--engine.zero_stage", "2"],
}


SLOW = ("data", "accumulation", "checkpointing", "zero2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RECIPES])
def test_with_a_frozen_reference_overlap_changes_nothing(name, tmp_path):
    """Not a bit of the weights, nor of any metric but the times."""
    negatives = []
    for overlap in ("false", "true"):
        output = tmp_path / overlap
        words = ["--updates", "4", "--engine.batch_size", "8", "--prompts.limit", "20", "--reference.kind", "frozen"]
        words += ["--log.every", "1", "--log.sample_every", "-1", "--rollout.overlap", overlap, "--rollout.pool", "2"]
        words += ["--rollout.grid_steps", "5"]
        assert train.main(["--config", str(CONFIG), "--output", str(output), *words, *RECIPES[name]]) == 0
        (weights,) = (output / "negative").rglob("*.safetensors")
        rows = (output / "metrics.jsonl").read_text().replace("}", ",}").splitlines()
        kept = [[part for part in row.split(",") if "per_second" not in part and "memory" not in part] for row in rows]
        negatives.append((load_file(weights), kept))
    (plain, plain_rows), (ahead, ahead_rows) = negatives
    assert plain.keys() == ahead.keys()
    assert all(torch.equal(plain[key], ahead[key]) for key in plain)
    assert plain_rows == ahead_rows


@pytest.mark.parametrize("reference", ["ema", "frozen"])
def test_lora_learns_as_two_networks_with_peft_layers_do(reference, tmp_path, monkeypatch):
    """Against student and reference as two networks whose layers have PEFT's forward."""

    def two_networks(student, config, names):
        student.requires_grad_(False)
        peft = PeftConfig(r=2, lora_alpha=2, target_modules=config.lora.targets, init_lora_weights="gaussian")
        torch.manual_seed(config.seed)
        student.add_adapter(peft, adapter_name="default")
        return copy.deepcopy(student).requires_grad_(False), None

    rows = []
    for name in ("ours", "two"):
        words = ["--updates", "6", "--engine.batch_size", "8", "--prompts.limit", "20", "--lora.rank", "2"]
        words += ["--reference.kind", reference, "--reference.decay", "0.5", "--optimizer.lr", "1e-2"]
        words += ["--rollout.grid_steps", "5"]
        words += ["--log.every", "1", "--log.sample_every", "-1", "--output", str(tmp_path / name)]
        if name == "two":
            monkeypatch.setattr(trainer, "_split", two_networks)
        assert train.main(["--config", str(CONFIG), *words]) == 0
        rows.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    assert len(rows[0]) == 6
    assert abs(rows[0][-1]["loss"] - rows[0][0]["loss"]) > 1e-3, "it learns"
    for ours, theirs in zip(*rows, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
