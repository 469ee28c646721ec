"""The profile of an update: its parts add up, and nothing is read back from the device."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import profile_step
from benchmarks.profile_step import PARTS, WHOLE

SHORT = ["--config", "configs/digits.yaml", "--engine.batch_size", "8", "--prompts.limit", "20"]
SHORT += ["--rollout.grid_steps", "5"]


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
    """Two updates in microseconds: one with a fused op in the rollout, one with a second thread."""
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


@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["false", "true"])
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


def profiled(words: list[str], path: Path, updates: int) -> torch.profiler.profile:
    """The profile of whole updates, in which every fused op has run once per update."""
    trainer, recorder, world = profile_step.make_trainer([*SHORT, *words], path)
    result = profile_step.profiled(trainer, recorder, world, updates, warm_up=1)
    trainer.producer.close()
    counts = Counter(event.name() for event in result.profiler.kineto_results.events())
    assert {counts[f"selfnpo::{op}"] for op in ("tdft_step", "x0_loss", "ema_update")} <= {updates, updates + 1}
    return result


RECIPES = {
    "full weights": ["--rollout.overlap", "true"],
    "lora": ["--rollout.overlap", "true", "--lora.rank", "2"],
    "guided": ["--rollout.omega", "-5"],
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_hundred_updates_read_nothing_back(recipe, tmp_path):
    assert profile_step.read_backs(profiled(recipe, tmp_path / "run", 100)) == {}


OTHERS = {"zero": ["--engine.zero_stage", "1"], "8 bit": ["--optimizer.name", "adamw8bit"]}


@pytest.mark.slow
@pytest.mark.parametrize("words", OTHERS.values(), ids=OTHERS)
def test_others_read_back_only_in_the_optimiser(words, tmp_path):
    """DeepSpeed asks whether gradients are finite; for bitsandbytes, which cannot, we do."""
    result = profiled([*words, "--rollout.overlap", "true"], tmp_path / "run", 3)
    assert sum(profile_step.read_backs(result).values()) > 0
    spans = [event.time_range for event in result.events() if event.name == f"{profile_step.PREFIX}optimiser"]
    assert len(spans) == 3
    for event in result.events():
        if event.name in profile_step.READ_BACKS:
            assert any(span.start <= event.time_range.start <= span.end for span in spans), event
