"""The sampler's benchmark: gate, files and memory; the arithmetic of time_to_gain."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_sampler
from benchmarks.arms.sampler import ARMS, RANK, STOCK, TWO, Bench, peak_bytes
from benchmarks.digits_report.time_to_gain import seconds_to
from benchmarks.nets import NETS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(NETS["digits"](), batch=2, steps=2, device=CPU, dtype=torch.float32)


def test_every_arm_draws_what_it_should(bench):
    largest, failures = bench_sampler.check(bench, ARMS, 1e-4)
    assert not failures
    assert 0 < largest < 1e-4


@pytest.mark.parametrize("wrong", ["attach_lora", "sampler_full"])
def test_the_gate_stops_a_wrong_branch(bench, wrong):
    """The gate compares the arm's latents with those of plain guidance, which differ."""
    arms = [replace(arm, truth="plain") if arm.name == wrong else arm for arm in ARMS]
    _, failures = bench_sampler.check(bench, arms, 1e-4)
    assert [failure.partition(":")[0] for failure in failures] == [wrong]


def test_memory_is_what_the_arm_holds(bench):
    weights = sum(p.nbytes for p in bench.network.parameters())
    peaks = {arm.name: bench_sampler.peak_of(bench, arm) for arm in ARMS}
    lora = sum(4 * RANK * sum(bench.network.get_submodule(path).weight.shape) for path in bench.deltas)
    assert weights < peaks[STOCK] < 1.5 * weights
    assert peaks["attach_lora"] - peaks[STOCK] == pytest.approx(lora, rel=0.5)
    assert peaks[TWO] > 2 * weights


def test_peaks_count_what_lives_at_once():
    def draw() -> torch.Tensor:
        first = torch.zeros(2**18)  # 1 MiB
        second = first + 1
        del first
        return second * 2

    network = torch.nn.Linear(256, 1024, bias=False)  # 1 MiB
    assert peak_bytes(draw, [network], 7, CPU) == pytest.approx(3 * 2**20 + 7, abs=4096)


@pytest.mark.slow
def test_a_run_writes_what_it_printed(tmp_path, capsys):
    output = tmp_path / "sampler.json"
    assert bench_sampler.main(["--quick", "--device", "cpu", "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    arms = {arm["name"]: arm for arm in content["nets"]["digits"]["arms"]}
    assert list(arms) == [arm.name for arm in ARMS]
    assert arms[STOCK]["ratio_to_stock"] == {"median": 1, "low": 1, "high": 1}
    assert all(0 < arms[name]["beyond"]["median"] < 1 for name in arms if name.startswith("sampler"))
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "GuidedSampler, LoRA" in capsys.readouterr().out


def test_nothing_is_timed_after_a_failed_gate(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_sampler, "check", lambda *_: (1.0, ["stock: wrong"]))
    output = tmp_path / "sampler.json"
    assert bench_sampler.main(["--quick", "--device", "cpu", "--output", str(output)]) == 1
    assert not output.exists()
    assert "stock: wrong" in capsys.readouterr().err


def test_a_prepared_arm_is_undone(bench):
    arm = next(arm for arm in ARMS if arm.name == "attach_lora")
    with ExitStack() as undo:
        arm.prepare(bench, undo)
        assert bench.network._forward_pre_hooks
    assert not bench.network._forward_pre_hooks


def test_seconds_to_a_gain_are_those_of_whole_updates():
    """The start-up takes a second in each of the first four updates."""
    gains = {"10": 0.01, "20": 0.03, "40": 0.02}
    assert seconds_to(0.005, gains, 2.0, 1.0) == pytest.approx(4 + 2 * 5)
    assert seconds_to(0.0025, gains, 2.0, 1.0) == pytest.approx(3 + 2 * 3), "within the third update"
    assert seconds_to(0.02, gains, 2.0, 0.0) == pytest.approx(2 * 15)
    assert seconds_to(0.03, gains, 2.0, 0.0) == pytest.approx(2 * 20)
    assert seconds_to(0.031, gains, 2.0, 0.0) is None
