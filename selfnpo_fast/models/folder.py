"""A pipeline's files, in a folder on this machine or in a repository on the Hub.

Both look alike to what loads them: every file that is read lies on this machine first, and the same
checks hold for it wherever it came from. No pickle is chosen.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfnpo_fast.runtime import hub
from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import RunError, UserError, one_line, shortened
from selfnpo_fast.runtime.files import open_regular, read_json
from selfnpo_fast.runtime.limits import MAX_JSON_BYTES
from selfnpo_fast.runtime.tensor_files import open_tensors

TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja")
"""What a tokenizer's files end in."""
DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS = "diffusion_pytorch_model", "model"
"""How the names of weights begin in folders of the two libraries."""


@contextmanager
def loading(path: str, part: str, field: str = "model.path") -> Iterator[None]:
    """Turn what a loader throws over a broken file into one line."""
    try:
        yield
    except (UserError, RunError):  # also a run that was asked to stop
        raise
    except Exception as error:  # a truncated file surfaces as any of a dozen types; the cause is chained
        raise UserError(f"{field}: cannot load {part} from {path}: {one_line(error)}") from error


@dataclass(frozen=True)
class Weights:
    """The safetensors files of one part."""

    folder: Path
    """The pipeline's folder on this machine."""
    variant: str | None
    """diffusers' name of this set of files, such as fp16."""
    files: tuple[Path, ...]
    """One file, or all shards."""
    shapes: dict[str, tuple[int, ...]]
    """Of all tensors, by name."""


@dataclass(frozen=True)
class ModelFolder:
    """The files of a pipeline, at the top and in the folders of its parts."""

    path: str
    """The folder or Hub id as the user wrote it, for messages."""
    files: frozenset[str]
    """Names relative to the pipeline's folder; what is no folder counts as a file."""
    download: Callable[[str], Path]
    """The path on this machine of one of the files."""
    commit: str | None = None
    """The commit that a Hub repository's files are of; None for a folder."""
    field: str = "model.path"
    """The option that errors name."""

    def fetch(self, name: str) -> Path:
        """The path on this machine of a regular file.

        Raises UserError where there is no such file, or it is a pipe or a device.
        """
        if name not in self.files:
            raise UserError(f"{self.field}: cannot load {name} from {self.path}: there is no such file")
        path = self.download(name)
        open_regular(path, self.field).close()
        return path

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file. Raises UserError where it is none."""
        path = self.fetch(name)
        with loading(self.path, name, self.field):
            values = read_json(path, self.field)
            if not isinstance(values, dict):
                raise ValueError(f"expected a JSON object, not {shortened(values, 40)}")
            return values

    def texts(self, part: str) -> Path:
        """The folder of a part that consists of texts, as tokenizers do.

        Raises UserError where one of them is no regular file or too large.
        """
        names = sorted(name for name in self.files if name.startswith(f"{part}/") and name.endswith(TEXT_SUFFIXES))
        if not names:
            raise UserError(
                f"{self.field}: {self.path} has no {part} (no file in the folder {part}); give a pipeline with all of "
                "its parts"
            )
        paths = [self.fetch(name) for name in names]
        for path in paths:
            if path.stat().st_size > MAX_JSON_BYTES:
                raise UserError(f"{self.field}: {path} is larger than {MAX_JSON_BYTES:,} bytes")
        return paths[0].parent

    def check_weights(self, part: str, stem: str, variant: str | None) -> None:
        """UserError where `weights` would find none, or files whose headers are damaged.

        Of a repository, whose files may not be here yet, the names alone are looked at.
        """
        if self.commit is None:
            self.weights(part, stem, variant)
        else:
            self._variant(part, self._entries(part, stem), variant)

    def weights(self, part: str, stem: str, variant: str | None) -> Weights:
        """The weights of a part, whose files' names begin with `stem`, in a variant.

        As in diffusers, `variant` holds for the parts that have it, and the others' plain weights
        are taken. Where no variant is asked for and a part has a single one, that is taken. Both
        are said once. Raises UserError where there are no weights to take, where no part has the
        variant, and where the list of shards names other files than safetensors.
        """
        entries = self._entries(part, stem)
        chosen = self._variant(part, entries, variant)
        entry = entries[chosen]
        names = self._shards(part, entry) if entry.endswith(".json") else [entry]
        files = tuple(self.fetch(name) for name in names)
        shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            shapes |= open_tensors(file, f"{self.field}: cannot load {_words(part)}").shapes
        return Weights(files[0].parent.parent, chosen, files, shapes)

    def _entries(self, part: str, stem: str) -> dict[str | None, str]:
        """The file to begin with, of each variant of a part's weights: one file, or the list of
        shards, which goes before it."""
        pattern = re.compile(
            rf"{re.escape(part)}/{stem}"
            r"(?:\.(?P<file>\w+))?\.safetensors(?P<index>(?:\.(?P<older>\w+))?\.index(?:\.(?P<shards>\w+))?\.json)?"
        )
        entries: dict[str | None, str] = {}
        for name in sorted(self.files):  # FILE.safetensors comes before FILE.safetensors.index.json
            if match := pattern.fullmatch(name):
                entries[match["file"] or match["older"] or match["shards"]] = name
        return entries

    def _variant(self, part: str, entries: dict[str | None, str], variant: str | None) -> str | None:
        """Which of the variants in `entries` to take. Raises UserError where there is none."""
        if variant in entries:
            return variant
        shown = ", ".join(sorted(str(name or "plain weights") for name in entries)) or "none"
        if variant is None and len(entries) == 1:
            only = next(iter(entries))
            say_once(f"{self.path}: its {_words(part)} has only the {only} variant of weights, which is taken")
            return only
        if variant is not None and None in entries:
            parts = {name.partition("/")[0] for name in self.files if "/" in name}
            stems = (DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS)
            if any(variant in self._entries(other, stem) for other in parts for stem in stems):
                say_once(f"{self.path}: its {_words(part)} has no {variant} variant; its plain weights are taken")
                return None
        what = f"is no {variant} variant" if variant else "are no safetensors weights"
        raise UserError(
            f"{self.field}: cannot load {_words(part)} from {self.path}: there {what} (there is: {shown}); "
            f"{'name a variant in model.variant' if entries else 'pickled weights are not read'}"
        )

    def _shards(self, part: str, entry: str) -> list[str]:
        """The names of the files that a list of shards names. Raises UserError for any that is no
        safetensors file of the same folder."""
        weight_map = self.json(entry).get("weight_map")
        names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
        if not names or not all(name.endswith(".safetensors") and "/" not in name for name in names):
            raise UserError(
                f"{self.field}: cannot load {_words(part)} from {self.path}: {entry} names files that are not "
                "safetensors of its folder"
            )
        return [f"{part}/{name}" for name in sorted(names)]


def _words(part: str) -> str:
    """The name of a part as words."""
    return part.replace("_", " ")


def open_folder(path: str, name: str) -> ModelFolder:
    """The pipeline in a folder on this machine, which messages call `name`. Raises UserError."""
    files: set[str] = set()
    try:
        with os.scandir(path) as entries:
            for entry in list(entries):
                if not entry.is_dir():
                    files.add(entry.name)
                    continue
                with suppress(OSError), os.scandir(entry.path) as below:  # `lost+found` may not be read
                    files |= {f"{entry.name}/{file.name}" for file in below if not file.is_dir()}
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"model.path: cannot read {name}: {one_line(error)}") from error
    return ModelFolder(name, frozenset(files), lambda file: Path(path) / file)


def open_repository(repository: str, revision: str | None) -> ModelFolder:
    """The pipeline in a repository of the Hub, at the commit that `revision` names now.

    Without network, the files that were downloaded before. Raises UserError where there are none.
    """
    found = hub.open_repository(repository, revision, "model.path")
    return ModelFolder(repository, found.files, found.download, found.commit)
