"""Where an update's time goes, and that its parts are accounted for."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from benchmarks import profile_step
from benchmarks.profile_step import PARTS, WHOLE

SHORT = ["--config", "configs/digits.yaml", "--engine.batch_size", "8", "--prompts.limit", "20"]


class Event:
    def __init__(self, name: str, start: float, end: float, thread: int = 1) -> None:
        self.name, self.thread = name, thread
        self.time_range = type("Range", (), {"start": start, "end": end})


class Events:
    def __init__(self, *events: Event) -> None:
        self._events = events

    def events(self):
        return self._events


def part(name: str, *times, **more) -> Event:
    return Event(f"selfnpo_fast: {name}", *times, **more)


def test_parts_are_counted_without_what_lies_inside_them():
    """Two updates, in microseconds; a fused op inside the rollout, and a rollout in another thread."""
    result = Events(
        part(WHOLE, 0, 100), part("waiting", 0, 40), part("reference", 5, 35), Event("selfnpo::tdft_step", 30, 34),
        Event("aten::mul", 10, 12), part("backward", 50, 70), Event("selfnpo::x0_loss_backward", 50, 53),
        part(WHOLE, 100, 160), part("EMA", 150, 160), Event("selfnpo::ema_update", 151, 159),
        part("reference", 60, 130, thread=2),
    )  # fmt: skip
    found = profile_step.seconds_of(result, 2)
    expected = {"waiting": 10, "reference": 26 + 70, "kernels": 4 + 3 + 8, "backward": 17, "EMA": 2}
    expected |= {"everything else": 40 + 50, WHOLE: 160, "student forward": 0, "optimiser": 0}
    assert found == pytest.approx({name: value / 2e6 for name, value in expected.items()})


@pytest.mark.parametrize("overlap", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_a_profile_of_the_digits_run(overlap, tmp_path, capsys):
    output = tmp_path / "profile.json"
    words = ["--updates", "3", "--warm_up", "1", "--output", str(output)]
    assert profile_step.main([*words, "--", *SHORT, "--rollout.overlap", overlap]) == 0
    content = json.loads(output.read_text())
    parts = content["seconds_per_update"]
    assert all(parts[name] > 0 for name in (*PARTS, WHOLE) if name != "waiting" or overlap == "true")
    if overlap == "false":
        inside = sum(value for name, value in parts.items() if name != WHOLE)
        assert inside == pytest.approx(parts[WHOLE], rel=1e-6)
    trace = json.loads(output.with_suffix(".trace.json").read_text())
    assert any(event.get("name") == "selfnpo_fast: reference" for event in trace["traceEvents"])
    assert "student forward" in capsys.readouterr().out


@pytest.mark.slow
def test_a_hundred_steps_of_the_rollout_read_nothing_back(tmp_path):
    """The reference's forward, the fused step, the student's loss and the moving average: no value goes to the host."""
    trainer, recorder, _ = profile_step.make_trainer([*SHORT, "--rollout.overlap", "true"], tmp_path / "run")
    trainer.train_update(recorder)
    with torch.profiler.profile(experimental_config=profile_step.EVERY_THREAD) as result:
        for _ in range(100):
            for pairs in trainer.producer.take().micro_batches:
                loss, per_pair = trainer.pair_loss(pairs)
                trainer.engine.backward(loss)
                trainer.producer.settle()
                trainer.reference.update()
    trainer.producer.close()
    counts = Counter(event.name for event in result.events())
    assert {counts[f"selfnpo::{op}"] for op in ("tdft_step", "x0_loss", "ema_update")} <= {100, 101}
    assert not any(counts[name] for name in profile_step.READ_BACKS)
    with torch.profiler.profile() as result:
        per_pair.sum().item()
    assert profile_step.read_backs(result), "it would be seen"
