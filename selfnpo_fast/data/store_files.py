"""Stores: folders of rows that are computed once and mapped into memory by later runs.

A store is encoded in a folder of its own, aside, under a lock. `data.latent_store` and
`data.text_store` say what their stores hold; their files and how they are claimed, checked and
damaged are told here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from selfnpo_fast.data.listing import summary
from selfnpo_fast.runtime.console import logger, say_once
from selfnpo_fast.runtime.errors import RunError, UserError, one_line
from selfnpo_fast.runtime.files import read_json
from selfnpo_fast.runtime.folders import MANIFEST, finish_aside, why_not_whole, write_manifest
from selfnpo_fast.runtime.locks import hold, holder
from selfnpo_fast.runtime.stopping import check_stop
from selfnpo_fast.runtime.world import World

DATA, PICTURES, RECIPE = "latents.safetensors", "pictures.jsonl", "store.json"
FORMAT = 2
"""Version of the recipe, of the files and of what is read as a picture's pixels.

1 followed no EXIF orientation, clipped 16-bit greys and showed the colours under transparency.
Stores of an older version are refused: their latents may be of other pixels.
"""
HEADER = 4096
"""Bytes before the first row, a page; it is filled in when the number of rows is known."""
WAIT = 1.0
"""Seconds between two looks at a store that another run is encoding."""
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
"""What safetensors calls the dtypes of rows."""


@dataclass(frozen=True)
class Store:
    """The folders and the recipe of a store."""

    folder: Path
    """The whole store."""
    partial: Path
    """The store until it is whole."""
    recipe: dict
    """What determines its rows, as plain values."""
    field: str = "data.store"
    """The option that errors name."""
    content: str = "images"
    """What is encoded, for messages."""

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


def header(shape: list[int], name: str = "latents", dtype: torch.dtype = torch.float32) -> bytes:
    """The HEADER bytes of a safetensors file before its one tensor, `name` of `shape`."""
    size = dtype.itemsize * math.prod(shape)
    entry = {name: {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(entry).encode().ljust(HEADER - 8)  # safetensors allows spaces at the end
    return len(text).to_bytes(8, "little") + text


def recipe_name(recipe: dict) -> str:
    """16 hexadecimal digits of the recipe's SHA-256."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def claim(store: Store, held: contextlib.ExitStack, world: World) -> bool:
    """Claim a store for this run to encode, until `held` is closed; False if the store is whole.

    Waits while another run holds the claim, which ends with that run's process. Raises UserError on
    all ranks where the folder cannot be written.
    """
    waiting, topic = False, store.field.partition(".")[0]
    while (claimed := world.on_main(lambda: _try_to_claim(store, held))) is None:
        if not waiting:
            logger.info("%s: waiting for %s, which is encoding into %s", topic, holder(store.lock), store.partial)
        waiting = True
        check_stop("while it waited for another run")
        time.sleep(WAIT)
    return claimed


def _try_to_claim(store: Store, held: contextlib.ExitStack) -> bool | None:
    """Like `claim`, but None where another run holds the claim."""
    if store.folder.is_dir():
        return False
    try:
        lock = hold(store.lock)
        if lock is None:
            return None
        held.callback(lock.release)
        if store.folder.is_dir():  # another run has just finished
            held.pop_all().close()
            return False
        store.partial.mkdir(exist_ok=True)
        return True
    except OSError as error:
        raise UserError(f"{store.field}: {one_line(error)}; name another folder") from error


@contextlib.contextmanager
def writing(store: Store) -> Iterator[None]:
    """Turns an OSError inside it into a RunError."""
    try:
        yield
    except OSError as error:
        message = f"{store.field}: {store.partial} could not be written ({one_line(error)}); what is encoded is kept"
        raise RunError(message) from error


def append(store: Store, contents: Iterable[tuple[str, Any]]) -> None:
    """Append bytes to files of a partial store, each on the disk before the next is written."""
    with writing(store):
        for name, content in contents:
            with (store.partial / name).open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())


def finish(store: Store, facts: dict) -> None:
    """Make a partial store, whose files are complete, the whole one. Raises OSError.

    `facts` stand beside its recipe.
    """
    (store.partial / RECIPE).write_text(json.dumps({"recipe": store.recipe} | facts, indent=1), encoding="utf-8")
    # A run that was killed while it finished may have left a manifest.
    (store.partial / MANIFEST).unlink(missing_ok=True)
    write_manifest(store.partial)
    finish_aside(store.partial, store.folder)


def check_store(store: Store) -> None:
    """Raise UserError for a store that is damaged or of another recipe; reads all of it once."""
    folder, stored = store.folder, {}
    reason = why_not_whole(folder)
    try:
        stored = dict(read_json(folder / RECIPE, store.field)["recipe"])
    except (ValueError, TypeError, LookupError) as error:
        reason = reason or f"{RECIPE} is not readable: {one_line(error)}"
    if reason:
        raise UserError(
            f"{store.field}: {folder} is damaged: {reason}; delete it, and its {store.content} are encoded again"
        )
    changed = [f"{k} {stored.get(k)!r}, not {value!r}" for k, value in store.recipe.items() if stored.get(k) != value]
    if changed:
        raise UserError(f"{store.field}: {folder} is of another recipe: {'; '.join(changed)}; delete or rename it")


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
