"""Safetensors files of others: their headers are bounded and read before any tensor is."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from selfnpo_fast.runtime.errors import UserError, one_line, shortened
from selfnpo_fast.runtime.files import open_regular
from selfnpo_fast.runtime.limits import MAX_HEADER_BYTES, MAX_NAME_CHARACTERS, MAX_TENSORS

_UNREADABLE = (OSError, SafetensorError, RuntimeError, MemoryError)
"""What safetensors raises; torch raises RuntimeError where a file cannot be mapped into memory."""


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file, and a way to its tensors."""

    path: Path
    """The file."""
    field: str
    """The option that errors name."""
    shapes: dict[str, tuple[int, ...]]
    """The shape of every tensor by name."""
    dtypes: dict[str, str]
    """The dtype of every tensor by name, as safetensors calls it: F32, BF16, F8_E4M3, ..."""
    metadata: dict[str, str]
    """The texts in the header."""

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors of these names on the CPU, copied out of the file, float8 as float32.

        Raises UserError where the file has become unreadable.
        """
        tensors = {}
        try:
            with safe_open(self.path, "pt") as file:
                for name in names:
                    stored = file.get_tensor(name)
                    value = with_arithmetic(stored)
                    tensors[name] = value.clone() if value is stored else value
                    if tuple(tensors[name].shape) != self.shapes[name]:
                        raise SafetensorError(f"{name} has changed its shape")
        except _UNREADABLE as error:
            raise UserError(f"{self.field}: cannot load {self.path}: {one_line(error)}") from error
        return tensors


def with_arithmetic(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a float32 copy of a float8 one, for which most operations do not exist.

    float32 holds all values of float8.
    """
    return tensor.float() if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1 else tensor


def open_tensors(path: str | Path, field: str) -> TensorFile:
    """The header of a safetensors file.

    Raises UserError that names `field` where the file is no regular file, is truncated or no
    safetensors file, or where a count, a name or the header is beyond `runtime.limits`.
    """
    path = Path(path)
    with open_regular(path, field) as file:
        try:
            start = file.read(8)
            size = int.from_bytes(start, "little")
            if start[:4] == b"GGUF":
                raise ValueError("it is a GGUF file, which is quantised; give weights in fp32, bf16 or fp16")
            if len(start) < 8:
                raise ValueError("it is too short for a safetensors file")
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"its header has {size:,} bytes; expected at most {MAX_HEADER_BYTES:,}")
            header = json.loads(file.read(size).decode("utf-8"))
            shapes, dtypes, metadata = _parts(header)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{field}: cannot load {path}: {one_line(error)}") from error
    try:
        with safe_open(path, "pt"):  # checks that the tensors are all there, without gaps
            pass
    except _UNREADABLE as error:
        raise UserError(f"{field}: cannot load {path}: {one_line(error)}") from error
    return TensorFile(path, field, shapes, dtypes, metadata)


def _parts(header: object) -> tuple[dict[str, tuple[int, ...]], dict[str, str], dict[str, str]]:
    """Shapes, dtypes and metadata in a header. Raises ValueError where it is none, or too large."""
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is no table of texts")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"it has {len(header):,} tensors; expected at most {MAX_TENSORS:,}")
    shapes, dtypes = {}, {}
    for name, entry in header.items():
        if len(name) > MAX_NAME_CHARACTERS:
            raise ValueError(f"a name in it has {len(name):,} characters; expected at most {MAX_NAME_CHARACTERS}")
        try:
            shape, dtype = entry["shape"], entry["dtype"]
            if not isinstance(dtype, str) or not all(isinstance(length, int) for length in shape):
                raise TypeError
        except (TypeError, KeyError) as error:
            raise ValueError(f"its entry for {shortened(name)} is no shape and dtype") from error
        shapes[name], dtypes[name] = tuple(shape), dtype
    return shapes, dtypes, metadata


def quantised_as(dtype: str) -> bool:
    """Whether tensors of a dtype in a header are no plain floating point numbers."""
    return dtype not in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def text_object(file: TensorFile, key: str) -> dict | None:
    """The JSON object under `key` in a file's metadata; None without the key. Raises UserError."""
    text = file.metadata.get(key)
    if not text:
        return None
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"its {key} is no JSON object")
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.field}: cannot load {file.path}: {one_line(error)}") from error
