"""Checks of a config's fields: a value that cannot work is one line that names its field."""

from __future__ import annotations

import math
import re
from types import NoneType
from typing import get_args, get_type_hints

from selfnpo_fast.runtime.errors import UserError, shortened

_UNWRITABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""Control characters, and surrogates, for which UTF-8 has no bytes."""


def check(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise UserError for the value of the field `name` unless `condition` holds."""
    if not condition:
        raise UserError(f"{name}: {shortened(value)} is not possible; expected {expected}")


def check_fields(prefix: str, section: object) -> None:
    """Raise UserError for values that jsonargparse takes in a field of any type.

    Those are null, true for 1, inf and nan, integers beyond 64 bits, and text that is empty or
    holds control characters.
    """
    for name, kind in get_type_hints(type(section)).items():
        _check_value(prefix + name, get_args(kind) or (kind,), getattr(section, name))


def _check_value(name: str, kinds: tuple, value: object) -> None:
    """`check_fields` for one field, whose type is a union of `kinds`."""
    check(value is not None or NoneType in kinds, name, value, "a value")
    check(not isinstance(value, bool) or bool in kinds, name, value, "no true or false")
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(item, float):
            check(math.isfinite(item), name, value, "finite numbers")
        elif isinstance(item, int):
            check(abs(item) < 2**63, name, value, "whole numbers below 2^63")
        elif isinstance(item, str):
            check(item.strip() != "" and not _UNWRITABLE.search(item), name, value, "text without control characters")
