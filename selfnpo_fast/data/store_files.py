"""The files of a latent store, and what is read of them."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from selfnpo_fast.data.listing import summary
from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_fast.runtime.files import read_json
from selfnpo_fast.runtime.folders import MANIFEST, why_not_whole

DATA, PICTURES, RECIPE = "latents.safetensors", "pictures.jsonl", "store.json"
FORMAT = 2
"""Version of the recipe, of the files and of what is read as a picture's pixels.

1 followed no EXIF orientation, clipped 16-bit greys and showed the colours under transparency.
Stores of an older version are refused: their latents may be of other pixels.
"""
HEADER = 4096
"""Bytes before the first latent, a page; it is filled in when the number of latents is known."""


@dataclass(frozen=True)
class Store:
    """The folders and the recipe of a store."""

    folder: Path
    """The whole store."""
    partial: Path
    """The store until it is whole."""
    recipe: dict
    """What determines the latents, as plain values."""

    @property
    def lock(self) -> Path:
        """A file next to the partial store, locked by the run that encodes it."""
        return self.partial.with_suffix(".lock")


def refuse_older(store: Store) -> None:
    """Raise UserError where an older version of the package has encoded this source."""
    same = ("source", "limit", "resolution", "vae_sha256", "seed")
    for path in sorted(store.folder.parent.glob(f"{store.folder.name.rpartition('-')[0]}-*/{RECIPE}")):
        try:
            recipe = dict(read_json(path, "data.store")["recipe"])
            older = recipe["format"] < FORMAT and all(recipe[key] == store.recipe[key] for key in same)
        except (ValueError, TypeError, LookupError):  # no store of ours, or a damaged one, which is not used
            continue
        if older:
            raise UserError(
                f"data.store: {path.parent} was written by an older version, which encoded other pixels (no EXIF "
                "orientation, 16-bit greys clipped, colours under transparency shown); delete it, and its images are "
                "encoded again"
            )


def say_what_is_left_out(store: Store, skip: bool) -> None:
    """Say once which pictures of the source are not in the store.

    Raises UserError where the store lacks some that could not be used, and `skip` does not allow
    that.
    """
    try:
        facts = read_json(store.folder / RECIPE, "data.store")
        line = summary(facts["shape"][0], facts["passed_over"], facts["bad"], facts["more"])
        count, first = facts["bad"]
    except (LookupError, TypeError, ValueError) as error:
        reason = one_line(error)
        raise UserError(f"data.store: cannot read {store.folder}: {reason}; delete it") from error
    if count and not skip:
        raise UserError(
            f"data.on_bad: {store.folder} was encoded without {count:,} that could not be used (the first: {first}); "
            "repair the source, or set data.on_bad to skip"
        )
    if line:
        say_once(f"data: {store.recipe['source']}: {line}")


def captions_and_refusals(folder: Path) -> tuple[list[str], list[str]]:
    """The captions of a store's latents, and why the other pictures could not be used."""
    with (folder / PICTURES).open(encoding="ascii") as lines:
        rows = [json.loads(line) for line in lines]
    return [row[0] for row in rows if len(row) == 5], [row[5] for row in rows if len(row) > 5]


def header(shape: list[int]) -> bytes:
    """The HEADER bytes of a safetensors file before its one tensor, `latents` of `shape` float32."""
    entry = {"latents": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}}
    text = json.dumps(entry).encode().ljust(HEADER - 8)  # safetensors allows spaces at the end
    return len(text).to_bytes(8, "little") + text


def check_store(store: Store) -> None:
    """Raise UserError for a store that is damaged or of another recipe; reads all of it once."""
    folder, stored = store.folder, {}
    reason = why_not_whole(folder)
    try:
        stored = dict(read_json(folder / RECIPE, "data.store")["recipe"])
    except (ValueError, TypeError, LookupError) as error:
        reason = reason or f"{RECIPE} is not readable: {one_line(error)}"
    if reason:
        raise UserError(f"data.store: {folder} is damaged: {reason}; delete it, and its images are encoded again")
    changed = [f"{k} {stored.get(k)!r}, not {value!r}" for k, value in store.recipe.items() if stored.get(k) != value]
    if changed:
        raise UserError(f"data.store: {folder} is of another recipe: {'; '.join(changed)}; delete or rename it")


def fingerprint(latents: torch.Tensor) -> str:
    """The SHA-256, in hexadecimal, of latents (N, ...) float32 in host memory; reads them all.

    A change of any bit, of the order or of the shape changes it. It is the hash of the file that a
    store keeps them in.
    """
    digest = hashlib.sha256(header(list(latents.shape)))
    for latent in latents:
        digest.update(latent.contiguous().numpy())
    return digest.hexdigest()


def map_store(folder: Path, latent_shape: tuple[int, ...]) -> tuple[torch.Tensor, list[str], str]:
    """The latents of a whole store, read page by page as they are used, captions and fingerprint.

    Raises UserError where files and `latent_shape` do not fit together.
    """
    try:
        with safe_open(folder / DATA, "pt") as file:
            latents = file.get_tensor("latents")
        captions, _ = captions_and_refusals(folder)
        if latents.dtype != torch.float32 or latents.shape != (len(captions), *latent_shape):
            raise ValueError(f"it holds {tuple(latents.shape)} {latents.dtype} for {len(captions)} captions")
        stored = str(read_json(folder / MANIFEST, "data.store")[DATA]["sha256"])
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise UserError(f"data.store: cannot read {folder}: {one_line(error)}; delete it") from error
    return latents, captions, stored
