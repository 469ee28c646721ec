"""The sampler's benchmark: gate, arms with and without graphs, memory, files."""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import weakref
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_sampler
from benchmarks.arms import sampler as sampler_arms
from benchmarks.arms.sampler import ARMS, RANK, STOCK, TWO, Bench, Drawing, Peak, calls_to_settle, most_allocated
from benchmarks.bench_sampler import Measurement
from benchmarks.digits_report.time_to_gain import seconds_to
from benchmarks.nets import CONFIGS, NETS, BenchNet
from benchmarks.sampler_gate import TOLERANCE, check, gate
from selfnpo_fast.models import load_adapter
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.runtime.capture import CudaGraphs
from tests.helpers import tiny

CPU = torch.device("cpu")
ARM = {arm.name: arm for arm in ARMS}
EAGER = [arm for arm in ARMS if not arm.graphs]
SETTINGS = {"batch": 1, "steps": 2, "rounds": 2, "precision": "fp32"}


def sdxl_net(folder) -> BenchNet:
    """A tiny SDXL with the scheduler of the real one."""
    tiny.write_sdxl(folder)
    shutil.copy(CONFIGS / "sdxl" / "scheduler" / "scheduler_config.json", folder / "scheduler")
    tiny.edit(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    return BenchNet(name="tiny", adapter=load_adapter(str(folder), configs_only=True))


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(NETS["digits"](), batch=2, steps=2, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> BenchNet:
    return sdxl_net(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def digits_is_small(monkeypatch, small):
    """`--net digits` runs a smaller network than digits."""
    monkeypatch.setitem(NETS, "digits", lambda: small)


def measure(net, arms, **changes) -> dict:
    """The entry of a measurement on a CPU, with its arms by name."""
    found = gate(net, arms, CPU)
    entry = Measurement(net, arms, found, save=lambda entry: None, **SETTINGS | changes).run()
    return entry | {"arms": {arm["name"]: arm for arm in entry["arms"]}}


def raising(arm):
    """The arm, which raises when it is prepared."""

    def prepare(bench, undo):
        raise RuntimeError("no kernel image\nis available")

    return replace(arm, prepare=prepare)


# The gate


@pytest.mark.parametrize("model", ["digits", "sdxl"])
def test_every_arm_draws_what_it_should(bench, small, model):
    """SDXL's stock pipeline makes the time ids itself, from the size that it is given."""
    if model == "sdxl":
        bench = Bench(small, batch=2, steps=3, device=CPU, dtype=torch.float32)
        assert bench.prompts["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    found = check(bench, EAGER)
    assert found.failures == {}
    assert found.errors.keys() == {arm.name for arm in EAGER}
    assert 0 < max(found.errors.values()) < 1e-4


@pytest.mark.parametrize("wrong", ["attach_lora", "sampler_full"])
def test_the_gate_stops_a_wrong_branch_and_no_other(bench, wrong):
    """The gate compares the arm's latents with those of plain guidance, which differ."""
    arms = [replace(ARM[name], truth="plain") if name == wrong else ARM[name] for name in (STOCK, wrong, TWO)]
    found = check(bench, arms)
    assert list(found.failures) == [wrong]
    assert "latents differ by" in found.failures[wrong]


def test_the_gate_names_an_arm_that_raises(bench):
    found = check(bench, [raising(ARM["attach_full"]), ARM["sampler_full"]])
    assert found.failures == {"attach_full": "no kernel image is available"}
    assert found.errors.keys() == {"sampler_full"}


def test_arms_without_their_truth_fail(bench, monkeypatch):
    broken = [raising(arm) if arm.name == TWO else arm for arm in ARMS]
    monkeypatch.setattr("benchmarks.sampler_gate.ARMS", broken)
    found = check(bench, [ARM["sampler"], ARM["sampler_lora"]])
    assert found.failures == {"sampler_lora": "two_networks, the right latents: no kernel image is available"}
    assert found.errors.keys() == {"sampler"}


def test_the_gate_wants_a_negative_that_shows():
    bench = Bench(NETS["digits"](), batch=1, steps=2, device=CPU, dtype=torch.float32)
    bench.deltas = {path: replace(delta, scale=1e-9) for path, delta in bench.deltas.items()}
    found = check(bench, [ARM[STOCK], ARM["sampler_lora"]])
    assert list(found.failures) == ["sampler_lora"]
    assert "does not show" in found.failures["sampler_lora"]


def test_the_gate_takes_nan_for_a_failure(bench):
    def prepare(bench, undo):
        return lambda: torch.full((2, *bench.net.latent_shape), torch.nan)

    assert list(check(bench, [replace(ARM["sampler"], prepare=prepare)]).failures) == ["sampler"]


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_the_widest_tolerance_sees_a_single_layer_without_its_update(bench, last):
    deltas = dict(bench.deltas)
    del deltas[list(deltas)[-1 if last else 0]]
    arm = replace(ARM["sampler_lora"], prepare=lambda bench, _: Drawing(bench, Negative("less", deltas=deltas), False))
    assert check(bench, [arm]).errors["sampler_lora"] > 10 * max(TOLERANCE.values())


@pytest.fixture
def tf32():
    """The switches of TF32, on."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = True
    yield switches
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


def test_the_gate_is_in_float32_without_tf32_and_leaves_nothing_behind(tf32):
    seen = []

    def prepare(bench, undo):
        networks = weakref.ref(bench.network), weakref.ref(bench.second())
        seen.append((*networks, bench.network.dtype, bench.batch, [switch.allow_tf32 for switch in tf32]))
        return ARM["attach_full"].prepare(bench, undo)

    assert not gate(NETS["digits"](), [replace(ARM["attach_full"], prepare=prepare)], CPU).failures
    ((network, second, dtype, batch, switches),) = seen
    assert network() is None, "it would count in the peaks"
    assert second() is None
    assert (dtype, batch, switches) == (torch.float32, 2, [False, False])
    assert [switch.allow_tf32 for switch in tf32] == [True, True]


def test_timings_are_in_bf16_after_a_gate_in_float32(small):
    entry = measure(small, [ARM[STOCK], ARM["sampler"]], precision="bf16")
    arms = entry["arms"]
    assert entry["gate"]["errors"]["sampler"] <= entry["gate"]["tolerance"] == 1e-4
    assert entry["gate"]["precision"] == "fp32"
    assert 1e-4 < arms["sampler"]["apart_from_truth"] < 0.1, "bf16 rounds to 8 bits"
    assert all(arm["seconds_per_image"]["low"] > 0 for arm in arms.values())


# Arms with graphs


class Graphs:
    """A stand-in for `CudaGraphs` on a CPU: notes at which step each of its objects captures."""

    captures: list[int]
    fail: str | None

    def __init__(self, device, graphs, what, dtype):
        self.on, self.steps = graphs, 0

    def __call__(self, step, state=()):
        calls = 0

        def replayed():
            nonlocal calls
            calls += 1
            if self.on and calls == CudaGraphs.WARM_UP + 1:
                Graphs.captures.append(calls)
                if Graphs.fail:
                    self.on = False
                    logging.getLogger("selfnpo").warning("CUDA graphs: off: %s", Graphs.fail)
            return step()

        return replayed


@pytest.fixture
def graphs(monkeypatch):
    Graphs.captures, Graphs.fail = [], None
    monkeypatch.setattr("selfnpo_fast.guidance.sampler.capture_of", Graphs)
    return Graphs


@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize("kind", ["none", "full"])
def test_nothing_is_captured_after_the_warm_up(small, graphs, kind, steps):
    """All captures are made in the warm-up's calls, and the last of these only replays."""
    name = {"none": "sampler_graphs", "full": "sampler_full_graphs"}[kind]
    few = Bench(small, batch=1, steps=steps, device=CPU, dtype=torch.float32)
    with ExitStack() as undo:
        draw = ARM[name].prepare(few, undo)
        calls = calls_to_settle(draw, steps)
        for _ in range(calls - 1):
            draw()
        assert len(graphs.captures) == 1
        for _ in range(3):
            draw()
        assert len(graphs.captures) == 1


def test_graph_arms_are_gated_timed_and_have_no_outside(small, graphs):
    arms = measure(small, [ARM[STOCK], ARM["sampler"], ARM["sampler_graphs"]])["arms"]
    assert [arm["graphs"] for arm in arms.values()] == [False, False, True]
    assert [arm["warm_up_calls"] for arm in arms.values()] == [2, 4, 6]  # of two steps each
    assert len(graphs.captures) == 2, "once in the gate, once in the warm-up"
    assert 0 < arms["sampler"]["beyond"]["median"] < 1
    assert "beyond" not in arms["sampler_graphs"]
    assert "error" not in arms["sampler_graphs"]
    assert len(arms["sampler_graphs"]["rounds_seconds_per_image"]) == 2


def test_an_arm_whose_capture_fails_is_not_timed_as_one_with_graphs(small, graphs):
    graphs.fail = "operation not permitted"
    arms = measure(small, [ARM[STOCK], ARM["sampler"], ARM["sampler_graphs"]])["arms"]
    error = arms["sampler_graphs"]["error"]
    assert error == "the correctness gate failed: CUDA graphs: off: operation not permitted"
    assert "seconds_per_image" not in arms["sampler_graphs"]
    assert "seconds_per_image" in arms["sampler"]


def test_both_kinds_of_sampler_are_there_for_every_negative():
    samplers = {name for name in ARM if name.startswith("sampler")}
    assert samplers == {f"sampler{kind}{graphs}" for kind in ("", "_lora", "_full") for graphs in ("", "_graphs")}
    assert all(ARM[name].graphs == name.endswith("_graphs") for name in ARM)


def test_the_share_beyond_is_measured_between_waits_for_the_device(bench, monkeypatch):
    waits = []
    monkeypatch.setattr(sampler_arms, "synchronize", waits.append)
    with ExitStack() as undo:
        drawing = ARM["sampler_full"].prepare(bench, undo)
        predict = drawing.sampler._branches.predict
        drawing()
        assert 0 < drawing.beyond() < 1
        forwards = 2 * bench.config.steps
        assert len(waits) == 2 * forwards + 2  # around each forward, and around the call
        monkeypatch.setattr(drawing.sampler, "latents", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            drawing.beyond()
        assert drawing.sampler._branches.predict == predict


# Memory


def test_memory_is_what_the_arm_holds(bench):
    weights, peaks = sum(p.nbytes for p in bench.network.parameters()), {}
    for name in (STOCK, "attach_lora", TWO):
        with ExitStack() as undo:
            peak = Peak(bench, ARM[name])
            peaks[name] = peak.read(ARM[name].prepare(bench, undo))["peak_bytes"]
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

    assert most_allocated(draw) == pytest.approx(2 * 2**20, abs=4096)


def test_a_gpu_s_peaks_leave_out_what_other_arms_hold(monkeypatch):
    """Others hold 500 bytes and have 800 reserved; the arm's call takes 70 and reserves 128."""
    counts = {"memory_allocated": 500, "memory_reserved": 800}
    counts |= {"max_memory_allocated": 570, "max_memory_reserved": 928}
    done = []
    for name, count in counts.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, count=count: count)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: done.append(name))
    network = torch.nn.Linear(2, 5, bias=False)  # 40 bytes
    bench = SimpleNamespace(network=network, second=lambda: network, device=torch.device("cuda", 1), deltas={})
    peak = Peak(bench, ARM[TWO])
    assert done == ["synchronize", "empty_cache", "reset_peak_memory_stats"]
    assert peak.read(lambda: pytest.fail("called")) == {"peak_bytes": 80 + 70, "reserved_bytes": 80 + 128}


# Results


def test_an_arm_that_fails_does_not_stop_the_others(digits_is_small, tmp_path, capsys):
    """One raises in the gate, one after it, one differs."""
    calls = []

    def prepare(bench, undo):
        calls.append(bench.batch)
        return ARM["sampler"].prepare(bench, undo) if len(calls) == 1 else 1 / 0

    arms = [
        ARM[STOCK],
        raising(ARM["attach_lora"]),
        replace(ARM["sampler"], prepare=prepare),
        replace(ARM["sampler_lora"], truth="plain"),
    ]
    output = tmp_path / "sampler.json"
    assert bench_sampler.main(["--quick", "--device", "cpu", "--output", str(output)], arms) == 1
    content = json.loads(output.read_text())
    assert content["complete"] is True
    records = {arm["name"]: arm for arm in content["nets"]["digits"]["arms"]}
    assert records["attach_lora"]["error"] == "the correctness gate failed: no kernel image is available"
    assert records["sampler"]["error"] == "warm-up: division by zero"
    assert "the correctness gate failed: latents differ by" in records["sampler_lora"]["error"]
    assert ["seconds_per_image" in arm for arm in records.values()] == [True, False, False, False]
    printed = capsys.readouterr()
    assert "attach_negative, LoRA: the correctness gate failed" in printed.out
    assert "sampler_lora: the correctness gate failed: latents differ" in printed.err


class Cut(BaseException):
    """The end of a process."""


def test_a_run_that_is_cut_off_leaves_what_it_has_measured(digits_is_small, tmp_path):
    """The process ends in the second of five rounds."""
    calls = []

    def prepare(bench, undo):
        draw = ARM[STOCK].prepare(bench, undo)

        def cut():
            calls.append(1)
            if len(calls) == 6:  # after the gate, two that warm up, one that counts memory, one round
                raise Cut
            return draw()

        return cut

    output = tmp_path / "new" / "sampler.json"
    argv = ["--net", "digits", "--batch", "1", "--steps", "2", "--rounds", "5", "--device", "cpu"]
    with pytest.raises(Cut):
        bench_sampler.main([*argv, "--output", str(output)], [ARM[STOCK], replace(ARM["sampler"], prepare=prepare)])
    content = json.loads(output.read_text())
    assert content["complete"] is False
    stock, other = content["nets"]["digits"]["arms"]
    assert stock["seconds_per_image"]["median"] > 0
    assert "warm_up_calls" in other


def test_ratios_are_taken_within_a_round():
    records = {name: {"rounds_seconds_per_image": s, "peak_bytes": p} for name, s, p in (
        (STOCK, [1.0, 2.0, 4.0], 10), ("sampler", [2.0, 1.0, 2.0], 15), ("late", [3.0], 10))}  # fmt: skip
    bench_sampler.summarise(records)
    assert records["sampler"]["ratio_to_stock"] == {"median": 0.5, "low": 0.5, "high": 2.0}
    assert records["sampler"]["seconds_per_image"] == {"median": 2.0, "low": 1.0, "high": 2.0}
    assert records["sampler"]["memory_to_stock"] == 1.5
    assert records["late"]["ratio_to_stock"]["median"] == 3.0, "it failed after its first round"


def test_arms_can_be_chosen(digits_is_small, tmp_path, capsys):
    """Without the stock pipeline there is no ratio; on a CPU graph arms are left out, which is said."""
    output = tmp_path / "sampler.json"
    argv = ["--quick", "--device", "cpu", "--arm", "sampler_graphs", "--arm", "sampler", "--output", str(output)]
    assert bench_sampler.main(argv) == 0
    (record,) = json.loads(output.read_text())["nets"]["digits"]["arms"]
    assert record["name"] == "sampler"
    assert record["ratio_to_stock"] is None
    assert record["seconds_per_image"]["median"] == statistics.median(record["rounds_seconds_per_image"])
    assert not output.with_suffix(".png").exists(), "the chart shows ratios"
    assert "left out, since a cpu has no CUDA graphs: sampler_graphs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"), [(["samplr"], "there is no samplr; expected one of stock, "), (["sampler_graphs"], "no arm")]
)
def test_arms_that_cannot_run_are_refused(names, message, capsys):
    with pytest.raises(SystemExit) as refused:
        bench_sampler.main(["--quick", "--device", "cpu", *(f"--arm={name}" for name in names)])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_a_smoke_run_replaces_no_result(digits_is_small, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_sampler, "RESULTS", tmp_path)
    assert bench_sampler.main(["--quick", "--device", "cpu", "--arm", "stock"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_several_batches_share_a_gate_and_no_memory(digits_is_small, tmp_path, capsys):
    networks = {}

    def prepare(bench, undo):
        assert [batch for batch, network in networks.items() if network() is not None] in ([], [bench.batch])
        networks[bench.batch] = weakref.ref(bench.network)
        return ARM["sampler"].prepare(bench, undo)

    output = tmp_path / "sampler.json"
    argv = ["--quick", "--device", "cpu", "--batch", "2", "--batch", "3", "--output", str(output)]
    assert bench_sampler.main(argv, [replace(ARM["sampler"], prepare=prepare)]) == 0
    nets = json.loads(output.read_text())["nets"]
    assert {name: net["batch"] for name, net in nets.items()} == {"digits, batch 2": 2, "digits, batch 3": 3}
    assert list(networks) == [1, 2, 3], "the gate first"
    assert capsys.readouterr().err.count("correctness gate") == 1


@pytest.mark.slow
def test_a_run_writes_what_it_printed(tmp_path, capsys):
    output = tmp_path / "sampler.json"
    assert bench_sampler.main(["--quick", "--device", "cpu", "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    arms = {arm["name"]: arm for arm in content["nets"]["digits"]["arms"]}
    assert list(arms) == [arm.name for arm in EAGER]
    assert arms[STOCK]["ratio_to_stock"] == {"median": 1, "low": 1, "high": 1}
    assert all(0 < arms[name]["beyond"]["median"] < 1 for name in arms if name.startswith("sampler"))
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "GuidedSampler, LoRA" in capsys.readouterr().out


def test_a_prepared_arm_is_undone(bench):
    with ExitStack() as undo:
        ARM["attach_lora"].prepare(bench, undo)
        assert bench.network._forward_pre_hooks
    assert not bench.network._forward_pre_hooks


@pytest.mark.gpu
@pytest.mark.parametrize("net", ["digits", "sd15_small"])
def test_all_arms_pass_the_gate_on_cuda(net, tmp_path):
    """In float32 and with graphs; then they are timed in bf16."""
    output = tmp_path / "sampler.json"
    assert bench_sampler.main(["--quick", "--net", net, "--device", "cuda", "--output", str(output)]) == 0
    entry = json.loads(output.read_text())["nets"][net]
    assert [arm["name"] for arm in entry["arms"]] == [arm.name for arm in ARMS]
    assert entry["precision"] == "bf16"
    assert all(arm["reserved_bytes"] >= arm["peak_bytes"] for arm in entry["arms"])


def test_seconds_to_a_gain_are_those_of_whole_updates():
    """The start-up takes a second in each of the first four updates."""
    gains = {"10": 0.01, "20": 0.03, "40": 0.02}
    assert seconds_to(0.005, gains, 2.0, 1.0) == pytest.approx(4 + 2 * 5)
    assert seconds_to(0.0025, gains, 2.0, 1.0) == pytest.approx(3 + 2 * 3), "within the third update"
    assert seconds_to(0.02, gains, 2.0, 0.0) == pytest.approx(2 * 15)
    assert seconds_to(0.03, gains, 2.0, 0.0) == pytest.approx(2 * 20)
    assert seconds_to(0.031, gains, 2.0, 0.0) is None
