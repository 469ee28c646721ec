"""A stand-in for CUDA graphs that holds a CPU to a graph's rules."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Ops that ask the device for a value, and ops that allocate memory.
ASKS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "zeros", "zeros_like", "clone", "cat", "stack"}


class Watched(TorchDispatchMode):
    """The ops of a region: their names, and the addresses of the tensors from outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.outside: list[int] = []
        self._created: set[int] = set()
        self._alive: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ASKS:
            raise AssertionError(f"{name} asks the device for a value")
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self._created:
                self.outside.append(leaf.data_ptr())
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.data_ptr() not in self.outside:
                self._created.add(leaf.untyped_storage().data_ptr())
                self._alive.append(leaf)  # so that no address is given out twice
        self.ops.append(name)
        return out


class Recording:
    """A `Capture` that records the second call of a step.

    Every later call has to run the same ops on the same memory. Its results overwrite those of the
    recording, as the results of a graph do.
    """

    def __init__(self) -> None:
        self.replays = self.depth = 0

    def __call__(self, step, state=()):
        record = outputs = None
        calls = 0

        def replayed():
            nonlocal record, outputs, calls
            calls += 1
            if calls == 1:
                return step()
            self.depth += 1
            try:
                with Watched() as watched:
                    results = step()
            finally:
                self.depth -= 1
            if record is None:
                record, outputs = watched, results
                return outputs
            assert watched.ops == record.ops, "other operations"
            assert watched.outside == record.outside, "an address has changed"
            for output, result in zip(outputs, results, strict=True):
                output.copy_(result)
            self.replays += 1
            return outputs

        return replayed
