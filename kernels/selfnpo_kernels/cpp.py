"""The C++ extension, if it was built: its ops under the schemas of `ops.py`, in the namespace `selfnpo_cpp`."""

from __future__ import annotations

import functools
import importlib
import threading

import torch

_LIBRARY: torch.library.Library | None = None
_LOCK = threading.Lock()  # the first calls may come from several threads


def load() -> tuple[object | None, str]:
    """(a namespace with one function per op, or None; why)."""
    global _LIBRARY
    try:
        importlib.import_module("selfnpo_kernels._cpp")
    except ImportError as error:
        return None, f"the extension was not built, or not for this torch ({error}); see csrc/README.md"
    with _LOCK:
        if _LIBRARY is None:
            from selfnpo_kernels.ops import SCHEMAS

            _LIBRARY = torch.library.Library("selfnpo_cpp", "DEF")
            for name, schema in SCHEMAS.items():
                _LIBRARY.define(name + schema)
    return torch.ops.selfnpo_cpp, f"C++, {capability()}"


@functools.cache
def capability() -> str:
    """The instruction set that the extension chose on this machine: AVX512, AVX2 or DEFAULT (scalar)."""
    return importlib.import_module("selfnpo_kernels._cpp").capability()
