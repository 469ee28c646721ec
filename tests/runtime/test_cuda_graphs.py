"""CudaGraphs on a stand-in for torch.cuda: device, stream, mode, lock, and replays that lie."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch

from selfnpo_fast.runtime import capture
from selfnpo_fast.runtime.capture import CudaGraphs, capture_of, no_capture


class FakeCuda:
    """What torch.cuda does for a capture, on the CPU.

    A capture runs nothing, as a real one: what the step has overwritten is put back. A replay runs
    the step and overwrites the outputs of the capture.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current, self.stream_now, self.captures, self.replays = 0, "main", [], 0
        self.step = self.state = self.lie = self.fail = None
        for name in ("graph", "device", "stream", "Stream", "CUDAGraph"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "current_device", lambda: self.current)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.stream_now)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: ("pool", self.current))

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
        return FakeGraph(self)

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.captures.append((self.current, pool, stream, capture_error_mode, capture._CAPTURING.locked()))
        self.stream_now = stream
        before = [tensor.clone() for tensor in self.state]
        if self.fail:
            raise RuntimeError(self.fail)  # and leaves the stream
        yield
        for tensor, value in zip(self.state, before, strict=True):
            tensor.copy_(value)
        self.stream_now = "main"


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def replay(self):
        self.cuda.replays += 1
        self.cuda.step()
        if self.cuda.lie:
            self.cuda.lie()


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

    cuda.step, cuda.state = step, [x, out]
    return step, x, out


def test_a_capture_is_of_its_own_device_on_a_stream_of_its_own_under_one_lock(cuda):
    cuda.current = 0
    step, x, _ = counting(cuda)
    replayed = CudaGraphs(torch.device("cuda", 1))(step, (x,))
    results = [replayed()[0][0].item() for _ in range(5)]
    assert results == [10, 20, 30, 40, 50]  # the comparison leaves no trace
    assert cuda.captures == [(1, ("pool", 1), ("stream", 1), "thread_local", True)]
    assert cuda.replays == 3
    assert not capture._CAPTURING.locked()


def test_a_device_without_an_index_is_the_present_one(cuda):
    cuda.current = 2
    assert CudaGraphs(torch.device("cuda")).device == torch.device("cuda", 2)


def test_a_capture_that_fails_is_said_once_and_steps_run_plainly(cuda, caplog):
    cuda.fail = "operation not permitted when stream is capturing"
    graphs = CudaGraphs(torch.device("cuda", 0), "pictures of 4 x 8 x 8")
    step, x, _ = counting(cuda)
    replayed, other = graphs(step, (x,)), graphs(step, (x,))
    with caplog.at_level(logging.WARNING, "selfnpo"):
        assert [replayed()[0][0].item() for _ in range(5)] == [10, 20, 30, 40, 50]
        assert other()[0][0].item() == 60
    assert len(cuda.captures) == 1
    assert cuda.replays == 0
    assert cuda.stream_now == "main"
    (line,) = caplog.messages
    assert "off for pictures of 4 x 8 x 8" in line
    assert cuda.fail in line


@pytest.mark.parametrize("what", ["output", "state", "nan", "integer"])
def test_a_replay_that_lies_turns_graphs_off_with_the_plain_step_s_result(cuda, caplog, what):
    step, x, out = counting(cuda, torch.int64 if what == "integer" else torch.float32)
    target = x if what == "state" else out
    cuda.lie = lambda: target[0].fill_(torch.nan) if what == "nan" else target[0].add_(1)
    replayed = CudaGraphs(torch.device("cuda", 0))(step, (x, out))
    with caplog.at_level(logging.WARNING, "selfnpo"):
        assert [replayed()[0].tolist() for _ in range(4)] == [[10.0 * i] * 3 for i in range(1, 5)]
    assert len(caplog.messages) == 1
    assert cuda.replays == 1


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 3e-5), (torch.bfloat16, 0.02)])
def test_another_order_of_summing_is_no_lie(cuda, dtype, off):
    step, x, out = counting(cuda, dtype)
    cuda.lie = lambda: out.mul_(1 + off)
    replayed = CudaGraphs(torch.device("cuda", 0))(step, (x, out))
    for _ in range(5):
        replayed()
    assert cuda.replays == 3


def test_graphs_are_for_gpus_and_can_be_left_off(cuda):
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    assert capture_of(gpu, True, "steps").device == gpu
    assert capture_of(gpu, False, "steps") is capture_of(cpu, True, "steps") is no_capture
