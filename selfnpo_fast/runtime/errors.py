"""The exceptions that end a command with a single line instead of a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. Commands print the message alone and leave with exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on: a full disk, a lost rank, gradients that stay non-finite. Exit code 1."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of any exception on one line, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "..."
