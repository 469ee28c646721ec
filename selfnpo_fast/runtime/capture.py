"""Steps that are captured once and replayed: CUDA graphs on a GPU, plain functions elsewhere.

A step is a function without arguments. It reads and overwrites buffers that stay at their
addresses, and it returns tensors that the next replay overwrites. It must not read a value back
from the device.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import one_line

Tensors = tuple[torch.Tensor, ...]
Step = Callable[[], Tensors]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far a first replay may differ from the plain step, as a share of the largest value.

A captured step runs the same kernels, but libraries may choose another algorithm for one, which
sums in another order. The larger tolerance counts of a tensor's dtype and of that in which the
steps compute: a bfloat16 network moves a float32 state by its own rounding. Integers have to be
equal.
"""

_CAPTURING = threading.Lock()
"""Held while any object of this process captures: the caching allocator serves one capture at a
time, and CUDA fails both a capture and a wait for its whole device that meet."""


class Capture(Protocol):
    """Turns a plain step into one that can be replayed."""

    def __call__(self, step: Step, state: Sequence[torch.Tensor] = ()) -> Step:
        """The step to call instead of `step`. `state` are the buffers that `step` overwrites."""


def no_capture(step: Step, state: Sequence[torch.Tensor] = ()) -> Step:
    """The step itself: the `Capture` of a CPU."""
    return step


class CudaGraphs:
    """The `Capture` of one GPU. Its graphs share one pool of memory, since they run in turn.

    The first replay of each graph is compared with the plain step on the same inputs. Where they
    differ, or where a capture fails, the object logs one line and captures nothing any more: its
    steps run as they are.
    """

    WARM_UP = 2
    """Calls before the capture. In them kernels compile and libraries allocate their workspaces."""

    def __init__(self, device: torch.device, what: str = "steps", dtype: torch.dtype = torch.float32) -> None:
        """`what` names the steps in the log; `dtype` is that in which their networks compute."""
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device, self.what, self.dtype, self.on = torch.device("cuda", index), what, dtype, True
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self.reason: str | None = None  # why it captures nothing any more
        with torch.cuda.device(self.device):
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)

    def __call__(self, step: Step, state: Sequence[torch.Tensor] = ()) -> Step:
        """A step that is captured at its third call and replayed from then on."""
        graph: torch.cuda.CUDAGraph | None = None
        outputs: Tensors = ()
        calls = 0

        def replayed() -> Tensors:
            """Runs the step, by its graph once there is one."""
            nonlocal graph, outputs, calls
            calls += 1
            if calls <= self.WARM_UP or not self.on:
                graph, outputs = None, ()  # a graph keeps its memory
                return step()
            with torch.cuda.device(self.device):
                if graph is None:
                    graph, outputs = self._captured(step, state)
                else:
                    graph.replay()
            return outputs

        return replayed

    def _captured(self, step: Step, state: Sequence[torch.Tensor]) -> tuple[torch.cuda.CUDAGraph | None, Tensors]:
        """Run the step once more, captured if that gives what the plain step gives.

        Returns the graph, or None, and the step's outputs.
        """
        # What the plain step makes of the present inputs.
        before = [tensor.clone() for tensor in state]
        expected = tuple(output.clone() for output in step())
        after = [tensor.clone() for tensor in state]
        _copy(before, state)
        # Outputs have memory of their own. The memory of the pool is any graph's while that one is
        # replayed: outputs in it would last until a graph is replayed that was captured earlier.
        outputs = tuple(torch.empty_like(output) for output in expected)
        try:
            # Capturing runs nothing: buffers change only at the replay.
            graph = self._recorded(lambda: _copy(step(), outputs))
            graph.replay()
            reason = _difference((*outputs, *state), (*expected, *after), self.dtype)
        except Exception as error:  # the plain step has just succeeded
            reason = one_line(error)
        if reason is None:
            return graph, outputs
        self.on, self.reason = False, reason
        logger.warning("CUDA graphs: off for %s, which run as plain launches: %s", self.what, reason)
        _copy(after, state)
        return None, expected

    def _recorded(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The graph of `run`. Raises what `run` raises, or what CUDA says of the capture."""
        if not self._graphs:
            # torch takes no capture into a pool whose graphs are all gone, but for its last blocks.
            self.pool = torch.cuda.graph_pool_handle()
        graph, failure = torch.cuda.CUDAGraph(), None
        # A capture that fails leaves its own stream as the current one.
        with _CAPTURING, torch.cuda.stream(torch.cuda.current_stream()):
            try:
                with self._capturing(graph, self.pool):
                    try:
                        run()
                    except Exception as error:
                        failure = error  # ending the capture may raise another, which says less
                        raise
            except Exception as error:
                self._clean_up()
                raise failure or error from None
            finally:
                failure = None  # it refers to this frame, and so to the graph
        self._graphs.add(graph)
        return graph

    def _capturing(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> torch.cuda.graph:
        """A context that captures into a graph, on the stream of this object."""
        return torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")

    def _clean_up(self) -> None:
        """Undo what torch leaves undone where CUDA does not end a capture (`capture_ended_` in
        CUDAGraph.h).

        Allocations would count as the capture's, and the next random number on the device would
        raise. A capture that succeeds takes the generator out of its state.
        """
        with contextlib.suppress(Exception):  # it raises where the allocator has finished
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
        with contextlib.suppress(Exception), self._capturing(torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()):
            torch.zeros((), device=self.device)


def capture_of(device: torch.device, graphs: bool, what: str, dtype: torch.dtype) -> Capture:
    """CUDA graphs where `device` is a GPU and `graphs` is true, else plain steps.

    `what` names the steps in the log; `dtype` is that in which their networks compute.
    """
    return CudaGraphs(device, what, dtype) if graphs and device.type == "cuda" else no_capture


def wait_for_device(device: torch.device) -> None:
    """Wait until a GPU has done what it was given on all streams; a CPU always has.

    Not while a thread captures: CUDA would fail this wait and the capture.
    """
    if device.type == "cuda":
        with _CAPTURING:
            torch.cuda.synchronize(device)


def wait_for_stream(device: torch.device) -> None:
    """Wait until a GPU has done what it was given on this thread's stream; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _copy(values: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Overwrite each target with its value."""
    for value, target in zip(values, targets, strict=True):
        target.copy_(value)


def _difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], computed: torch.dtype) -> str | None:
    """How a replay's results differ from those of the plain step, which computes in `computed`; None
    within `TOLERANCES`."""
    for a, b in zip(found, expected, strict=True):
        if torch.equal(a, b):
            continue
        if b.dtype not in TOLERANCES:
            return f"a replay gives other {b.dtype} values than the plain step"
        tolerance = max(TOLERANCES[b.dtype], TOLERANCES.get(computed, 0))
        a, b = a.double(), b.double()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return "a replay gives values that are not finite, unlike the plain step"
        largest = b.nan_to_num(0, 0, 0).abs().amax()
        apart = ((a - b).nan_to_num(0, 0, 0).abs().amax() / largest.clamp(min=1e-30)).item()
        if apart > tolerance:
            return f"a replay differs from the plain step by {apart:.2g} of the largest value"
    return None


@contextlib.contextmanager
def own_modes(device: torch.device) -> Iterator[None]:
    """A block without gradients and without the caller's modes, whose steps may be captured.

    Buffers that are made in inference mode cannot be written to outside of it, and autocast frees
    its casts of weights, which a captured step would read. Where an exception ends the block, it is
    over on a GPU, too: its buffers may be used on another stream then.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # of a GPU that is broken: the block has raised it
                wait_for_stream(device)
            raise
