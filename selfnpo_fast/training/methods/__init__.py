"""The training methods, by the name that configs use."""

from __future__ import annotations

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.training.methods.base import Method, MethodInputs
from selfnpo_fast.training.methods.self_npo import SelfNPO

METHODS: dict[str, type[Method]] = {}
"""All registered methods by name."""


def register(method: type[Method]) -> None:
    """Make a method known under its `name`."""
    METHODS[method.name] = method


register(SelfNPO)


def find_method(name: str) -> type[Method]:
    """The method of that name. Raises UserError where there is none."""
    if name not in METHODS:
        raise UserError(f"method: {name!r} is not known; expected one of {', '.join(METHODS)}")
    return METHODS[name]


__all__ = ["METHODS", "Method", "MethodInputs", "SelfNPO", "find_method", "register"]
