"""Streams that cannot be written."""

from __future__ import annotations

import io
import os


def broken_descriptor() -> int:
    """The end for writing of a pipe whose reader has gone away."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def broken_stream(kind: str) -> io.TextIOWrapper:
    """A text stream: "no reader", "full disk" or "closed"."""
    if kind == "full disk":
        return open("/dev/full", "w", buffering=1)
    stream = os.fdopen(broken_descriptor(), "w", buffering=1)
    if kind == "closed":
        stream.close()
    return stream
