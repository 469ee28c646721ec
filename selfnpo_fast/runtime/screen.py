"""Output on a screen that may fail: nothing that is printed may cost the work that is done.

A reader of a pipe goes away, a terminal is closed, or the disk of a log is full. The stream is then
switched off, and the command goes on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

_JOINERS = "\u200c\u200d"
"""What Persian, Hindi and emojis are written with."""


class Screen:
    """A text stream whose writes never raise: the first that fails switches the stream off."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.error: OSError | None = None
        """What has switched the stream off."""
        self._off = False

    def write(self, text: str) -> int:
        """Write `text`; characters that the stream cannot encode are escaped."""
        if not self._off:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding
                self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:
                self._switch_off(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        if not self._off:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._switch_off(error)

    def _switch_off(self, error: OSError | ValueError) -> None:
        """Print nothing more: neither this object, nor the interpreter when it ends."""
        self._off = True
        if isinstance(error, OSError):
            self.error = error
        with contextlib.suppress(OSError, ValueError, AttributeError):
            # What the stream still holds is flushed at exit, into nothing.
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.stream.fileno())
            os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def safe(stream: Any) -> Any:
    """`stream` as a Screen; a Screen is returned as it is, and None, as under `>&-`, too."""
    return stream if stream is None or isinstance(stream, Screen) else Screen(stream)


@contextlib.contextmanager
def safe_screen() -> Iterator[None]:
    """Makes `sys.stdout` and `sys.stderr` Screens inside it, and flushes them at its end."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = safe(sys.stdout), safe(sys.stderr)
    try:
        yield
    finally:
        flush()
        sys.stdout, sys.stderr = before


def flush() -> OSError | None:
    """Flush standard output and standard error, which are Screens.

    Returns why standard output could not be written. A reader that has gone away is no reason.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    error = getattr(sys.stdout, "error", None)
    return None if error is None or error.errno == errno.EPIPE else error


def progress_bar(total: int, unit: str, *, initial: int = 0, disable: bool = False) -> tqdm:
    """The progress bar of all commands, on standard error; where that fails, work goes on."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        unit=unit,
        initial=initial,
        dynamic_ncols=True,
        file=safe(sys.stderr),
        disable=disable or sys.stderr is None,
    )


def printable(text: str, keep: str = "") -> str:
    """`text` with escapes for what is no visible character, but for those of `keep`.

    Names from files may hold the escape sequences of terminals, line breaks, and characters that
    turn the direction of writing.
    """
    if text.isprintable():
        return text
    return "".join(c if _visible(c) or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def _visible(character: str) -> bool:
    """Whether a character may be printed as it is; spaces of all widths may."""
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"


def show(result: object) -> None:
    """Print a command's result: lines, in which what is not visible is escaped."""
    print(printable(str(result), keep="\n\t"))
