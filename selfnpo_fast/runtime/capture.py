"""Steps that are captured once and replayed: a CUDA graph on a GPU, the plain function elsewhere.

A step is a function without arguments whose tensors stay where they are: it reads and overwrites buffers that exist and
returns tensors that the next replay overwrites. Nothing in it may ask the device for a value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensors = tuple[torch.Tensor, ...]
Step = Callable[[], Tensors]
Capture = Callable[[Step], Step]
"""Makes a step that can be replayed of a plain one."""


def no_capture(step: Step) -> Step:
    """The step itself."""
    return step


class CudaGraphs:
    """A `Capture` for one device; all its graphs share one pool of memory, since one runs at a time."""

    WARM_UP = 2
    """Calls that run as they are: kernels compile, tables are uploaded, libraries take their workspaces."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """A step that is captured at its third call and replayed from then on."""
        graph, outputs, calls = torch.cuda.CUDAGraph(), (), 0

        def replayed() -> Tensors:
            """The step, by its graph once there is one."""
            nonlocal outputs, calls
            calls += 1
            if calls <= self.WARM_UP:
                return step()
            if calls == self.WARM_UP + 1:
                # Capturing runs nothing: state moves at the replay below.
                with torch.cuda.graph(graph, pool=self.pool):
                    outputs = step()
            graph.replay()
            return outputs

        return replayed
