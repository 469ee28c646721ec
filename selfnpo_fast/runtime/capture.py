"""Steps that are captured once and replayed: CUDA graphs on a GPU, plain functions elsewhere.

A step is a function without arguments. It reads and overwrites buffers that stay at their
addresses, and it returns tensors that the next replay overwrites. It must not read a value back
from the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensors = tuple[torch.Tensor, ...]
Step = Callable[[], Tensors]
Capture = Callable[[Step], Step]
"""Turns a plain step into one that can be replayed."""


def no_capture(step: Step) -> Step:
    """The step itself: the `Capture` of a CPU."""
    return step


class CudaGraphs:
    """The `Capture` of one GPU. Its graphs share one pool of memory, since they run in turn."""

    WARM_UP = 2
    """Calls before the capture. In them kernels compile and libraries allocate their workspaces."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """A step that is captured at its third call and replayed from then on."""
        graph, outputs, calls = torch.cuda.CUDAGraph(), (), 0

        def replayed() -> Tensors:
            """Runs the step, by its graph once there is one."""
            nonlocal outputs, calls
            calls += 1
            if calls <= self.WARM_UP:
                return step()
            if calls == self.WARM_UP + 1:
                # Capturing runs nothing: buffers change only at the replay below.
                with torch.cuda.graph(graph, pool=self.pool):
                    outputs = step()
            graph.replay()
            return outputs

        return replayed
