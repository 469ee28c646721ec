"""Finds where the host would wait for a GPU, though the tensors are on a CPU."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
from recording import ASKS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

UPLOADS = {"tensor", "as_tensor", "from_numpy"}
"""Functions that copy values of the host to a device, and wait for the copy."""
READS = {"cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__"}
"""Methods that bring values to the host."""
TORCH = str(Path(torch.__file__).parent)


class _Functions(TorchFunctionMode):
    """Counts the functions and methods that wait."""

    def __init__(self, seen: Counter) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS or (name in UPLOADS and func in (torch.tensor, torch.as_tensor, torch.from_numpy)):
            self.seen[_origin(), name] += 1
        return func(*args, **(kwargs or {}))


class HostWaits(TorchDispatchMode):
    """Counts (file and line, what) of all that waits, in the present thread.

    An op that reads a value counts where its method has not been counted, and so do masks as
    indices, whose size is read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter = Counter()
        self._functions = _Functions(self.seen)

    def __enter__(self):
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_", "_unsafe_index") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masks or (name in ASKS and not any(key[0] == _origin() and key[1] in READS for key in self.seen)):
            self.seen[_origin(), "mask" if masks else name] += 1
        return func(*args, **(kwargs or {}))

    def of(self, package: str) -> Counter:
        """What was counted in files of a package, such as `deepspeed`."""
        return Counter({key: count for key, count in self.seen.items() if f"/{package}/" in key[0]})


def _origin() -> str:
    """The file and line that has called torch."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(TORCH) or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
