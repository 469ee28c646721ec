"""Chooses the implementation of a call. `python -m selfnpo_kernels` prints the choices and why.

CUDA tensors go to Triton and CPU tensors to the C++ extension. Tensors of other devices, and
float64 tensors, go to the PyTorch reference. `SELFNPO_BACKEND=reference|cpp|triton` or `use(...)`
force one backend; a call that the forced backend cannot serve raises BackendError.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from selfnpo_kernels import cpp, reference
from selfnpo_kernels.known_lists import KnownLists

NAMES = ("reference", "cpp", "triton")
_LOG = logging.getLogger("selfnpo_kernels")


class BackendError(RuntimeError):
    """A backend was asked for by name and is not available, or cannot serve the call."""


@functools.cache
def _cpp() -> tuple[Any, str]:
    """(the namespace of the extension's ops, or None; the reason in words)."""
    return cpp.load()


@functools.cache
def _triton() -> tuple[Any, str]:
    """(the module of the Triton launchers, or None; the reason in words).

    Imports triton, which is why it is not called before a tensor could need it.
    """
    try:
        module = importlib.import_module("selfnpo_kernels.triton")
    except ImportError as error:
        return None, f"triton cannot be imported: {error}"
    if module.interpreted():
        return module, "Triton's interpreter (TRITON_INTERPRET=1): correct and very slow"
    if not torch.cuda.is_available():
        return None, "no CUDA device is present"
    try:
        # What launches kernels is compiled here.
        importlib.import_module("triton.runtime").driver.active  # noqa: B018
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        return None, f"Triton cannot launch kernels, for which it needs a C compiler and Python's headers: {words}"
    return module, "Triton kernels, compiled at first use"


def available(name: str) -> tuple[bool, str]:
    """(whether a backend is available, the reason in words); `name` is one of `NAMES`."""
    if name == "reference":
        return True, "plain PyTorch"
    operations, reason = _cpp() if name == "cpp" else _triton()
    return operations is not None, reason


def _checked(name: str) -> str:
    """The name itself. Raises BackendError where it is no backend or not available."""
    if name not in NAMES:
        raise BackendError(f"SELFNPO_BACKEND: {name!r} is no backend; expected one of {', '.join(NAMES)}")
    is_available, reason = available(name)
    if not is_available:
        raise BackendError(f"backend {name} was asked for and is not there: {reason}")
    return name


_forced: str | None = None  # set by `use`; `_from_environment` reads the variable at the first call


@functools.cache
def _from_environment() -> str | None:
    name = os.environ.get("SELFNPO_BACKEND")
    return _checked(name) if name else None


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Serves every op by one backend inside the context, in all threads.

    Raises BackendError where the backend is not available.
    """
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before


@functools.cache
def _default(device_type: str) -> str:
    """The backend of a device where none is forced; logged once for each device."""
    preferred = {"cuda": "triton", "cpu": "cpp"}.get(device_type, "reference")
    is_available, reason = available(preferred)
    if not is_available and preferred == "cpp" and os.environ.get("SELFNPO_REQUIRE_CPP") == "1":
        raise BackendError(f"SELFNPO_REQUIRE_CPP=1, and the C++ extension is not there: {reason}")
    if not is_available:
        _LOG.warning(
            "fused ops on %s: the PyTorch reference, since %s is not there: %s", device_type, preferred, reason
        )
        return "reference"
    interpreted = preferred == "triton" and _triton()[0].interpreted()
    _LOG.log(
        logging.WARNING if interpreted else logging.INFO, "fused ops on %s: %s (%s)", device_type, preferred, reason
    )
    return preferred


def backend_of(device_type: str, float64: bool = False) -> str:
    """The backend that serves tensors of a device type such as "cpu" or "cuda".

    Raises BackendError where a forced backend cannot serve them.
    """
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
    """The backend of a device's tensors in a few words for a log, such as `cpp (C++, AVX2)`."""
    name = backend_of(device_type)
    return f"{name} ({available(name)[1]})"


def _tensors(arguments) -> Iterator[torch.Tensor]:
    """All tensors of an op's arguments, those in lists included."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)


def implementation(op: str, arguments: tuple | KnownLists) -> Callable:
    """The function that serves a call of `op` with these arguments, in the order of its schema.

    Of lists of tensors it is enough to have what is known of them.

    Raises BackendError where a forced or required backend cannot serve the call.
    """
    if isinstance(arguments, KnownLists):
        name = backend_of(arguments.device.type, arguments.float64)
        if name == "triton":
            return functools.partial(getattr(_triton()[0], op), known=arguments)
    else:
        tensors = list(_tensors(arguments))
        if not tensors:  # an empty list of parameters
            return getattr(reference, op)
        float64 = any(t.dtype == torch.float64 for t in tensors) or any(a is torch.float64 for a in arguments)
        name = backend_of(tensors[0].device.type, float64)
    if name == "reference":
        return getattr(reference, op)
    return getattr((_cpp() if name == "cpp" else _triton())[0], op)
