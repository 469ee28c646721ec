"""Pictures that an evaluation has drawn, kept in its folder until the report is written.

An evaluation that was interrupted, or found the disk full, does not draw them again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import one_line
from selfnpo_fast.runtime.folders import whole_file


class DrawnPictures:
    """Pictures by a key, which has to name all that they were drawn from (`digest`)."""

    def __init__(self, output: Path) -> None:
        """Pictures below the folder `output`; nothing is written yet."""
        self.folder = output / "drawn"

    def get(self, key: str) -> torch.Tensor | None:
        """The pictures (N, 3, H, W) of a key; None where they are not there, or damaged."""
        try:
            return load_file(self.folder / f"{key}.safetensors")["images"]
        except (OSError, SafetensorError, KeyError):
            return None

    def keep(self, key: str, images: torch.Tensor) -> None:
        """Keep pictures (N, 3, H, W); where they cannot be written, one line says so."""
        file = self.folder / f"{key}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as aside:
                save_file({"images": images.cpu().contiguous()}, aside)
        except (OSError, SafetensorError) as error:
            say_once(f"pictures cannot be kept in {self.folder} until the report is written: {one_line(error)}")
            with contextlib.suppress(OSError):  # it holds pictures
                self.folder.rmdir()

    def remove(self) -> None:
        """Delete all pictures that are kept."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __bool__(self) -> bool:
        """Whether any pictures are kept."""
        return any(self.folder.glob("*.safetensors"))


def digest(*contents: object) -> str:
    """16 hexadecimal digits of the SHA-256 of mappings to tensors, dataclasses and plain values."""
    whole = hashlib.sha256()
    for content in contents:
        if dataclasses.is_dataclass(content):
            content = {field.name: getattr(content, field.name) for field in dataclasses.fields(content)}
        for name, value in sorted(content.items()) if isinstance(content, Mapping) else [("", content)]:
            if isinstance(value, torch.Tensor):
                whole.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
                whole.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                whole.update(f"{name} {json.dumps(value, default=repr)}\n".encode())
    return whole.hexdigest()[:16]


def digest_of(negative: Negative) -> str:
    """The digest of a negative model's weights."""
    if negative.network is not None:
        return digest(negative.network.state_dict())
    assert negative.deltas is not None
    layers = sorted(negative.deltas)
    return digest(layers, *(negative.deltas[layer] for layer in layers))
