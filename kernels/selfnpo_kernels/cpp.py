"""Loads the C++ extension where it was built, and registers its ops as `selfnpo_cpp::<op>`."""

from __future__ import annotations

import functools
import importlib
import threading
from typing import Any

import torch

from selfnpo_kernels.schemas import SCHEMAS

_LIBRARY: torch.library.Library | None = None
_LOCK = threading.Lock()  # the first calls may come from several threads


def load() -> tuple[Any, str]:
    """(a namespace with one function for each op, or None; the reason in words)."""
    global _LIBRARY
    try:
        importlib.import_module("selfnpo_kernels._cpp")
    except ImportError as error:
        return None, f"the extension was not built, or not for this torch ({error}); see csrc/README.md"
    with _LOCK:
        if _LIBRARY is None:
            _LIBRARY = torch.library.Library("selfnpo_cpp", "DEF")
            for name, schema in SCHEMAS.items():
                _LIBRARY.define(name + schema)
    return torch.ops.selfnpo_cpp, f"C++, {capability()}"


@functools.cache
def capability() -> str:
    """The instruction set that the extension chose on this machine: AVX512, AVX2 or DEFAULT.

    Raises ImportError where the extension was not built.
    """
    return importlib.import_module("selfnpo_kernels._cpp").capability()
