"""The exceptions that end a command with one line, and the shortening of values for that line."""

from __future__ import annotations

import reprlib


class UserError(ValueError):
    """Bad input. A command prints only the message and leaves with exit code 2."""

    of_one_rank = False
    """Whether other ranks may know nothing of the error, so that this one has to print it."""


class RunError(RuntimeError):
    """A run that cannot go on, with exit code 1.

    Causes are a full disk, a lost rank or gradients that stay non-finite.
    """

    of_one_rank = False
    """As for UserError."""


class NotFiniteError(RunError):
    """Values to be written hold NaN or infinity. Nothing has been written."""


def one_line(value: object, limit: int = 300) -> str:
    """The text of `value`, mostly an exception, on one line and cut after `limit` characters.

    An exception without a message gives the name of its class.
    """
    text = " ".join(str(value).split()) or type(value).__name__
    return text if len(text) <= limit else text[:limit] + "..."


def shortened(value: object, limit: int = 80) -> str:
    """`value` as Python would write it, on one line of about `limit` characters at most."""
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = limit
    return short.repr(value)
