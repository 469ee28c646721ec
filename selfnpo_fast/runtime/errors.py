"""The exceptions that end a command with a single line instead of a traceback."""

from __future__ import annotations

import reprlib


class UserError(ValueError):
    """Bad input. Commands print the message alone and leave with exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on: a full disk, a lost rank, gradients that stay non-finite. Exit code 1."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of any exception on one line, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "..."


def shortened(value: object, limit: int = 80) -> str:
    """`value` as Python would write it, on one line of about `limit` characters at most."""
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = limit
    return short.repr(value)
