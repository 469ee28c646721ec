"""Where a model's files are: a run's output, a diffusers folder, a Hub repository or one file.

A folder and a repository look alike to this module: a list of file names, and a function that
fetches one of the files. No pickle is read.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfnpo_fast.models import denoiser_names as known_denoisers
from selfnpo_fast.models import resolve_path
from selfnpo_fast.negatives.formats import is_adapter
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError, one_line, shortened
from selfnpo_fast.runtime.files import read_json
from selfnpo_fast.runtime.hub import open_repository
from selfnpo_fast.runtime.limits import MAX_FOLDER_ENTRIES
from selfnpo_fast.runtime.tensor_files import open_tensors

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
"""PEFT writes this file next to PEFT_FILE; it holds alpha."""
WEIGHTS = "diffusion_pytorch_model"
RECORD = "selfnpo.json"
"""A file next to the folder of a negative of full weights, or in it where it is one of two experts:
the record of its base (`fingerprint.base_record`)."""
SCHEDULER = "scheduler/scheduler_config.json"
"""A pipeline's file that says which noise levels and which prediction type its denoiser is for."""
PICKLED = (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth")

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)((?:/[^/]+)*)")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model, all of them on this machine."""

    name: str
    """The source as the user wrote it, for messages."""
    files: tuple[Path, ...]
    """One safetensors file, or all shards."""
    is_lora: bool
    """True for a low-rank update, False for full weights."""
    config: dict | None = None
    """The denoiser's config.json; None where no such file lies with the weights."""
    record: dict | None = None
    """The content of RECORD; None where there is no such file."""
    scheduler: dict | None = None
    """The content of SCHEDULER next to the denoiser; None where there is no such file."""


@dataclass(frozen=True)
class _Listing:
    """The files of a folder on this machine or on the Hub."""

    name: str
    """The folder as the user wrote it, for messages."""
    field: str
    """The option that errors name."""
    files: frozenset[str]
    """File names relative to the folder."""
    fetch: Callable[[str], Path]
    """The path on this machine of one of the files, which is downloaded where needed."""

    def error(self, message: str) -> UserError:
        """An error to raise, whose line starts with the field."""
        return UserError(f"{self.field}: {message}")

    def json(self, name: str) -> dict:
        """The JSON object in one file. Raises UserError where it is none."""
        return read_object(self.fetch(name), self.name, self.field)

    def object(self, name: str) -> dict | None:
        """The JSON object in one file; None where there is no such file. Raises like `json`."""
        return self.json(name) if name in self.files else None


def read_object(path: Path, name: str, field: str) -> dict:
    """The JSON object in a file. Raises UserError that names `field`, the file and its source."""
    values = read_json(path, f"{field}: cannot load {path.name} from {name}")
    if not isinstance(values, dict):
        raise UserError(
            f"{field}: cannot load {path.name} from {name}: expected a JSON object, not {type(values).__name__}"
        )
    return values


def locate(
    source: str | Path,
    denoiser_names: Sequence[str],
    field: str = "negative",
    revision: str | None = None,
    variant: str | None = None,
) -> ModelFiles:
    """Find a model's files; where the source is a Hub id, download those that are needed.

    `denoiser_names` are the folders in which a pipeline may keep its denoiser. `revision` and
    `variant` are those of the Hub and of diffusers.

    Raises UserError, one line that starts with `field`, where the source does not exist, holds no
    model, or holds only pickles.
    """
    name = str(source)
    path = os.path.expanduser(resolve_path(name))
    refuse_pickle(path, field)
    if os.path.isdir(path):  # Path.is_dir raises for very long names
        return _choose(_folder(name, Path(path), denoiser_names, field), denoiser_names, variant)
    if os.path.exists(path):
        return _file(name, Path(path), field, denoiser_names)
    hub_id = _HUB_ID.fullmatch(name)
    if not hub_id or name.startswith((".", "~")):
        raise UserError(
            f"{field}: no such folder or file: {one_line(name)}; give a run's output folder, a diffusers folder, a "
            ".safetensors file or a Hub id"
        )
    repository, subfolder = hub_id[1], hub_id[2].strip("/")
    if subfolder.endswith(".safetensors"):
        listing = _repository(repository, "", field, revision)
        if subfolder not in listing.files:
            raise listing.error(f"{repository} on the Hub has no file {subfolder}")
        return _file(name, listing.fetch(subfolder), field, denoiser_names)
    return _choose(_repository(repository, subfolder, field, revision), denoiser_names, variant)


def parts_of_source(source: str, names: Sequence[str], field: str, revision: str | None = None) -> dict[str, str]:
    """The sub-folders `names` of a folder or a Hub id that hold a model each, by their names, at the
    top or in the folder `negative`; nothing for a file.

    Raises UserError that begins with `field` where a folder or a repository cannot be read.
    """
    path = os.path.expanduser(source)
    hub_id = None if os.path.exists(path) or source.startswith((".", "~")) else _HUB_ID.fullmatch(source)
    if os.path.isdir(path):
        listing = _folder(source, Path(path), names, field)
    elif hub_id and not hub_id[2].endswith(".safetensors"):
        listing = _repository(hub_id[1], hub_id[2].strip("/"), field, revision)
    else:
        return {}
    for part in ("", "negative/"):
        found = {
            name: f"{source.rstrip('/')}/{part}{name}"
            for name in names
            if any(f"{part}{name}/{file}" in listing.files for file in ("config.json", LORA_FILE, PEFT_FILE))
        }
        if found:
            return found
    return {}


def refuse_pickle(path: str | Path, field: str) -> None:
    """Raise UserError where the file's name is that of a pickle or of quantised weights; reads
    nothing."""
    name = str(path).lower()
    if name.endswith(PICKLED):
        raise UserError(
            f"{field}: cannot load {path}: it is a pickle, which may run code when it is read; give a .safetensors file"
        )
    if name.endswith(".gguf"):
        raise UserError(
            f"{field}: cannot load {path}: it is a GGUF file, which is quantised; give weights in fp32, bf16 or fp16"
        )


def _folder(name: str, folder: Path, denoiser_names: Sequence[str], field: str) -> _Listing:
    """The files of a folder on this machine that may belong to a model."""
    parts = ["", "negative", "scheduler", "negative/scheduler"]
    parts += [f"{part}{denoiser}" for part in ("", "negative/") for denoiser in denoiser_names]
    files = {file for part in parts for file in _entries(folder, part, name, field)}
    if folder.name in (*denoiser_names, *known_denoisers()):  # the files next to a pipeline's denoiser
        for file in (RECORD, SCHEDULER):
            if os.path.isfile(folder.parent / file):
                files.add(f"../{file}")
    return _Listing(name, field, frozenset(files), lambda file: folder / file)


def _entries(folder: Path, part: str, name: str, field: str) -> list[str]:
    """The regular files in one part of a folder that a model may consist of, relative to the
    folder.

    Raises UserError where the part cannot be read or has more than MAX_FOLDER_ENTRIES entries.
    """
    found = []
    try:
        if not os.path.isdir(folder / part):
            return []
        with os.scandir(folder / part) as entries:
            for i, entry in enumerate(entries):
                if i >= MAX_FOLDER_ENTRIES:
                    raise UserError(
                        f"{field}: {name} has more than {MAX_FOLDER_ENTRIES:,} entries in {part or 'it'}; name the "
                        "folder or file of the model itself"
                    )
                wanted = entry.name.lower().endswith((".safetensors", ".json", ".gguf", *PICKLED))
                if wanted and os.path.isfile(entry.path):  # false for a link that leads nowhere
                    found.append(f"{part}/{entry.name}".lstrip("/"))
    except (OSError, ValueError) as error:
        raise UserError(f"{field}: cannot load {name}: {one_line(error)}") from error
    return found


def _repository(repository: str, subfolder: str, field: str, revision: str | None) -> _Listing:
    """A Hub repository or one folder of it; without network, the files downloaded before."""
    name = f"{repository}/{subfolder}".rstrip("/")
    found = open_repository(repository, revision, field, f"no such folder or file: {name}, and it")

    def fetch(file: str) -> Path:
        """Download one file of the folder. Raises UserError."""
        return found.download(posixpath.normpath(f"{subfolder}/{file}".lstrip("/")))

    prefix = f"{subfolder}/" if subfolder else ""
    inside = {file.removeprefix(prefix) for file in found.files if file.startswith(prefix)}
    beside = {file: posixpath.normpath(f"{subfolder}/../{file}") for file in (RECORD, SCHEDULER)}
    inside |= {f"../{file}" for file, path in beside.items() if subfolder and path in found.files}
    return _Listing(name, field, frozenset(inside), fetch)


def _choose(listing: _Listing, denoiser_names: Sequence[str], variant: str | None) -> ModelFiles:
    """The model in a listing. Raises UserError where there is none.

    Looks for a pipeline's denoiser or a LoRA, at the top and then in the folder `negative`; then
    for a denoiser at the top; then for a single safetensors file.
    """
    for part in ("", "negative/"):
        for denoiser in denoiser_names:
            if f"{part}{denoiser}/config.json" in listing.files:
                return _full(listing, f"{part}{denoiser}/", variant, part)
        for file in (LORA_FILE, PEFT_FILE):
            if part + file in listing.files:
                if part + PEFT_CONFIG in listing.files:
                    listing.fetch(part + PEFT_CONFIG)  # lora_files looks for it next to the weights
                return ModelFiles(listing.name, (listing.fetch(part + file),), is_lora=True)
    if "config.json" in listing.files and any(name.startswith(WEIGHTS) for name in listing.files):
        return _full(listing, "", variant, "../")
    top_level = sorted(name for name in listing.files if "/" not in name and name.endswith(".safetensors"))
    if len(top_level) == 1:
        return _file(listing.name, listing.fetch(top_level[0]), listing.field, denoiser_names)
    hint = ""
    if top_level:
        shown = ", ".join(shortened(name) for name in top_level[:5])
        hint = f"; it has {len(top_level)} safetensors files, of which one is to be named: {shown}"
        hint += ", ..." if len(top_level) > 5 else ""
    others = sorted(name for name in listing.files if name.lower().endswith((".gguf", *PICKLED)))
    if others and not hint:
        kind = (
            "quantised, which is not supported"
            if others[0].lower().endswith(".gguf")
            else "a pickle, which is not read"
        )
        hint = f"; {shortened(others[0])} is {kind}"
    raise listing.error(f"{listing.name} holds neither {denoiser_names[0]}/config.json nor {LORA_FILE}{hint}")


def _full(listing: _Listing, part: str, variant: str | None, beside: str) -> ModelFiles:
    """Full weights in the folder `part`, which is empty or ends in a slash: one file, or shards.

    `beside` is the folder that holds the record and the scheduler's folder, written likewise.

    Raises UserError where the variant or a shard is missing, or the index names other files than
    safetensors.
    """
    # Find one entry file, weights or the index of shards, for each variant.
    pattern = re.compile(re.escape(part + WEIGHTS) + r"(?:\.(\w+))?\.safetensors(?:\.index(?:\.(\w+))?\.json)?")
    file_of_variant: dict[str | None, str] = {}
    for name in sorted(listing.files):
        match = pattern.fullmatch(name)
        if match:
            file_of_variant[match[1] or match[2]] = name
    label = part.rstrip("/") or WEIGHTS
    # Where no variant is asked for, a single variant will do.
    if variant is None and None not in file_of_variant and len(file_of_variant) == 1:
        variant = next(iter(file_of_variant))
        logger.warning("%s holds only the %s variant: it is used", listing.name, variant)
    if variant not in file_of_variant:
        pickled = any(name.startswith(part + WEIGHTS) and name.endswith(PICKLED) for name in listing.files)
        shown = ", ".join(sorted(str(key) for key in file_of_variant)) or ("only pickles" if pickled else "none")
        raise listing.error(
            f"cannot load {label} from {listing.name}: no {WEIGHTS}{f'.{variant}' if variant else ''}.safetensors "
            f"(there is: {shown})"
        )
    config = listing.json(f"{part}config.json")
    # One of two experts has a record of its own.
    record = listing.object(part + RECORD) or listing.object(beside + RECORD)
    facts = {"record": record, "scheduler": listing.object(beside + SCHEDULER)}
    entry = file_of_variant[variant]
    if not entry.endswith(".json"):
        return ModelFiles(listing.name, (listing.fetch(entry),), False, config, **facts)
    # Follow the index to its shards, none of which may lie elsewhere or be a pickle.
    weight_map = listing.json(entry).get("weight_map")
    shards = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not shards or not all(name.endswith(".safetensors") and "/" not in name for name in shards):
        raise listing.error(f"cannot load {label} from {listing.name}: {entry} names files that are not safetensors")
    missing = [name for name in shards if part + name not in listing.files]
    if missing:
        raise listing.error(f"cannot load {label} from {listing.name}: {missing[0]} is missing")
    return ModelFiles(listing.name, tuple(listing.fetch(part + name) for name in shards), False, config, **facts)


def _file(name: str, path: Path, field: str, denoiser_names: Sequence[str]) -> ModelFiles:
    """A single safetensors file, whose keys tell a LoRA from full weights.

    The record and the scheduler's config count where the file lies in a pipeline's denoiser.
    """
    is_lora = any(is_adapter(key) for key in open_tensors(path, field).shapes)
    if is_lora or path.parent.name not in (*denoiser_names, *known_denoisers()):
        return ModelFiles(name, (path,), is_lora)
    beside = path.parent.parent
    own, record, scheduler = (
        read_object(file, name, field) if os.path.isfile(file) else None
        for file in (path.parent / RECORD, beside / RECORD, beside / SCHEDULER)
    )
    return ModelFiles(name, (path,), is_lora, record=own or record, scheduler=scheduler)
