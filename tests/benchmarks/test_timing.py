"""The timing of benchmarks, on a stand-in for torch.cuda with clocks of its own."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest
import torch
from broken_kernels import a_little, break_kernel

from benchmarks import bench_ops, timing
from benchmarks.arms.ops import GuidedStep
from benchmarks.arms.tdft import TdftStep
from benchmarks.bench_ops import Case, Sizes, run_case
from benchmarks.ops_report import table
from benchmarks.timing import calibrate, measure, ready

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HOST, LAUNCH, REPLAY = 50e-6, 2e-6, 20e-6
"""Seconds of the host for a call, for an event, and for a replay."""


class FakeCuda:
    """A GPU that runs what is issued one after the other, and a host that is mostly slower.

    A call takes the host `HOST` seconds and the device `device` seconds. During a capture calls
    are noted and take the device no time; a replay makes them again.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = self.idle_at = 0.0
        self.capturing: list | None = None
        self.log, self.graphs, self.generators, self.pools = [], [], [], []
        self.stream_now, self.status = "main", 0
        for name in ("CUDAGraph", "Event", "graph", "stream"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.stream_now)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: self.wait())
        patch.setattr(torch.cuda, "default_generators", [self])
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: ("pool", len(self.graphs)))
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            patch.setattr(torch._C, name, lambda *given, name=name: self.pools.append((name, *given)), raising=False)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: self)
        on_cpu = torch.Generator
        patch.setattr(torch, "Generator", lambda d: on_cpu(d) if d.type == "cpu" else f"generator of {d}")
        patch.setattr(timing.ctypes, "CDLL", self.CDLL)
        patch.setattr(timing.time, "perf_counter", lambda: self.now)

    L2_cache_size = 50 * 2**20

    def graphsafe_set_state(self, generator) -> None:
        self.generators.append(generator)

    def wait(self) -> None:
        if self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.now = max(self.now, self.idle_at)

    def work(self, seconds: float, host: float, what: object = None) -> None:
        """The host issues work that takes the device so many seconds."""
        self.now += host
        if self.capturing is not None:
            self.capturing.append((seconds, what))
            return
        self.idle_at = max(self.idle_at, self.now) + seconds
        self.log.append(what)

    def function(self, device: float, name: str = "call"):
        return lambda: self.work(device, HOST, name)

    def Event(self, enable_timing):
        return FakeEvent(self)

    def CUDAGraph(self, keep_graph):
        assert keep_graph
        self.graphs.append(FakeGraph(self))
        return self.graphs[-1]

    def CDLL(self, name):
        """The driver, which knows the graphs by their place in `graphs`."""
        if name != "libcuda.so.1":
            raise OSError(name)
        return self

    def cuGraphGetNodes(self, address, nodes, number) -> int:
        number._obj.value = len(self.graphs[address.value - 1].nodes)
        return self.status

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.stream_now = self.stream_now, stream
        try:
            yield
        finally:
            self.stream_now = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.wait()
        self.stream_now, self.capturing = stream, graph.nodes
        try:
            yield
            if not graph.nodes:
                warnings.warn("The CUDA Graph is empty. This usually means ...", stacklevel=1)
        finally:
            self.capturing = None
        self.stream_now = "main"  # a capture that fails leaves its stream


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.cuda.now += LAUNCH
        self.at = max(self.cuda.now, self.cuda.idle_at)

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.cuda.now >= end.at, "read before the device was waited for"
        return 1e3 * (end.at - self.at)


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.nodes, self.replays, self.closed = cuda, [], 0, False

    def replay(self) -> None:
        assert not self.closed
        self.replays += 1
        self.cuda.now += REPLAY
        for seconds, what in self.nodes:
            self.cuda.work(seconds, 0.0, what)

    def reset(self) -> None:
        self.closed = True

    def instantiate(self) -> None:
        pass

    def raw_cuda_graph(self) -> int:
        return self.cuda.graphs.index(self) + 1


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


@pytest.mark.parametrize("cycle", [1, 3, 25])
@pytest.mark.parametrize("device", [3e-6, 100e-6])
def test_a_gpu_is_timed_by_replays_and_the_host_apart(cuda, device, cycle):
    """The device's seconds of a call whether host or device is slower; whole cycles, in pairs."""
    timed = ready(lambda: cuda.function(device), GPU, 0.02, cycle)
    assert (timed.way, timed.why_launches) == ("graph", None)
    (graph,) = cuda.graphs
    assert len(graph.nodes) == timed.unit
    assert timed.unit % (2 * cycle) == 0
    assert 50 <= timed.unit <= 150
    assert timed.calls % timed.unit == 0
    assert timed.calls * device >= 0.02
    graph.replays = 0
    seconds, host = measure([timed], rounds=3)
    assert graph.replays == 3 * timed.calls // timed.unit
    # The gaps between replays, and before the first, are all that is added.
    np.testing.assert_allclose(seconds, np.full((3, 1), device), rtol=0.01)
    np.testing.assert_allclose(host, np.full((3, 1), HOST), rtol=1e-6)


def test_a_function_of_many_launches_has_few_calls_in_a_graph(cuda):
    timed = ready(lambda: lambda: cuda.work(5e-3, 11e-3), GPU, 0.02)
    assert timed.unit == len(cuda.graphs[0].nodes) == 4
    seconds, host = measure([timed], rounds=1)
    assert seconds[0, 0] == pytest.approx(5e-3, rel=0.01)
    assert host[0, 0] == pytest.approx(11e-3)


@pytest.mark.parametrize(("status", "launches"), [(0, 3), (999, None)])
def test_launches_of_a_call_are_counted_in_its_graph(cuda, status, launches):
    cuda.status = status
    timed = ready(lambda: lambda: [cuda.work(1e-6, HOST) for _ in range(3)], GPU, 0.02)
    assert timed.launches == launches
    assert timed.seconds(timed.unit) / timed.unit == pytest.approx(3e-6, rel=0.1)


def test_launches_are_timed_where_a_function_waits_for_the_gpu(cuda):
    def run():
        cuda.work(3e-6, HOST)
        cuda.wait()

    timed = ready(lambda: run, GPU, 0.02, capture=False)
    assert (timed.way, timed.why_launches) == ("launches", "it waits for values of the GPU")
    assert not cuda.graphs
    seconds, host = measure([timed], rounds=2)
    np.testing.assert_allclose(seconds, np.full((2, 1), HOST + 3e-6), rtol=0.01)
    np.testing.assert_allclose(host, np.full((2, 1), HOST + 3e-6), rtol=0.01)


@pytest.mark.parametrize("kind", ["waits", "raises", "empty"])
def test_a_capture_that_fails_is_said_and_launches_are_timed(cuda, kind):
    """torch.cuda is left as it was: stream, allocator, and a generator that can draw."""

    def run():
        if cuda.capturing is None:
            cuda.work(3e-6, HOST)
        elif kind == "waits":
            cuda.work(3e-6, HOST)
            cuda.wait()
        elif kind == "raises":
            raise RuntimeError("no first call\nin a capture")

    timed = ready(lambda: run, GPU, 0.02, cycle=2)
    reason = {
        "waits": "RuntimeError: operation not permitted when stream is capturing",
        "raises": "RuntimeError: no first call in a capture",
        "empty": "UserWarning: The CUDA Graph is empty. This usually means ...",
    }[kind]
    assert timed.why_launches == reason
    assert (timed.way, timed.unit) == ("launches", 2)
    assert cuda.stream_now == "main"
    assert cuda.generators == ["generator of cuda:0"]
    assert cuda.pools == [(name, 0, ("pool", 1)) for name in ("_cuda_endAllocateToPool", "_cuda_releasePool")]
    seconds, host = measure([timed], rounds=1)
    assert seconds[0, 0] == pytest.approx(HOST, rel=0.01)
    assert host[0, 0] == pytest.approx(HOST)


def test_the_captured_function_is_not_the_one_that_is_launched(cuda):
    """A captured state would be that of a step which has not run."""
    made = []

    def make():
        name = f"function {len(made)}"
        made.append(name)
        return cuda.function(3e-6, name)

    timed = ready(make, GPU, 0.02)
    assert made == ["function 0", "function 1"]
    assert {what for _, what in cuda.graphs[0].nodes} == {"function 1"}
    cuda.log.clear()
    timed.host_seconds()
    assert set(cuda.log) == {"function 0"}


@pytest.mark.parametrize("steps", [2, 4])
def test_replays_of_tdft_steps_begin_with_kept_tensors(steps):
    """What the first captured step reads outlives later steps; two of ours end where they began."""
    bench = TdftStep((3, 1, 2, 2), "fp32", CPU)
    chain = bench.arms()["eager"]
    begin = [tensor.clone() for tensor in chain.begin]
    for _ in range(steps):
        chain()
    assert all(torch.equal(kept, value) for kept, value in zip(chain.begin, begin, strict=True))
    ours = bench.arms()["ours"]
    first = ours()[1][2].data_ptr()
    for _ in range(steps):
        _, (_, _, slots) = ours()
    assert slots.data_ptr() == first


@pytest.fixture
def on_gpu(cuda, monkeypatch):
    """The fake GPU under `run_case`, with tensors on the CPU: it takes 3 us for ours, 30 for eager."""

    def slowly(run, device: float, name: str):
        def work(self, *inputs):
            cuda.work(device, HOST, name)
            return run(self, *inputs)

        return work

    monkeypatch.setattr(GuidedStep, "ours", slowly(GuidedStep.ours, 3e-6, "ours"))
    monkeypatch.setattr(GuidedStep, "eager", slowly(GuidedStep.eager, 30e-6, "eager"))
    monkeypatch.setattr(bench_ops, "floor_arm", lambda *_: cuda.function(2.4e-6, "floor"))
    monkeypatch.setattr(Case, "build", lambda self, device: GuidedStep(self.dims, self.dtype, CPU))
    return cuda


CASE = Case("guided_step", "sd15", "fp32", (8, 4, 16, 16))
SIZES = Sizes(arms=("ours", "eager", "floor"), rounds=3, least=0.002)


def test_a_case_on_a_gpu_is_timed_in_graphs_after_the_gate(on_gpu):
    record = run_case(CASE, SIZES, GPU)
    assert record["failures"] == []
    assert record["timed_by"] == dict.fromkeys(SIZES.arms, "graph")
    assert record["not_captured"] == record["errors"] == {}
    medians = {name: value["median"] for name, value in record["seconds"].items()}
    assert medians == pytest.approx({"ours": 3e-6, "eager": 30e-6, "floor": 2.4e-6}, rel=0.02)
    assert record["ratio_to"]["eager"]["median"] == pytest.approx(10, rel=0.02)
    assert record["fraction_of_floor"]["median"] == pytest.approx(0.8, rel=0.02)
    assert record["gigabytes_per_second"]["ours"]["median"] == pytest.approx(8192 * 20 / 3e-6 / 1e9, rel=0.02)
    assert {name: value["median"] for name, value in record["host_seconds"].items()} == pytest.approx(
        dict.fromkeys(SIZES.arms, HOST)
    )
    assert record["in_cache"] is True
    assert record["launches"] == dict.fromkeys(SIZES.arms, 1)
    assert all(graph.closed for graph in on_gpu.graphs)
    gate = on_gpu.log[: on_gpu.log.index("ours") + 1]
    assert on_gpu.log[:6].count("ours") == 2, "of the gate, with few samples and with all"
    assert set(gate) <= {"ours", "eager"}
    assert "50" in table([record], []).splitlines()[1].split()[-3]


def test_nothing_is_captured_or_timed_on_a_gpu_where_the_gate_fails(on_gpu, monkeypatch):
    break_kernel(monkeypatch, "guided_step", a_little(0))
    record = run_case(CASE, SIZES, GPU)
    assert [line.partition(" differs")[0] for line in record["failures"]] == ["guided_step sd15 fp32: x_next"] * 2
    assert "seconds" not in record
    assert on_gpu.graphs == []


def test_an_arm_that_is_not_captured_is_marked_in_record_and_table(on_gpu, monkeypatch):
    def synchronising(*_):
        return lambda: (on_gpu.work(2e-6, HOST, "floor"), on_gpu.wait())

    monkeypatch.setattr(bench_ops, "floor_arm", synchronising)
    record = run_case(CASE, SIZES, GPU)
    assert record["timed_by"] == {"ours": "graph", "eager": "graph", "floor": "launches"}
    assert record["not_captured"] == {"floor": "RuntimeError: operation not permitted when stream is capturing"}
    _, row, note = table([record], []).splitlines()
    assert "]*" in row
    assert note.startswith("* guided_step, floor: timed by launches, not captured: RuntimeError: operation not")


def test_tdft_step_says_which_arm_waits_for_the_gpu():
    assert TdftStep.reads_back == ("eager_by_rows",)


@pytest.mark.parametrize("seconds", [0.2, 0.1, 0.03, 0.0004, 3e-8])
@pytest.mark.parametrize("cycle", [1, 25])
def test_calibration_loops_past_the_least_time_and_hardly_further(seconds, cycle):
    asked = []

    def time_calls(calls: int) -> float:
        asked.append(calls)
        return calls * seconds

    calls = calibrate(time_calls, 0.1, cycle)
    assert calls % cycle == 0
    assert calls * seconds >= 0.1
    assert calls <= 2 * cycle or (calls - 2 * cycle) * seconds <= 0.11 * timing.SPARE
    assert len(asked) < 12 and max(asked) <= calls


def test_every_round_times_every_function_in_turn(monkeypatch):
    log = []
    functions = {name: (lambda name=name: log.append(name)) for name in ("ours", "eager", "floor")}
    clock = iter(np.arange(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))  # one second per sample
    arms = [ready(lambda run=run: run, CPU, 0.5, 2) for run in functions.values()]
    seconds, host = measure(arms, 3)
    assert [arm.calls for arm in arms] == [2, 2, 2]
    turns = ["ours", "eager", "floor", "eager", "floor", "ours", "floor", "ours", "eager"]
    assert log[:6] == [name for name in functions for _ in range(2)], "calibration"
    assert log[6:] == [name for name in turns for _ in range(2)], "each round begins with another function"
    np.testing.assert_allclose(seconds, np.full((3, 3), 0.5))
    assert np.isnan(host).all()
    assert [arm.way for arm in arms] == ["clock"] * 3
