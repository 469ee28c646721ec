"""Overlap on a GPU: what the two streams share is ordered by events, in whole updates."""

from __future__ import annotations

import pytest
import torch
from streams import Streams

from benchmarks.profile_step import make_trainer
from selfnpo_fast.rollout import OverlappedProducer

SHORT = ["--engine.batch_size", "2", "--prompts.limit", "8", "--log.sample_every", "-1", "--rollout.grid_steps", "2"]
SHORT += ["--optimizer.name", "adamw", "--rollout.pool", "2", "--rollout.branches", "batched", "--rollout.overlap"]
SHORT += ["true"]
RECIPES = {
    "plain": [],
    "frozen": ["--reference.kind", "frozen"],
    "lora": ["--lora.rank", "2", "--engine.gradient_checkpointing", "true"],
    "bf16": ["--engine.precision", "bf16"],
    "lockstep": ["--rollout.mode", "lockstep"],
    "accumulation": ["--engine.accumulation", "2"],
}
SLOW = ("lora", "frozen", "bf16", "lockstep", "accumulation")


def on_two_streams(trainer) -> None:
    """Give the trainer the producer that it would have on a GPU; its tensors stay where they are."""
    old = trainer.producer
    old.close()
    arguments = old.rollout, old.predictor, old.accumulation, old.version
    trainer.producer = trainer.method.producer = OverlappedProducer(*arguments, device=torch.device("cuda"))


def updates(words, folder, monkeypatch) -> Streams:
    """Updates, a checkpoint while pairs are in flight, and updates after it was loaded."""
    trainer, recorder, _ = make_trainer([*SHORT, *words], folder)
    checker = Streams(monkeypatch)
    on_two_streams(trainer)
    with checker:
        for _ in range(2):
            trainer.train_update(recorder)
        state = {name: value.clone() for name, value in trainer.method.state_dict().items()}
        trainer.train_update(recorder)
        on_two_streams(trainer)
        trainer.method.load_state_dict(state)
        trainer.train_update(recorder)
    return checker


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RECIPES])
def test_no_access_races(name, tmp_path, monkeypatch):
    checker = updates(RECIPES[name], tmp_path / "run", monkeypatch)
    assert not checker.races
    assert len(checker.accesses) == 3
    assert min(checker.accesses.values()) > 100


def test_the_checker_finds_what_is_not_ordered(monkeypatch):
    """A read or a write after a write, and a write after a read, on another stream."""
    checker = Streams(monkeypatch)
    side, done = torch.cuda.Stream(), torch.cuda.Event()
    main = torch.cuda.current_stream()
    with checker:
        x = torch.zeros(3)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            y = x + 1
            done.record()
            z = x + 2
        main.wait_event(done)
        y + x
        assert not checker.races
        z.sum()  # made after the event
        x[1:].add_(1)  # the side stream may still read it
        with torch.cuda.stream(side):
            x.add_(1)
    assert [race.partition(": ")[2] for race in checker.races] == [
        "main reads before side 1",
        "main writes before side 1",
        "side 1 writes before main",
        "side 1 writes before main",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["wait_stream", "wait_event"])
def test_a_wait_that_is_left_out_is_a_race(lost, tmp_path, monkeypatch):
    """Towards the rollout's stream: its buffers and the reference. Back: the pairs."""
    init = Streams.__init__

    def without(self, patch):
        init(self, patch)
        setattr(self.Stream, lost, lambda *_: None)

    monkeypatch.setattr(Streams, "__init__", without)
    races = updates([], tmp_path / "run", monkeypatch).races
    assert any(" reads before " in race for race in races)
    assert any(" writes before " in race for race in races)
