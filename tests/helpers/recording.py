"""A stand-in for CUDA graphs that holds a CPU to a graph's rules."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASKS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "zeros", "zeros_like", "clone", "cat", "stack"}


class Watched(TorchDispatchMode):
    """The ops of a region: names, and addresses of what they read and did not make themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.outside: list[int] = []
        self._made: set[int] = set()
        self._alive: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ASKS:
            raise AssertionError(f"{name} asks the device for a value")
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self._made:
                self.outside.append(leaf.data_ptr())
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.data_ptr() not in self.outside:
                self._made.add(leaf.untyped_storage().data_ptr())
                self._alive.append(leaf)  # an address is not given out twice
        self.ops.append(name)
        return out


class Recording:
    """A `Capture`: the second call of a step is recorded, and every later one has to do the same with the same memory.

    As a graph's, its results lie where those of the recording lay, whoever still looks at them.
    """

    def __init__(self) -> None:
        self.replays = self.depth = 0

    def __call__(self, step):
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
                    made = step()
            finally:
                self.depth -= 1
            if record is None:
                record, outputs = watched, made
                return outputs
            assert watched.ops == record.ops, "other operations"
            assert watched.outside == record.outside, "an address has changed"
            for kept, new in zip(outputs, made, strict=True):
                kept.copy_(new)
            self.replays += 1
            return outputs

        return replayed
