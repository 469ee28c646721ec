"""CudaGraphs on a stand-in for torch.cuda: device, stream, mode, lock, memory, and replays that
lie."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from selfnpo_fast.runtime import capture
from selfnpo_fast.runtime.batch_or_split import BatchOrSplit
from selfnpo_fast.runtime.capture import CudaGraphs, capture_of, no_capture, wait_for_stream

GPU = torch.device("cuda", 0)


class FakeCuda:
    """What torch.cuda does for a capture, on the CPU.

    A capture records the ops and runs nothing: what they have overwritten is put back. A replay
    runs the ops on the same memory. As all graphs share a pool, it also writes to the memory of
    graphs that were captured later: CUDAGraph.h calls sharing safe where graphs are replayed in the
    order in which they were captured.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current, self.stream_now, self.captures, self.replays = 0, "main", [], 0
        self.state = self.lie = self.fail = self.fail_at_end = None
        self.graphs: list[FakeGraph] = []
        self.handles, self.underway, self.released = itertools.count(), [], []
        self.generator_captures = False
        for name in ("graph", "device", "stream", "Stream", "CUDAGraph"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "current_device", lambda: self.current)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.stream_now)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (self.current, next(self.handles)))
        patch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: self.underway.remove((device, pool)))
        patch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.released.append((device, pool)))
        plain = torch.zeros
        patch.setattr(torch, "zeros", lambda *size, device=None, **options: plain(*size, **options))

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, device.index
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.stream_now = self.stream_now, stream
        try:
            yield
        finally:
            self.stream_now = before

    def Stream(self, device):
        return ("stream", device.index)

    def CUDAGraph(self):
        self.graphs.append(FakeGraph(self))
        return self.graphs[-1]

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.captures.append((self.current, pool, stream, capture_error_mode, capture._CAPTURING.locked()))
        self.stream_now, self.generator_captures = stream, True
        self.underway.append((self.current, pool))
        before = [tensor.clone() for tensor in self.state]
        try:
            with graph:
                if self.fail:
                    raise RuntimeError(self.fail)
                yield
        except Exception:
            if self.fail_at_end:  # and leaves stream, generator and allocator as they are
                raise RuntimeError(self.fail_at_end) from None
            self._end(pool)
            raise
        finally:
            for tensor, value in zip(self.state, before, strict=True):
                tensor.copy_(value)
        self._end(pool)

    def _end(self, pool):
        self.underway.remove((self.current, pool))
        self.stream_now, self.generator_captures = "main", False


class FakeGraph(TorchDispatchMode):
    """Records the ops inside of it, and the tensors that they allocate."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda, self.ops, self.allocated = cuda, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        if isinstance(out, torch.Tensor) and not any(out is arg for arg in args) and not out._is_view():
            self.allocated.append(out)
        return out

    def replay(self):
        self.cuda.replays += 1
        for func, args, kwargs, out in self.ops:
            result = func(*args, **kwargs)
            if result is not out:
                out.copy_(result)
        if self.cuda.lie:
            self.cuda.lie()
        later = self.cuda.graphs[self.cuda.graphs.index(self) + 1 :]
        for tensor in (tensor for graph in later for tensor in graph.allocated):
            tensor.fill_(99)


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def counting(cuda: FakeCuda, dtype: torch.dtype = torch.float32):
    """(step, x, out): x grows by one in each step, which gives 10 x."""
    x, out = torch.zeros(3, dtype=dtype), torch.zeros(3, dtype=dtype)

    def step():
        x.add_(1)
        out.copy_(10 * x)
        return (out,)

    cuda.state = [*(cuda.state or []), x, out]
    return step, x, out


def test_a_capture_is_of_its_own_device_on_a_stream_of_its_own_under_one_lock(cuda):
    cuda.current = 0
    step, x, _ = counting(cuda)
    replayed = CudaGraphs(torch.device("cuda", 1))(step, (x,))
    results = [replayed()[0][0].item() for _ in range(5)]
    assert results == [10, 20, 30, 40, 50]  # the comparison leaves no trace
    ((device, pool, *others),) = cuda.captures
    assert (device, pool[0], *others) == (1, 1, ("stream", 1), "thread_local", True)
    assert cuda.replays == 3
    assert not capture._CAPTURING.locked()


def test_a_device_without_an_index_is_the_present_one(cuda):
    cuda.current = 2
    assert CudaGraphs(torch.device("cuda")).device == torch.device("cuda", 2)


def test_outputs_last_whatever_order_graphs_are_captured_in(cuda):
    """A rollout returns the outputs of some graphs together, and captures the last of them first
    where trials of its branches end in the middle of an update."""
    graphs, states = CudaGraphs(GPU), [torch.full((3,), float(i)) for i in range(2)]
    cuda.state = states
    first, last = (graphs(lambda x=x: (x.add_(1) * 10,), (x,)) for x in states)
    for _ in range(3):
        last()
    for _ in range(3):
        first()
    assert len(cuda.captures) == 2
    (a,), (b,) = first(), last()
    assert (a.tolist(), b.tolist()) == ([40.0] * 3, [50.0] * 3)


def test_a_capture_that_fails_is_said_once_and_steps_run_plainly(cuda, caplog):
    cuda.fail = "operation not permitted when stream is capturing"
    graphs = CudaGraphs(GPU, "pictures of 4 x 8 x 8")
    step, x, _ = counting(cuda)
    replayed, other = graphs(step, (x,)), graphs(step, (x,))
    with caplog.at_level(logging.WARNING, "selfnpo"):
        assert [replayed()[0][0].item() for _ in range(5)] == [10, 20, 30, 40, 50]
        assert other()[0][0].item() == 60
    assert sum(pool == graphs.pool for _, pool, *_ in cuda.captures) == 1
    assert cuda.replays == 0
    assert cuda.stream_now == "main"
    (line,) = caplog.messages
    assert "off for pictures of 4 x 8 x 8" in line
    assert cuda.fail in line
    assert graphs.reason == cuda.fail


@pytest.mark.parametrize("at_end", [None, "operation failed due to a previous error during capture"])
def test_the_line_names_what_the_step_has_raised_and_torch_is_as_before(cuda, caplog, at_end):
    """CUDA does not end such a capture, and torch then leaves pool and random numbers in it."""
    step, x, _ = counting(cuda)
    graphs, capturing = CudaGraphs(GPU), []

    def asking():
        if cuda.generator_captures and not capturing:
            capturing.append(graphs.pool)
            cuda.fail_at_end = at_end
            raise ValueError("Cannot copy between CPU and CUDA tensors")
        return step()

    replayed = graphs(asking, (x,))
    with caplog.at_level(logging.WARNING, "selfnpo"):
        assert [replayed()[0][0].item() for _ in range(4)] == [10, 20, 30, 40]
    (line,) = caplog.messages
    assert line.endswith("Cannot copy between CPU and CUDA tensors")
    assert not cuda.underway
    assert not cuda.generator_captures
    assert cuda.stream_now == "main"
    assert cuda.released == [(0, pool) for pool in capturing if at_end]


def test_a_capture_that_fails_keeps_no_graph(cuda):
    step, x, _ = counting(cuda)
    cuda.fail = "out of memory"
    replayed = CudaGraphs(GPU)(step, (x,))
    gc.disable()
    try:
        for _ in range(3):
            replayed()
        kept = [weakref.ref(graph) for graph in cuda.graphs]
        cuda.graphs.clear()
        assert kept
        assert not any(graph() for graph in kept)
    finally:
        gc.enable()


def test_a_pool_whose_graphs_are_gone_is_not_used_again(cuda):
    """torch refuses a capture into it, where a library's workspace is left in it."""
    graphs = CudaGraphs(GPU)
    step, x, _ = counting(cuda)
    one, other = graphs(step, (x,)), graphs(step, (x,))
    for _ in range(3):
        one()
        other()
    del one, other
    cuda.graphs.clear()
    gc.collect()
    again = graphs(step, (x,))
    for _ in range(3):
        again()
    pools = [pool for _, pool, *_ in cuda.captures]
    assert pools[0] == pools[1] != pools[2]
    assert graphs.on


@pytest.mark.parametrize("what", ["output", "state", "nan", "integer"])
def test_a_replay_that_lies_turns_graphs_off_with_the_plain_step_s_result(cuda, caplog, what):
    step, x, out = counting(cuda, torch.int64 if what == "integer" else torch.float32)
    target = x if what == "state" else out
    cuda.lie = lambda: target[0].fill_(torch.nan) if what == "nan" else target[0].add_(1)
    replayed = CudaGraphs(GPU)(step, (x, out))
    with caplog.at_level(logging.WARNING, "selfnpo"):
        assert [replayed()[0].tolist() for _ in range(4)] == [[10.0 * i] * 3 for i in range(1, 5)]
    assert len(caplog.messages) == 1
    assert cuda.replays == 1


@pytest.mark.parametrize(
    ("dtype", "computed", "off"),
    [
        (torch.float32, torch.float32, 3e-5),
        (torch.bfloat16, torch.bfloat16, 0.02),
        (torch.float32, torch.bfloat16, 0.02),  # float32 states of a network in half precision
    ],
)
def test_another_order_of_summing_is_no_lie(cuda, dtype, computed, off):
    step, x, out = counting(cuda, dtype)
    cuda.lie = lambda: out.mul_(1 + off)
    replayed = CudaGraphs(GPU, dtype=computed)(step, (x, out))
    for _ in range(5):
        replayed()
    assert cuda.replays == 3


def test_float32_steps_are_held_to_float32(cuda):
    step, x, out = counting(cuda)
    cuda.lie = lambda: out.mul_(1.02)
    graphs = CudaGraphs(GPU)
    replayed = graphs(step, (x, out))
    for _ in range(3):
        replayed()
    assert not graphs.on


def test_graphs_are_for_gpus_and_can_be_left_off(cuda):
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    assert capture_of(gpu, True, "steps", torch.float16).device == gpu
    assert capture_of(gpu, True, "steps", torch.float16).dtype == torch.float16
    off = capture_of(gpu, False, "steps", torch.float16)
    assert off is capture_of(cpu, True, "steps", torch.float16) is no_capture


def test_nobody_waits_for_a_whole_device_while_a_capture_runs(cuda, monkeypatch):
    """CUDA would fail both (cudaStreamBeginCapture, prohibited calls)."""
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(capture._CAPTURING.locked()))
    BatchOrSplit("auto", "pictures").run(lambda batched: (), GPU)
    assert waits == [True, True]
    assert not capture._CAPTURING.locked()


def test_a_wait_for_a_stream_is_of_its_own_device(monkeypatch):
    class Stream:
        def __init__(self, device):
            self.device = device

        def synchronize(self):
            waited.append(self.device)

    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    wait_for_stream(torch.device("cuda", 1))
    wait_for_stream(torch.device("cpu"))
    assert waited == [torch.device("cuda", 1)]
