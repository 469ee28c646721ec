"""Which implementation serves an op, and why: `python -m selfnpo_kernels` prints it.

CUDA tensors go to Triton, CPU tensors to the C++ extension, anything else, and float64, to the PyTorch reference.
`SELFNPO_BACKEND=reference|cpp|triton` or `use(...)` force one; a forced backend that cannot serve a call fails it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator

import torch

from selfnpo_kernels import reference

NAMES = ("reference", "cpp", "triton")
_LOG = logging.getLogger("selfnpo_kernels")


class BackendError(RuntimeError):
    """A backend was asked for by name and is not there."""


@functools.cache
def _cpp() -> tuple[object | None, str]:
    """(the extension's ops, or None; why)."""
    from selfnpo_kernels import cpp

    return cpp.load()


@functools.cache
def _triton() -> tuple[object | None, str]:
    try:
        module = importlib.import_module("selfnpo_kernels.triton")
    except ImportError as error:
        return None, f"triton cannot be imported: {error}"
    if module.interpreted():
        return module, "Triton's interpreter (TRITON_INTERPRET=1): correct and very slow"
    if not torch.cuda.is_available():
        return None, "no CUDA device is present"
    return module, "Triton kernels, compiled at first use"


def available(name: str) -> tuple[bool, str]:
    """Whether a backend is there, and why."""
    if name == "reference":
        return True, "plain PyTorch"
    found, why = _cpp() if name == "cpp" else _triton()
    return found is not None, why


def _checked(name: str) -> str:
    if name not in NAMES:
        raise BackendError(f"SELFNPO_BACKEND: {name!r} is no backend; expected one of {', '.join(NAMES)}")
    there, why = available(name)
    if not there:
        raise BackendError(f"backend {name} was asked for and is not there: {why}")
    return name


_forced: str | None = None  # by `use`; the environment variable is read at the first call


@functools.cache
def _from_environment() -> str | None:
    name = os.environ.get("SELFNPO_BACKEND")
    return _checked(name) if name else None


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Serve every op by one backend inside the context, in all threads. Raises BackendError if it is not there."""
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before


@functools.cache
def _default(device_type: str) -> str:
    """The backend of a device, said once."""
    preferred = {"cuda": "triton", "cpu": "cpp"}.get(device_type, "reference")
    there, why = available(preferred)
    if not there and preferred == "cpp" and os.environ.get("SELFNPO_REQUIRE_CPP") == "1":
        raise BackendError(f"SELFNPO_REQUIRE_CPP=1, and the C++ extension is not there: {why}")
    if not there:
        _LOG.warning("fused ops on %s: the PyTorch reference, since %s is not there: %s", device_type, preferred, why)
        return "reference"
    _LOG.info("fused ops on %s: %s (%s)", device_type, preferred, why)
    return preferred


def backend_of(device_type: str, float64: bool = False) -> str:
    """The backend that serves tensors of a device type. Raises BackendError where a forced one cannot."""
    forced = _forced or _from_environment()
    if forced is None:
        return "reference" if float64 else _default(device_type)
    interpreted = forced == "triton" and _triton()[0].interpreted()
    devices = {"cpp": ("cpu",), "triton": ("cpu", "cuda") if interpreted else ("cuda",)}.get(forced)
    if devices and device_type not in devices:
        raise BackendError(f"backend {forced} was asked for and does not serve {device_type} tensors")
    if devices and float64:
        raise BackendError(f"backend {forced} was asked for and does not serve float64; the reference does")
    return forced


def describe(device_type: str) -> str:
    """The backend of a device's tensors in a few words, for a log: `cpp (C++, AVX2)`."""
    name = backend_of(device_type)
    return f"{name} ({available(name)[1]})"


def _tensors(arguments) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)


def implementation(op: str, arguments: tuple) -> Callable:
    """The function that serves this call."""
    tensors = list(_tensors(arguments))
    if not tensors:  # an empty list of parameters
        return getattr(reference, op)
    float64 = any(t.dtype == torch.float64 for t in tensors) or any(a is torch.float64 for a in arguments)
    name = backend_of(tensors[0].device.type, float64)
    if name == "reference":
        return getattr(reference, op)
    return getattr((_cpp() if name == "cpp" else _triton())[0], op)
