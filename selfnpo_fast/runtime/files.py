"""Reading files that somebody else has written: regular files alone, of a bounded size."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_fast.runtime.limits import MAX_HEADER_BYTES, MAX_JSON_BYTES, MAX_NAME_CHARACTERS, MAX_TENSORS


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


def tensor_shapes(path: str | Path, field: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file by name; reads its header only.

    Raises UserError that names `field` where the file is no regular file or no safetensors file,
    and where its tensors are more, or their names longer, than any model's.
    """
    with open_regular(path, field) as file:
        try:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"its header would have {size:,} bytes, more than {MAX_HEADER_BYTES:,}")
            entries = json.loads(file.read(size))
            if not isinstance(entries, dict):
                raise ValueError("its header is no JSON object")
            names = [name for name in entries if name != "__metadata__"]
            if len(names) > MAX_TENSORS:
                raise ValueError(f"it names {len(names):,} tensors, more than {MAX_TENSORS:,}")
            if any(len(name) > MAX_NAME_CHARACTERS for name in names):
                raise ValueError(f"the name of a tensor is longer than {MAX_NAME_CHARACTERS} characters")
            return {name: tuple(int(side) for side in entries[name]["shape"]) for name in names}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{field}: {one_line(path)} is no readable safetensors file: {one_line(error)}") from error
