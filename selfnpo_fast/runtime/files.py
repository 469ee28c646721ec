"""Reading files that somebody else has written: regular files alone, of a bounded size."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_fast.runtime.limits import MAX_JSON_BYTES


def open_regular(path: str | Path, field: str) -> IO[bytes]:
    """The file at `path`, opened for reading in binary.

    Symbolic links are followed. Raises UserError that names `field` for what is no regular file: a
    pipe would be waited for and a device may never end.
    """
    try:
        # Without O_NONBLOCK the opening of a pipe waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a NUL or a surrogate in the path
        raise UserError(f"{field}: {one_line(error)}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{field}: {one_line(path)} is no regular file; name a file, not a folder, pipe or device")
    return os.fdopen(descriptor, "rb")


def read_text(path: str | Path, field: str, most_bytes: int = MAX_JSON_BYTES) -> str:
    """The UTF-8 text of a regular file of at most `most_bytes`.

    Raises UserError that names `field` where the file cannot be read, is larger or is no UTF-8.
    """
    with open_regular(path, field) as file:
        try:
            raw = file.read(most_bytes + 1)
        except OSError as error:
            raise UserError(f"{field}: {one_line(error)}") from error
    if len(raw) > most_bytes:
        raise UserError(f"{field}: {one_line(path)} is larger than {most_bytes:,} bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{field}: {one_line(path)} is not UTF-8 text: {one_line(error)}") from error


def read_json(path: str | Path, field: str, most_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value of a JSON file. Raises UserError as `read_text` does, and for invalid JSON."""
    try:
        return json.loads(read_text(path, field, most_bytes))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested too deeply
        raise UserError(f"{field}: {one_line(path)} is no valid JSON: {one_line(error)}") from error
