"""Steps that are captured once and replayed: CUDA graphs on a GPU, plain functions elsewhere.

A step is a function without arguments. It reads and overwrites buffers that stay at their
addresses, and it returns tensors that the next replay overwrites. It must not read a value back
from the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import one_line

Tensors = tuple[torch.Tensor, ...]
Step = Callable[[], Tensors]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far a first replay may differ from the plain step, as a share of the largest value.

A captured step runs the same kernels, but libraries may choose another algorithm for one, which
sums in another order. Integers have to be equal.
"""

_CAPTURING = threading.Lock()
"""Held while any object of this process captures: the caching allocator serves one capture at a
time."""


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

    def __init__(self, device: torch.device, what: str = "steps") -> None:
        """`what` names the steps in the log."""
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device, self.what, self.on = torch.device("cuda", index), what, True
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
        # Capturing runs nothing: buffers change only at the replay.
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                _CAPTURING,
                # A capture that fails leaves its own stream as the current one.
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                outputs = step()
            graph.replay()
            reason = _difference((*outputs, *state), (*expected, *after))
        except RuntimeError as error:
            reason = one_line(error)
        if reason is None:
            return graph, outputs
        self.on = False
        logger.warning("CUDA graphs: off for %s, which run as plain launches: %s", self.what, reason)
        _copy(after, state)
        return None, expected


def capture_of(device: torch.device, graphs: bool, what: str) -> Capture:
    """CUDA graphs where `device` is a GPU and `graphs` is true, else plain steps.

    `what` names the steps in the log.
    """
    return CudaGraphs(device, what) if graphs and device.type == "cuda" else no_capture


def _copy(values: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Overwrite each target with its value."""
    for value, target in zip(values, targets, strict=True):
        target.copy_(value)


def _difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str | None:
    """How a replay's results differ from the plain step's, or None within `TOLERANCES`."""
    for a, b in zip(found, expected, strict=True):
        if torch.equal(a, b):
            continue
        tolerance = TOLERANCES.get(b.dtype)
        if tolerance is None:
            return f"a replay gives other {b.dtype} values than the plain step"
        a, b = a.double(), b.double()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return "a replay gives values that are not finite, unlike the plain step"
        largest = b.nan_to_num(0, 0, 0).abs().amax()
        apart = ((a - b).nan_to_num(0, 0, 0).abs().amax() / largest.clamp(min=1e-30)).item()
        if apart > tolerance:
            return f"a replay differs from the plain step by {apart:.2g} of the largest value"
    return None
