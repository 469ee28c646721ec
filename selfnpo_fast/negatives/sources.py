"""Where a model's files are: a training run, a diffusers folder, a Hub repository or one safetensors file.

A folder and a repository are the same thing here, a list of file names and a way to get one of them. No pickle is read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from selfnpo_fast.models import resolve_path
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError, one_line

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
WEIGHTS = "diffusion_pytorch_model"
RECORD = "selfnpo.json"
"""Beside a negative of full weights: the base that it was trained from (`guidance.fingerprint`)."""
PICKLED = (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth")

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)((?:/[^/]+)*)")
_ADAPTER = re.compile(r"lora|hada_|lokr_|oft_|dora_scale|\.diff(_b)?$|\.glora|\.ia3|vera_")
"""Keys that a file of full weights never has."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model, all of them on this machine."""

    name: str
    """As the user gave it, for messages."""
    files: tuple[Path, ...]
    """safetensors files: one, or the shards."""
    is_lora: bool
    """A low-rank update rather than full weights; of full weights `config` says the architecture, if it is known."""
    config: dict | None = None
    record: dict | None = None
    """What `selfnpo.json` says."""


@dataclass(frozen=True)
class _Listing:
    """A folder, here or on the Hub: its files' names, relative to it, and how to have one of them."""

    name: str
    field: str
    files: frozenset[str]
    fetch: Callable[[str], Path]

    def refuse(self, why: str) -> UserError:
        """The error to raise."""
        return UserError(f"{self.field}: {why}")

    def json(self, name: str) -> dict:
        """The JSON object in one file."""
        return read_json(self.fetch(name), self.name, self.field)


def read_json(path: Path, name: str, field: str) -> dict:
    """The JSON object in a file. Raises UserError that names `field`, the source's `name` and the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, not {type(values).__name__}")
        return values
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{field}: cannot load {path.name} from {name}: {one_line(error)}") from error


def locate(
    source: str | Path,
    denoiser_names: Sequence[str],
    field: str = "negative",
    revision: str | None = None,
    variant: str | None = None,
) -> ModelFiles:
    """Find a model's files, and download those that are needed where the source is a Hub id.

    `denoiser_names` are the folders that a pipeline may keep its denoiser in.

    Raises UserError, one line that starts with `field`, where there is nothing, or nothing that may be read.
    """
    name = str(source)
    path = os.path.expanduser(resolve_path(name))
    refuse_pickle(path, field)
    if os.path.isdir(path):  # which, unlike Path.is_dir, takes names of any length
        return _choose(_folder(name, Path(path), denoiser_names, field), denoiser_names, variant)
    if os.path.isfile(path):
        return _file(name, Path(path), field)
    hub_id = _HUB_ID.fullmatch(name)
    if not hub_id or name.startswith((".", "~")):
        raise UserError(
            f"{field}: no such folder or file: {name}; give a run's output folder, a diffusers folder, a .safetensors "
            "file or a Hub id"
        )
    repository, inside = hub_id[1], hub_id[2].strip("/")
    if inside.endswith(".safetensors"):
        listing = _repository(repository, "", field, revision)
        if inside not in listing.files:
            raise listing.refuse(f"{repository} on the Hub has no file {inside}")
        return _file(name, listing.fetch(inside), field)
    return _choose(_repository(repository, inside, field, revision), denoiser_names, variant)


def refuse_pickle(path: str | Path, field: str) -> None:
    """UserError where the file's name says that it is a pickle; reads nothing."""
    if str(path).lower().endswith(PICKLED):
        raise UserError(
            f"{field}: cannot load {path}: it is a pickle, which may run code when it is read; give a .safetensors file"
        )


def _folder(name: str, folder: Path, denoiser_names: Sequence[str], field: str) -> _Listing:
    files: set[str] = set()
    for part in ("", "negative", *denoiser_names, *(f"negative/{denoiser}" for denoiser in denoiser_names)):
        try:
            inside = list((folder / part).iterdir()) if (folder / part).is_dir() else []
        except OSError as error:
            raise UserError(f"{field}: cannot load {name}: {one_line(error)}") from error
        files |= {f"{part}/{path.name}".lstrip("/") for path in inside if path.is_file()}
    return _Listing(name, field, frozenset(files), lambda file: folder / file)


def _repository(repository: str, inside: str, field: str, revision: str | None) -> _Listing:
    """A Hub repository, or the folder `inside` of it; without the network, what was downloaded before."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    name = f"{repository}/{inside}".rstrip("/")
    try:
        try:
            found = HfApi().list_repo_files(repository, revision=revision)
        except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception:  # offline, a timeout, a proxy: each library below has its own
            root = Path(snapshot_download(repository, revision=revision, local_files_only=True))
            logger.warning("%s: the Hub was not reached; what was downloaded before is used", name)
            found = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    except Exception as error:
        raise UserError(
            f"{field}: no such folder or file: {name}, and it was not found on the Hub: {one_line(error, 200)}"
        ) from error

    def fetch(file: str) -> Path:
        try:
            return Path(hf_hub_download(repository, f"{inside}/{file}".lstrip("/"), revision=revision))
        except Exception as error:  # a lost connection surfaces as any of a dozen types
            raise UserError(f"{field}: cannot download {file} of {name}: {one_line(error, 200)}") from error

    prefix = f"{inside}/" if inside else ""
    return _Listing(name, field, frozenset(f.removeprefix(prefix) for f in found if f.startswith(prefix)), fetch)


def _choose(listing: _Listing, denoiser_names: Sequence[str], variant: str | None) -> ModelFiles:
    """A pipeline's denoiser or a LoRA, directly in the listing or in its `negative` part; or a denoiser alone."""
    for part in ("", "negative/"):
        record = listing.json(f"{part}{RECORD}") if f"{part}{RECORD}" in listing.files else None
        for denoiser in denoiser_names:
            if f"{part}{denoiser}/config.json" in listing.files:
                return _full(listing, f"{part}{denoiser}/", variant, record)
        for file in (LORA_FILE, PEFT_FILE):
            if part + file in listing.files:
                if f"{part}adapter_config.json" in listing.files:
                    listing.fetch(f"{part}adapter_config.json")  # PEFT's: lora_files looks for it beside the weights
                return ModelFiles(listing.name, (listing.fetch(part + file),), is_lora=True)
    if "config.json" in listing.files and any(name.startswith(WEIGHTS) for name in listing.files):
        return _full(listing, "", variant, None)
    alone = [name for name in listing.files if "/" not in name and name.endswith(".safetensors")]
    if len(alone) == 1:
        return _file(listing.name, listing.fetch(alone[0]), listing.field)
    pickled = sorted(name for name in listing.files if name.lower().endswith(PICKLED))
    hint = f"; {pickled[0]} is a pickle, which is not read" if pickled else ""
    raise listing.refuse(f"{listing.name} holds neither {denoiser_names[0]}/config.json nor {LORA_FILE}{hint}")


def _full(listing: _Listing, part: str, variant: str | None, record: dict | None) -> ModelFiles:
    """Full weights in the folder `part` ("" or the denoiser's, with a slash): one file, or an index and its shards."""
    pattern = re.compile(re.escape(part + WEIGHTS) + r"(?:\.(\w+))?\.safetensors(?:\.index(?:\.(\w+))?\.json)?")
    found: dict[str | None, str] = {}
    for name in sorted(listing.files):
        match = pattern.fullmatch(name)
        if match:
            found[match[1] or match[2]] = name
    label = part.rstrip("/") or WEIGHTS
    if variant is None and None not in found and len(found) == 1:
        variant = next(iter(found))
        logger.warning("%s holds the %s variant alone: it is used", listing.name, variant)
    if variant not in found:
        pickled = any(name.startswith(part + WEIGHTS) and name.endswith(PICKLED) for name in listing.files)
        shown = ", ".join(sorted(str(key) for key in found)) or ("only pickles" if pickled else "none")
        raise listing.refuse(
            f"cannot load {label} from {listing.name}: no {WEIGHTS}{f'.{variant}' if variant else ''}.safetensors "
            f"(there is: {shown})"
        )
    config = listing.json(f"{part}config.json")
    chosen = found[variant]
    if not chosen.endswith(".json"):
        return ModelFiles(listing.name, (listing.fetch(chosen),), False, config, record)
    named = listing.json(chosen).get("weight_map")
    shards = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
    if not shards or not all(name.endswith(".safetensors") and "/" not in name for name in shards):
        raise listing.refuse(f"cannot load {label} from {listing.name}: {chosen} names files that are not safetensors")
    missing = [name for name in shards if part + name not in listing.files]
    if missing:
        raise listing.refuse(f"cannot load {label} from {listing.name}: {missing[0]} is missing")
    return ModelFiles(listing.name, tuple(listing.fetch(part + name) for name in shards), False, config, record)


def _file(name: str, path: Path, field: str) -> ModelFiles:
    return ModelFiles(name, (path,), is_lora=any(_ADAPTER.search(key) for key in open_safetensors(path, field)))


def open_safetensors(path: Path, field: str) -> list[str]:
    """The names of a file's tensors; UserError where it is no whole safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{field}: cannot load {path}: {one_line(error)}") from error
