"""The profile of an update: its parts add up, and nothing is read back from the device."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import profile_step
from benchmarks.profile_events import (
    PARTS,
    PREFIX,
    READ_BACKS,
    WHOLE,
    DeviceTimes,
    Event,
    host_events,
    read_backs,
    recorded,
    seconds_of,
)
from benchmarks.random_run import has_weights
from selfnpo_fast.config import TrainConfig
from selfnpo_fast.models import DIGITS

SHORT = ["--config", "configs/digits.yaml", "--engine.batch_size", "8", "--prompts.limit", "20"]
SHORT += ["--rollout.grid_steps", "5"]


def event(name: str, start: float, end: float, thread: int = 1) -> Event:
    return Event(name, start, end, thread)


def part(name: str, *times, **more) -> Event:
    return event(f"selfnpo_fast: {name}", *times, **more)


def test_parts_are_counted_without_what_lies_inside_them():
    """Two updates in microseconds: one with a fused op in the rollout, one with a second thread."""
    events = [
        part(WHOLE, 0, 100), part("waiting", 0, 40), part("reference", 5, 35), event("selfnpo::tdft_step", 30, 34),
        event("aten::mul", 10, 12), part("backward", 50, 70), event("selfnpo::x0_loss_backward", 50, 53),
        part(WHOLE, 100, 160), part("EMA", 150, 160), event("selfnpo::ema_update", 151, 159),
        part("reference", 60, 130, thread=2),
    ]  # fmt: skip
    found = seconds_of(events, 2)
    expected = {"waiting": 10, "reference": 26 + 70, "kernels": 4 + 3 + 8, "backward": 17, "EMA": 2}
    expected |= {"everything else": 40 + 50, WHOLE: 160, "student forward": 0, "optimiser": 0}
    assert found == pytest.approx({name: value / 2e6 for name, value in expected.items()})


def test_read_backs_are_those_within_updates():
    events = [
        part(WHOLE, 10, 50), event("aten::item", 20, 21), event("aten::_fused_adamw_", 30, 40),
        event("aten::item", 31, 32), event("aten::item", 33, 34, thread=2), event("cudaEventSynchronize", 45, 46),
        event("cudaDeviceSynchronize", 60, 70), event("aten::mul", 22, 23),
    ]  # fmt: skip
    assert read_backs(events) == {"aten::item": 2, "cudaEventSynchronize": 1}


MAIN, AUTOGRAD = 7, 8


def traced(category: str, name: str, start: float, length: float, thread: int = MAIN, correlation: int | None = None):
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "tid": thread, "args": args}


def gpu_trace() -> list[dict]:
    """One update of 100 us on the host, and what a GPU does for it on two streams.

    The reference is one launch of a graph of two kernels. Backward runs in autograd's thread, where
    a fused op launches by the driver's call.
    """
    host = [("update", 0, 100), ("waiting", 0, 20), ("reference", 2, 18), ("student forward", 20, 30)]
    host += [("backward", 50, 30), ("optimiser", 80, 10)]
    return [
        *(traced("user_annotation", f"selfnpo_fast: {name}", start, length) for name, start, length in host),
        traced("cpu_op", "selfnpo::x0_loss_backward", 52, 4, AUTOGRAD),
        traced("cuda_runtime", "cudaGraphLaunch", 4, 2, correlation=1),
        traced("cuda_runtime", "cudaLaunchKernel", 25, 1, correlation=2),
        traced("cuda_driver", "cuLaunchKernel", 53, 1, AUTOGRAD, correlation=3),
        traced("cuda_runtime", "cudaLaunchKernel", 60, 1, AUTOGRAD, correlation=4),
        traced("cuda_runtime", "cudaMemcpyAsync", 85, 1, correlation=5),
        traced("cuda_runtime", "cudaLaunchKernel", 200, 1, correlation=6),  # after the update
        traced("kernel", "conv", 30, 10, 20, 1), traced("kernel", "conv", 40, 5, 20, 1),
        traced("kernel", "conv", 35, 10, 21, 2),
        traced("kernel", "loss", 60, 2, 21, 3),
        traced("kernel", "gemm", 70, 8, 21, 4),
        traced("gpu_memcpy", "Memcpy DtoH", 90, 1, 21, 5),
        traced("kernel", "other", 300, 50, 21, 6),
        traced("kernel", "stray", 400, 3, 21, 99),
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 4, "tid": MAIN, "id": 1}, {"ph": "M", "name": "process_name"},
    ]  # fmt: skip


def test_kernels_count_for_the_part_that_launched_them():
    found = DeviceTimes(gpu_trace(), 1)
    expected = {"reference": 15, "student forward": 10, "kernels": 2, "backward": 8, "optimiser": 1}
    expected |= {"waiting": 0, "EMA": 0, "everything else": 0, WHOLE: 36}
    assert found.seconds == pytest.approx({name: value / 1e6 for name, value in expected.items()})
    assert found.busy == pytest.approx((15 + 2 + 8 + 1) / 1e6), "two streams at the same time count once"
    assert found.orphans == pytest.approx(3e-6)
    assert found.longest(2) == [
        {"name": "conv", "ms": pytest.approx(0.025), "launches": 3},
        {"name": "gemm", "ms": pytest.approx(0.008), "launches": 1},
    ]
    shown = profile_step.table(seconds_of(host_events(gpu_trace()), 1), found)
    assert re.search(r"student forward +0\.030 +30\.0% +0\.010\n", shown), shown
    assert re.search(r"device busy +0\.026 +26\.0%$", shown), shown


def test_a_folder_without_weights_runs_with_random_ones(tmp_path, capsys):
    folder = shutil.copytree(DIGITS, tmp_path / "model")
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    output = tmp_path / "profile.json"
    words = ["--updates", "1", "--warm_up", "0", "--output", str(output), "--", *SHORT, "--engine.batch_size", "1"]
    assert profile_step.main([*words, "--model.path", str(folder), "--rollout.grid_steps", "2"]) == 0
    content = json.loads(output.read_text())
    assert content["complete"] is True
    parts = content["seconds_per_update"]
    assert sum(value for name, value in parts.items() if name != WHOLE) == pytest.approx(parts[WHOLE], rel=1e-6)
    assert "has no weights: they are random" in capsys.readouterr().err
    assert has_weights(TrainConfig())


def test_a_large_trace_is_compressed(tmp_path, monkeypatch):
    class Result:
        def export_chrome_trace(self, path):
            Path(path).write_text(json.dumps({"traceEvents": gpu_trace()}))

    plain, events = profile_step.write_trace(Result(), tmp_path / "a.json")
    assert (plain.name, events) == ("a.trace.json", gpu_trace())
    monkeypatch.setattr(profile_step, "LARGE", 100)
    packed, events = profile_step.write_trace(Result(), tmp_path / "b.json")
    assert packed.name == "b.trace.json.gz"
    assert json.loads(gzip.decompress(packed.read_bytes()))["traceEvents"] == events
    assert not (tmp_path / "b.trace.json").exists()


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
    assert read_backs(recorded(profiled(recipe, tmp_path / "run", 100))) == {}


OTHERS = {"zero": ["--engine.zero_stage", "1"], "8 bit": ["--optimizer.name", "adamw8bit"]}


@pytest.mark.slow
@pytest.mark.parametrize("words", OTHERS.values(), ids=OTHERS)
def test_others_read_back_only_in_the_optimiser(words, tmp_path):
    """DeepSpeed asks whether gradients are finite; for bitsandbytes, which cannot, we do."""
    events = recorded(profiled([*words, "--rollout.overlap", "true"], tmp_path / "run", 3))
    assert sum(read_backs(events).values()) > 0
    spans = [event for event in events if event.name == f"{PREFIX}optimiser"]
    assert len(spans) == 3
    for event in events:
        if event.name in READ_BACKS:
            assert any(span.start <= event.start <= span.end for span in spans), event
