"""bench_step: its gate, its arms, its timings and its file."""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import subprocess
import sys
import time
import weakref
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from recording import Recording
from tiny_transformers import write_cogvideox, write_sd3

from benchmarks import bench_step, environment, step_gate
from benchmarks.arms import step as arms_step
from benchmarks.arms.step import ARMS, FULL, K5, ReleasedRollout, UnbatchedPredictor, Workbench, expected_forwards
from benchmarks.nets import BenchNet, digits
from benchmarks.step_gate import check_arms, gate_of
from benchmarks.step_report import Timing, summarise
from selfnpo_fast.models import load_adapter
from selfnpo_fast.rollout import ContinuousRollout, GuidedPredictor, LockstepRollout, Pairs
from selfnpo_fast.runtime.capture import CudaGraphs, no_capture

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ARM = {arm.name: arm for arm in ARMS}


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(digits(), batch=step_gate.GATE_BATCH, device=CPU, dtype=torch.float32)


def test_gate_passes_and_counts_the_forwards(bench):
    gate = check_arms(bench)
    assert gate.failures == {}
    assert gate.largest_error < gate.tolerance == 2e-5  # 0 seen
    assert gate.forwards == {
        "released": 12,
        "released_live": 6,
        "full": 52,
        "full_live": 26,
        "lockstep": 4.5,  # two samples, one of which passes index 0 before 5 steps and is left out from there on
        "continuous": 1,
        "continuous_graphs": 1,
        "continuous_w5": 2,
        "floor_forward": 1,
        "floor": 0,
    }


@pytest.mark.parametrize("family", ["cogvideox", "sd3"])
def test_gate_passes_on_transformers(tmp_path, family):
    """Rotary positions, v_prediction from zero SNR and latents (F, C, H, W); a flow that is given
    sigma as time."""
    write = {"cogvideox": lambda: write_cogvideox(tmp_path, rotary=True), "sd3": lambda: write_sd3(tmp_path)}[family]
    net = BenchNet(name=family, adapter=load_adapter(str(write())), trained=True)
    gate = check_arms(Workbench(net, batch=step_gate.GATE_BATCH, device=CPU, dtype=torch.float32))
    assert gate.failures == {}
    assert gate.largest_error < 2e-5
    expected = {"released": 12, "full": 52, "full_live": 26, "continuous": 1, "continuous_w5": 2}
    assert gate.forwards == gate.forwards | expected


class Conditional(GuidedPredictor):
    """Uses the wrong branch."""

    def __call__(self, x, t, rows):
        self.forwards += len(x)
        return None, self.predict(x, t, self.table.gather(rows))


class Miscounting(UnbatchedPredictor):
    def __call__(self, x, t, rows):
        out = super().__call__(x, t, rows)
        self.forwards -= 1
        return out


class Skipping(UnbatchedPredictor):
    """Counts the forward of the unused branch without making it."""

    def __call__(self, x, t, rows):
        self.forwards += 2 * len(x)
        neg = self.predict(x, t, self.table.empty(len(x)))
        return neg, neg


class Disturbing(LockstepRollout):
    """Changes samples that have arrived at t = 0."""

    def next_pairs(self):
        pairs = super().next_pairs()
        ended = (pairs.t == 0).view(-1, 1, 1, 1)
        return replace(pairs, target=torch.where(ended, 1.01 * pairs.target, pairs.target))


class OtherSamples(ReleasedRollout):
    def next_pairs(self):
        self.next_id += 1
        return super().next_pairs()


class OffTrajectory(ContinuousRollout):
    """Its states drift a little at every step."""

    def next_pairs(self):
        pairs = super().next_pairs()
        self.x *= 1.001
        return pairs


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("released_live", {"predictor": Conditional}, "target differs"),
        ("released", {"predictor": Miscounting}, "24 forwards, 18 counted, 24 expected"),
        ("released", {"predictor": Skipping}, "12 forwards, 24 counted, 24 expected"),
        ("lockstep", {"rollout": Disturbing}, "target differs"),
        ("released", {"rollout": OtherSamples}, "other sample_ids"),
        ("continuous", {"rollout": OffTrajectory}, "x_s differs"),
        ("full_live", {"rollout": LockstepRollout, "predictor": Conditional}, "x_s differs"),
    ],
    ids=str,
)
def test_gate_stops_a_wrong_arm(bench, name, changes, message):
    gate = check_arms(bench, [replace(ARM[name], **changes)])
    assert any(message in line for line in gate.failures[name]), gate.failures


def test_gate_takes_nan_for_a_failure():
    gate = step_gate.Gate()
    gate.compare("arm", "target", torch.tensor([float("nan")]), torch.ones(1))
    assert gate.failures


def test_gate_sees_samples_that_arrive_early_and_some_that_do_not(bench):
    """Only such a batch shows whether the wait at t = 0 is right."""
    rollout = bench.rollout(ARM["released"])
    rollout.next_id = step_gate.mixed_batch(rollout, 5)
    draws = rollout.draws(torch.arange(rollout.next_id, rollout.next_id + 2))
    assert draws.start_index.min() + 1 < 5 <= draws.start_index.max() + 1


def test_pairs_at_the_end_of_a_trajectory_have_its_last_state_for_a_target(bench):
    """The gate may see no pair at t = 0, so this test compares calls until one has such a pair."""
    rollout = bench.rollout(ARM["continuous"])
    ended = False
    while not ended:
        pairs = rollout.next_pairs()
        x_s, target = step_gate.on_trajectory(rollout.maker, pairs)
        torch.testing.assert_close(pairs.x_s, x_s, rtol=1e-5, atol=1e-5)  # 0 seen
        torch.testing.assert_close(pairs.target, target, rtol=1e-5, atol=1e-5)  # 0 seen
        ended = bool((pairs.t == 0).any())


def test_as_released_pays_all_steps_where_ours_stops(bench):
    """In a batch whose samples all start below index 4 the authors' loop makes useless steps."""
    start = bench.rollout(ARM["lockstep"]).draws(torch.arange(512)).start_index
    first = int((start.unfold(0, 2, 1).amax(1) < 4).nonzero()[0])
    for name in ("released_live", "lockstep"):
        rollout = bench.rollout(ARM[name])
        rollout.next_id = first
        steps = 10 if name == "released_live" else int(start[first : first + 2].sum()) + 2
        before = bench.forwards
        expected = expected_forwards(ARM[name], rollout)
        rollout.next_pairs()
        assert bench.forwards - before == expected == steps + 2


def test_step_gives_the_student_the_gradient_of_the_loss(bench):
    """Against the L2 loss of Eq. 17 written out; the reference gets no gradient."""
    pairs = bench.rollout(ARM["continuous"]).next_pairs()
    bench.student.zero_grad()
    bench.step(pairs)
    ours = bench.student.conv_in.weight.grad.clone()
    bench.student.zero_grad()
    a = bench.net.schedule.alphas_cumprod[pairs.s].float().view(-1, 1, 1, 1)
    pred = bench.student(pairs.x_s, pairs.s, bench.cond.rows["encoder_hidden_states"][pairs.rows]).sample
    (((pairs.x_s - (1 - a).sqrt() * pred) / a.sqrt() - pairs.target) ** 2).mean().backward()
    torch.testing.assert_close(ours, bench.student.conv_in.weight.grad, rtol=1e-4, atol=3e-6)  # 7e-7 of up to 0.7 seen
    assert ours.abs().max() > 0
    assert all(p.grad is None for p in bench.reference.parameters())


def test_run_writes_what_it_printed(tmp_path, capsys):
    """Ratios are recomputed from single rounds; a chart lies next to the JSON."""
    output = tmp_path / "new" / "step.json"
    few = [ARM["released"], ARM["continuous"], ARM["floor_forward"], ARM["floor"]]
    argv = ["--net", "digits", "--batch", "3", "--rounds", "2", "--device", "cpu", "--output", str(output)]
    assert bench_step.main(argv, few) == 0
    result = json.loads(output.read_text())
    assert {"device", "torch", "threads", "date", "git_commit"} <= result["environment"].keys()
    assert result["arguments"]["rounds"] == 2
    net = result["nets"]["digits"]
    assert (net["parameters"], net["batch"], net["rounds"], net["precision"]) == (1_077_572, 3, 2, "fp32")
    arms = {arm["name"]: arm for arm in net["arms"]}
    assert [(arm["start"], arm["k"], arm["w"], arm["forwards_per_pair"]) for arm in net["arms"]] == [
        ("data", 5, -1, 12),
        ("noise", None, -1, 1),
        (None, None, None, 1),
        (None, None, None, 0),
    ]
    assert all(net["seconds_per_update"][name]["low"] > 0 for name in ("optimiser", "ema"))
    for arm in arms.values():
        rounds = arm["rounds_seconds_per_pair"]
        assert len(rounds) == 2
        assert arm["seconds_per_pair"]["median"] == pytest.approx(statistics.median(rounds))
        for other in ("continuous", "floor_forward", "floor"):
            ratios = [a / b for a, b in zip(rounds, arms[other]["rounds_seconds_per_pair"], strict=True)]
            spread = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
            assert arm[f"ratio_to_{other}"] == pytest.approx(spread)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for arm in arms.values():
        line = next(line for line in printed.splitlines() if line.startswith(arm["label"]))
        assert f"{arm['seconds_per_pair']['median']:.3g} [" in line
        assert f"{arm['ratio_to_continuous']['median']:.2f} [" in line


def test_a_busy_machine_is_timed_by_the_process_s_own_time(tmp_path, monkeypatch, capsys):
    """`--clock cpu` on one thread: all is timed by that clock, here one that counts its calls."""
    assert bench_step.CLOCKS["cpu"] is time.process_time
    monkeypatch.setitem(bench_step.CLOCKS, "cpu", functools.partial(next, itertools.count()))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    argv = ["--quick", "--device", "cpu", "--clock", "cpu", "--output", str(tmp_path / "step.json")]
    assert bench_step.main(argv, [ARM["continuous"], ARM["floor"]]) == 0
    net = json.loads((tmp_path / "step.json").read_text())["nets"]["digits"]
    assert net["clock"] == "cpu"
    assert [arm["rounds_seconds_per_pair"] for arm in net["arms"]] == [[0.5, 0.5]] * 2, "a minibatch has two pairs"
    assert net["seconds_per_update"]["ema"] == {"median": 1, "low": 1, "high": 1}
    assert ", in CPU time" in capsys.readouterr().out
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(SystemExit, match="--clock cpu counts the work of one thread"):
        bench_step.main(argv)


class Raising(GuidedPredictor):
    """Has memory for one minibatch at K = 5."""

    def __call__(self, x, t, rows):
        if self.forwards >= 6 * len(x):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return super().__call__(x, t, rows)


def test_an_arm_that_fails_is_named_and_the_others_are_timed(tmp_path, capsys):
    """In the gate, in the first round that counts, and where an arm that others are compared to
    fails."""
    output = tmp_path / "step.json"
    arms = [
        replace(ARM["released_live"], name="wrong", label="wrong", predictor=Conditional),
        replace(ARM["released_live"], name="full memory", label="full memory", predictor=Raising),
        replace(ARM["continuous"], predictor=Conditional),
        ARM["lockstep"],
        ARM["floor"],
    ]
    assert bench_step.main(["--quick", "--device", "cpu", "--output", str(output)], arms) == 1
    result = json.loads(output.read_text())
    wrong, full, continuous, lockstep, floor = result["nets"]["digits"]["arms"]
    assert wrong["error"].startswith("correctness gate: x_s differs by")
    assert full["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert "error" in continuous
    assert not any("seconds_per_pair" in arm for arm in (wrong, full, continuous))
    assert len(lockstep["rounds_seconds_per_pair"]) == len(floor["rounds_seconds_per_pair"]) == 2
    assert [key for key in lockstep if key.startswith("ratio")] == ["ratio_to_floor"]
    assert result["nets"]["digits"]["seconds_per_update"]["ema"]["low"] > 0
    assert result["complete"] is True
    said, printed = capsys.readouterr()[::-1]
    assert "digits: wrong: correctness gate: x_s differs" in said
    assert "full memory: OutOfMemoryError: CUDA out of memory. Tried" in said
    assert "our lockstep mode" in printed
    assert "full memory" not in printed


def test_a_network_that_fails_leaves_the_next_one(tmp_path, monkeypatch):
    def broken():
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(bench_step.NETS, "sd15_small", broken)
    monkeypatch.setattr(bench_step, "chosen", lambda net, quick: ("sd15_small", "digits"))
    output = tmp_path / "step.json"
    argv = ["--quick", "--arm", "floor", "--device", "cpu", "--output", str(output)]
    assert bench_step.main(argv) == 1
    nets = json.loads(output.read_text())["nets"]
    assert nets["sd15_small"] == {"error": "OutOfMemoryError: no room"}
    assert [arm["name"] for arm in nets["digits"]["arms"]] == ["floor"]


def test_timing_stops_an_arm_at_a_wrong_number_of_forwards(bench):
    timings = [Timing(replace(ARM["released"], predictor=Skipping)), Timing(ARM["continuous"])]
    bench_step.measure(bench, 1, timings)
    assert timings[0].error == "RuntimeError: 12 forwards, 24 expected"
    assert (timings[1].error, timings[1].forwards) == (None, [bench.batch])


def test_results_are_written_after_every_round(tmp_path, monkeypatch):
    """A process that is killed leaves the rounds before, and the file says that it is not complete."""
    files = []

    def write(output, result):
        environment.write_json(output, result)
        files.append(json.loads(output.read_text()))
        done = [len(arm.get("rounds_seconds_per_pair", ())) for arm in files[-1]["nets"]["digits"]["arms"]]
        if done == [1, 1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(bench_step, "write_json", write)
    output = tmp_path / "step.json"
    argv = ["--quick", "--arm", "floor", "--arm", "continuous", "--device", "cpu", "--output", str(output)]
    with pytest.raises(KeyboardInterrupt):
        bench_step.main(argv)
    assert len(files) == 3  # after the gate, after the round that does not count, after the first
    result = json.loads(output.read_text())
    assert result["complete"] is False
    arms = result["nets"]["digits"]["arms"]
    assert [arm["name"] for arm in arms] == ["continuous", "floor"]
    assert all(arm["seconds_per_pair"]["median"] > 0 for arm in arms)
    assert "seconds_per_pair" not in files[1]["nets"]["digits"]["arms"][0]
    assert files[0]["nets"]["digits"]["gate"]["forwards"] == {"continuous": 1, "floor": 0}


def switches() -> tuple:
    cudnn = torch.backends.cudnn
    exact = (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, cudnn.enabled)
    return (*exact, torch.backends.cuda.matmul.allow_tf32)


@pytest.fixture
def fast_switches(monkeypatch):
    """What a training run in float32 sets on a GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    yield (True, True, False, True, True)
    matmul.allow_tf32 = before


@pytest.mark.parametrize("fails", [False, True])
def test_the_gate_computes_in_float32_that_repeats(fast_switches, fails):
    """Without TF32 and by deterministic algorithms; torch's switches are put back."""
    seen = set()

    class Looking(GuidedPredictor):
        def __call__(self, x, t, rows):
            seen.add(switches())
            if fails:
                raise RuntimeError("no")
            return super().__call__(x, t, rows)

    assert switches() == fast_switches
    gate = gate_of(digits(), CPU, [replace(ARM["released_live"], predictor=Looking)])
    assert seen == {(False, False, True, True, False)}
    assert switches() == fast_switches
    assert gate.failures == ({"released_live": ["RuntimeError: no"]} if fails else {})


# Transforms of Winograd's convolution F(4x4, 3x3) (Lavin and Gray 2016): input, filter, output.
INPUT = torch.tensor(
    [
        *([4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]),
        *([0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]),
    ]
).float()
FILTER = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
OUTPUT = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]).float()
DIRECT = torch.nn.functional.conv2d


def winograd(x, weight, bias=None, stride=1, padding=0, *rest):
    if weight.shape[2:] != (3, 3) or stride != (1, 1) or x.shape[-1] % 4:
        return DIRECT(x, weight, bias, stride, padding, *rest)
    tiles = torch.nn.functional.pad(x, (1, 1, 1, 1)).unfold(2, 6, 4).unfold(3, 6, 4)  # (B, C, H/4, W/4, 6, 6)
    products = torch.einsum("bcyxij,ocij->boyxij", INPUT @ tiles @ INPUT.T, FILTER @ weight @ FILTER.T)
    out = (OUTPUT @ products @ OUTPUT.T).transpose(3, 4).reshape(len(x), -1, *x.shape[2:])
    return out if bias is None else out + bias.view(-1, 1, 1)


def tf32(x, weight, *rest):
    """Both factors rounded to the 10 bits of TF32's mantissa."""

    def rounded(value):
        return ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    return DIRECT(rounded(x), rounded(weight), *rest)


@pytest.mark.parametrize(("conv", "passes"), [(winograd, True), (tf32, False)])
def test_the_tolerance_on_cuda_lies_between_other_algorithms_and_tf32(bench, monkeypatch, conv, passes):
    """An arm whose convolutions all take cuDNN's least accurate algorithm is right, and one with
    TF32 is not."""

    class Other(GuidedPredictor):
        def __call__(self, x, t, rows):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.nn.functional, "conv2d", conv)
                return super().__call__(x, t, rows)

    x, weight = torch.randn(2, 8, 8, 8), torch.randn(4, 8, 3, 3)
    expected = DIRECT(x, weight, None, (1, 1), (1, 1))
    torch.testing.assert_close(conv(x, weight, None, (1, 1), (1, 1)), expected, rtol=0, atol=0.05)
    monkeypatch.setitem(step_gate.TOLERANCES, "cpu", step_gate.TOLERANCES["cuda"])
    gate = check_arms(bench, [replace(ARM["full_live"], predictor=Other)])
    assert (gate.failures == {}) is passes
    assert not passes or 0 < gate.largest_error < gate.tolerance / 10  # 4e-6 seen; TF32: 2e-3


def test_the_gate_of_a_large_network_walks_a_short_grid():
    """All arms but the same comparisons: 5 steps for 25, and 2 for K = 5."""
    gate = gate_of(replace(digits(), name="sd15"), CPU, ARMS)
    assert gate.failures == {}
    expected = {"released": 6, "released_live": 3, "full": 12, "full_live": 6, "lockstep": 2.5}
    expected |= {"continuous": 1, "continuous_graphs": 1, "continuous_w5": 2, "floor_forward": 1, "floor": 0}
    assert gate.forwards == expected


def test_the_gate_s_networks_are_gone_before_those_of_the_timing_are_made(tmp_path, monkeypatch):
    """The float32 ones of SDXL take 10 GB."""
    made, network = [], BenchNet.network

    def watched(self, dtype, device):
        alive = [dtype for dtype, reference in made if reference() is not None]
        assert dtype == torch.float32 or torch.float32 not in alive
        module = network(self, dtype, device)
        made.append((dtype, weakref.ref(module)))
        return module

    monkeypatch.setattr(BenchNet, "network", watched)
    argv = ["--quick", "--precision", "bf16", "--arm", "continuous", "--arm", "floor", "--device", "cpu"]
    assert bench_step.main([*argv, "--output", str(tmp_path / "step.json")]) == 0
    assert [dtype for dtype, _ in made] == [torch.float32, torch.bfloat16, torch.bfloat16]
    net = json.loads((tmp_path / "step.json").read_text())["nets"]["digits"]
    assert net["gate"]["largest_error"] < 2e-5, "the gate knows no bf16"
    assert all(arm["losses_finite"] for arm in net["arms"])


class Graphs:
    """A capture whose replays run no Python, as those of CUDA graphs: the count of rows stands."""

    def __init__(self, bench: Workbench, reason: str | None = None, drift: float = 1.0) -> None:
        self.bench, self.reason, self.drift, self.replays = bench, reason, drift, 0

    def __call__(self, step, state=()):
        calls = 0

        def replayed():
            nonlocal calls
            calls += 1
            if calls <= CudaGraphs.WARM_UP:
                return step()
            before, outputs = self.bench.forwards, step()
            self.bench.forwards, self.replays = before, self.replays + 1
            state[0].mul_(self.drift)
            return outputs

        return replayed


def captured_by(monkeypatch, capture) -> None:
    """Arms with graphs get `capture`, the others none."""
    monkeypatch.setattr(arms_step, "capture_of", lambda device, graphs, *_: capture if graphs else no_capture)


def test_a_graph_makes_the_pairs_of_the_plain_arm_by_as_many_forwards(bench, monkeypatch):
    """The stand-in of tests/helpers, which keeps the rules of CUDA graphs, counts in its replays."""
    capture = Recording()
    captured_by(monkeypatch, capture)
    graph, plain = bench.prepared(ARM["continuous_graphs"]), bench.prepared(ARM["continuous"])
    for _ in range(CudaGraphs.WARM_UP + 1):
        plain.next_pairs()
    assert capture.replays == 1, "captured and replayed once before anything is timed"
    for _ in range(3):
        before = bench.forwards
        expected, between = plain.next_pairs(), bench.forwards
        found = graph.next_pairs()
        assert bench.forwards - between == between - before == bench.batch
        assert all(torch.equal(getattr(expected, f.name), getattr(found, f.name)) for f in fields(Pairs))
    assert capture.replays == 4


def test_the_forwards_of_replays_are_those_of_the_closed_form_and_the_record_says_so(bench, monkeypatch):
    graphs = Graphs(bench)
    captured_by(monkeypatch, graphs)
    arms = [ARM["continuous_graphs"], ARM["continuous"], ARM["floor"]]
    gate = check_arms(bench, arms)
    assert (gate.failures, gate.forwards["continuous_graphs"]) == ({}, 1)
    assert graphs.replays == 3  # one that is the capture's own, one before the pairs that are compared
    timings = [Timing(arm) for arm in arms]
    bench_step.measure(bench, 2, timings)
    assert graphs.replays == 3 + 1 + 3
    records = summarise(timings, bench.batch)
    assert [record["forwards_per_pair"] for record in records] == [1, 1, 0]
    assert [record["forwards_counted"] for record in records] == [False, True, True]


def test_the_gate_compares_a_replay(bench, monkeypatch):
    """States that drift in replays alone."""
    captured_by(monkeypatch, Graphs(bench, drift=1.001))
    gate = check_arms(bench, [ARM["continuous_graphs"], ARM["continuous"]])
    assert list(gate.failures) == ["continuous_graphs"]
    assert "x_s differs" in gate.failures["continuous_graphs"][0]


def test_a_graph_arm_that_runs_without_graphs_is_no_graph_arm(bench, monkeypatch):
    captured_by(monkeypatch, Graphs(bench, reason="operation not permitted"))
    timings = [Timing(ARM["continuous_graphs"]), Timing(ARM["continuous"])]
    bench_step.measure(bench, 1, timings)
    assert timings[0].error == "RuntimeError: its step runs without a CUDA graph: operation not permitted"
    assert (timings[1].error, len(timings[1].seconds)) == (None, 1)


def test_graph_arms_are_left_out_on_a_cpu(tmp_path, capsys):
    output = tmp_path / "step.json"
    argv = ["--quick", "--arm", "continuous_graphs", "--arm", "floor", "--device", "cpu", "--output", str(output)]
    assert bench_step.main(argv) == 0
    net = json.loads(output.read_text())["nets"]["digits"]
    assert net["left_out"] == {"continuous_graphs": "CUDA graphs need a GPU"}
    assert [arm["name"] for arm in net["arms"]] == ["floor"]
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "CUDA graphs" in line] == ["continuous_graphs: left out, CUDA graphs need a GPU"]


def test_every_timing_starts_and_ends_with_an_idle_device(bench, monkeypatch):
    events = []
    monkeypatch.setattr(bench_step, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(bench, "step", lambda pairs: events.append("step") or torch.zeros(()))
    timings = [Timing(ARM["lockstep"]), Timing(ARM["continuous"]), Timing(ARM["floor"])]
    bench_step.measure(bench, 2, timings)
    assert events == ["wait", "step", "wait"] * 9


def test_the_optimiser_is_timed_on_float32_masters(monkeypatch):
    """As training has them, whatever the precision; the student stays as it is."""
    bench = Workbench(digits(), batch=1, device=CPU, dtype=torch.bfloat16)
    before, moved, make = [p.clone() for p in bench.student.parameters()], [], arms_step.make_optimizer
    monkeypatch.setattr(arms_step, "make_optimizer", lambda config: lambda p: moved.extend(p) or make(config)(p))
    assert all(len(values) == 2 for values in bench.update_seconds(2).values())
    assert sum(p.numel() for p in moved) == 1_077_572
    assert {p.dtype for p in moved} == {p.grad.dtype for p in moved} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(before, bench.student.parameters(), strict=True))
    assert not torch.equal(moved[0], before[0].float())


def test_memory_is_the_device_s_since_the_gate(monkeypatch):
    """In GiB; what was freed goes back to the GPU, and the peaks begin anew."""
    device, calls = torch.device("cuda", 1), []
    for name, value in {
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 2**31,
        "max_memory_reserved": 3 * 2**30,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *a, n=name, v=value: calls.append((n, *a)) or v)
    environment.release(device)
    assert calls == [("empty_cache",), ("reset_peak_memory_stats", device)]
    assert environment.memory_gib(device) == {"allocated": 2, "reserved": 3}
    assert calls[2:] == [("max_memory_allocated", device), ("max_memory_reserved", device)]
    assert environment.memory_gib(CPU) is None


def test_a_machine_without_matplotlib_gets_its_figures_without_a_chart(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    output = tmp_path / "step.json"
    assert bench_step.main(["--quick", "--arm", "floor", "--device", "cpu", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["complete"] is True
    assert not output.with_suffix(".png").exists()
    assert "no chart: " in capsys.readouterr().err


def test_arms_are_those_of_the_issue():
    """The settings of each row of the table."""
    assert (K5.start, K5.max_steps, K5.omega, K5.grid_steps) == ("data", 5, -1, 25)
    assert (FULL.start, FULL.stop, FULL.max_steps, FULL.omega) == ("noise", "fixed", 25, -1)
    assert [(arm.config and arm.config.omega, arm.config and arm.config.mode) for arm in ARMS[4:]] == [
        (-1, "lockstep"),
        (-1, "continuous"),
        (-1, "continuous"),
        (-5, "continuous"),
        (None, None),
        (None, None),
    ]


@pytest.mark.gpu
def test_bench_step_runs_on_cuda(tmp_path):
    """Through the script; the gate compares the float32 arms on the GPU."""
    output = tmp_path / "step.json"
    command = [sys.executable, "benchmarks/bench_step.py", "--quick", "--net", "all", "--device", "cuda"]
    done = subprocess.run([*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    nets = json.loads(output.read_text())["nets"]
    assert {net["precision"] for net in nets.values()} == {"bf16"}
    assert all(net["memory_gib"]["reserved"] > 0 and not net["left_out"] for net in nets.values())
    assert [len(net["arms"]) for net in nets.values()] == [len(ARMS)] * 2
