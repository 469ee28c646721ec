"""Latents on the disk: encoded once, then mapped into memory by every run with the same recipe.

A store is a folder `<name of the source>-<fingerprint of the recipe>`:

    latents.safetensors   one tensor, `latents` (N, C, H, W) float32, scaled
    pictures.jsonl        a line per latent: caption, label, offset, size, mtime_ns of its picture
    store.json            the recipe: what was encoded, and how
    manifest.json         sizes and hashes of the other files

Until all pictures are encoded the folder is called `<name>-<fingerprint>.partial`. This fingerprint
leaves out the state of the source, so that the folder is found again after a picture was repaired.

The line of a picture is written when its latent is on the disk, so the whole lines count the
latents that a killed run leaves. A later run keeps those before the first picture that has changed.
Any folder may be deleted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from selfnpo_fast.data.image_sources import Picture, open_source
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import RunError, UserError, one_line
from selfnpo_fast.runtime.folders import MANIFEST, finish_aside, why_not_whole, write_manifest
from selfnpo_fast.runtime.locks import hold, holder
from selfnpo_fast.runtime.screen import progress_bar
from selfnpo_fast.runtime.world import World

DATA, PICTURES, RECIPE = "latents.safetensors", "pictures.jsonl", "store.json"
FORMAT = 1
"""Version of the recipe and of the files. Stores of another version are not used."""
HEADER = 4096
"""Bytes before the first latent, a page; it is filled in when the number of latents is known."""
BATCH = 16
"""Pictures that a rank encodes between two writes."""
WAIT = 1.0
"""Seconds between two looks at a store that another run is encoding."""


@dataclass(frozen=True)
class _Store:
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


def stored_latents(
    source: str, root: str, adapter, *, limit: int, seed: int, world: World
) -> tuple[torch.Tensor, list[str]]:
    """Latents and captions of the first `limit` pictures of `source`.

    The latents are (N, C, H, W) float32, mapped from the store. `root` is the folder of stores;
    where it holds none of this recipe, all ranks encode one together. A latent depends only on its
    picture, the picture's index in the source, the autoencoder, the resolution and the seed, up to
    rounding of the autoencoder that may vary with the batch. Raises UserError on all ranks for a
    bad source or store, and RunError on all ranks where the disk is full.
    """
    store = world.on_main(lambda: _identify(source, root, adapter, limit, seed))
    pictures = world.on_main(lambda: None if store.folder.is_dir() else open_source(source, limit).pictures())
    with contextlib.ExitStack() as claim:
        if pictures is not None and _claim(store, claim, world):
            _encode_all(pictures, store, adapter, seed, world)
            world.on_main(lambda: _finish(store, adapter, len(pictures)))
        else:
            world.on_main(lambda: _check(store))
            logger.info("data: %s is encoded already: %s", source, store.folder)
    mapped = []  # not a result of `together`, which would copy the latents to all ranks
    world.together(lambda: mapped.append(_map(store.folder, adapter.latent_shape)))
    return mapped[0]


def _identify(source: str, root: str, adapter, limit: int, seed: int) -> _Store:
    """The store for the present state of a source."""
    found = open_source(source, limit)
    lasting = {
        "format": FORMAT,
        "source": found.name,
        "limit": limit,
        "resolution": adapter.resolution,
        "vae_sha256": adapter.vae_sha256,
        "seed": seed,
    }
    recipe = lasting | {"source_sha256": found.stamp}
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(found.name).name)[:40].strip("-") or "data"
    base = Path(os.path.abspath(os.path.expanduser(root)))
    return _Store(base / f"{name}-{_fingerprint(recipe)}", base / f"{name}-{_fingerprint(lasting)}.partial", recipe)


def _fingerprint(recipe: dict) -> str:
    """16 hexadecimal digits of the recipe's SHA-256."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _claim(store: _Store, claim: contextlib.ExitStack, world: World) -> bool:
    """Claim the store for this run to encode, until `claim` is closed; False if the store is whole.

    Waits while another run holds the claim, which ends with that run's process.
    """
    waiting = False
    while (claimed := world.on_main(lambda: _try_to_claim(store, claim))) is None:
        if not waiting:
            logger.info("data: waiting for %s, which is encoding into %s", holder(store.lock), store.partial)
        waiting = True
        time.sleep(WAIT)
    return claimed


def _try_to_claim(store: _Store, claim: contextlib.ExitStack) -> bool | None:
    """Like `_claim`, but None where another run holds the claim."""
    if store.folder.is_dir():
        return False
    try:
        lock = hold(store.lock)
        if lock is None:
            return None
        claim.callback(lock.release)
        if store.folder.is_dir():  # another run has just finished
            claim.pop_all().close()
            return False
        store.partial.mkdir(exist_ok=True)
        return True
    except OSError as error:
        raise UserError(f"data.store: {one_line(error)}; name another folder") from error


def _encode_all(pictures: list[Picture], store: _Store, adapter, seed: int, world: World) -> None:
    """Encode the pictures that the partial store lacks.

    In a round each rank encodes BATCH pictures, and rank 0 writes them all. Meanwhile a thread
    reads the pictures of the next round.
    """
    # What an earlier run has left is kept.
    done = world.on_main(lambda: _resume(store, pictures, 4 * math.prod(adapter.latent_shape)))
    resumed = f", going on after {done:,}" if done else ""
    logger.info("data: encoding %s images into %s%s", f"{len(pictures):,}", store.folder, resumed)

    def read(start: int) -> tuple[range, list[torch.Tensor]]:
        """The indices and the images of this rank in the round that begins with picture `start`."""
        first = start + world.rank * BATCH
        indices = range(len(pictures))[first : first + BATCH]
        return indices, [pictures[i].read_square(adapter.resolution) for i in indices]

    def encode(reading: Future) -> torch.Tensor:
        """The latents (n, C, H, W) float32, on the CPU, of the images that have been read."""
        indices, images = reading.result()
        if not indices:
            return torch.empty(0, *adapter.latent_shape)
        batch, ids = torch.stack(images).to(world.device), torch.tensor(indices, device=world.device)
        latents = adapter.encode(batch, ids, seed).float().cpu().contiguous()
        finite = latents.flatten(1).isfinite().all(dim=1).tolist()
        if not all(finite):
            label = pictures[indices[finite.index(False)]].label
            raise UserError(f"data.source: the model's autoencoder gives no finite latent of {label}")
        return latents

    # The rounds; `ahead` is the reading of the next one.
    with (
        ThreadPoolExecutor(1) as reader,
        progress_bar(len(pictures), "image", initial=done, disable=not world.is_main) as bar,
    ):
        ahead = reader.submit(read, done)
        for start in range(done, len(pictures), BATCH * world.size):
            end = min(start + BATCH * world.size, len(pictures))
            reading, ahead = ahead, reader.submit(read, end)
            latents = torch.cat(world.together(functools.partial(encode, reading)))
            world.on_main(functools.partial(_append, store, latents, pictures[start:end]))
            bar.update(end - start)


@contextlib.contextmanager
def _writing(store: _Store) -> Iterator[None]:
    """Turns an OSError inside it into a RunError."""
    try:
        yield
    except OSError as error:
        message = f"data.store: {store.partial} could not be written ({one_line(error)}); what is encoded is kept"
        raise RunError(message) from error


def _line(picture: Picture) -> bytes:
    """The line of a picture in pictures.jsonl."""
    facts = (picture.caption, picture.label, picture.offset, picture.size, picture.mtime_ns)
    return json.dumps(facts).encode() + b"\n"


def _resume(store: _Store, pictures: list[Picture], latent_bytes: int) -> int:
    """The number of latents that an earlier run has left of the first of these pictures.

    What else that run left is cut off. A latent has `latent_bytes` bytes.
    """
    folder = store.partial
    with _writing(store), (folder / PICTURES).open("a+b") as lines, (folder / DATA).open("a+b") as data:
        whole = (data.seek(0, os.SEEK_END) - HEADER) // latent_bytes
        done = end = 0
        lines.seek(0)
        for line, picture in zip(lines, pictures, strict=False):
            if line != _line(picture) or done >= whole:
                break
            done, end = done + 1, end + len(line)
        lines.truncate(end)
        data.truncate(HEADER + done * latent_bytes)
    return done


def _append(store: _Store, latents: torch.Tensor, pictures: list[Picture]) -> None:
    """Write latents (n, C, H, W) and, once they are on the disk, the lines that count them."""
    with _writing(store):
        for name, content in ((DATA, latents.numpy()), (PICTURES, b"".join(map(_line, pictures)))):
            with (store.partial / name).open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())


def _finish(store: _Store, adapter, count: int) -> None:
    """Turn the partial store, whose `count` pictures are all encoded, into the whole store."""
    shape = [count, *adapter.latent_shape]
    entry = {"latents": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}}
    header = json.dumps(entry).encode().ljust(HEADER - 8)  # safetensors allows spaces at the end
    facts = {"recipe": store.recipe, "model": adapter.path, "shape": shape, "dtype": "float32"}
    with _writing(store):
        with (store.partial / DATA).open("r+b") as data:
            data.write(len(header).to_bytes(8, "little") + header)
        (store.partial / RECIPE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        # A run that was killed while it finished may have left a manifest.
        (store.partial / MANIFEST).unlink(missing_ok=True)
        write_manifest(store.partial)
        finish_aside(store.partial, store.folder)


def _check(store: _Store) -> None:
    """Raise UserError for a store that is damaged or of another recipe; reads all of it once."""
    folder, stored = store.folder, {}
    reason = why_not_whole(folder)
    try:
        stored = dict(json.loads((folder / RECIPE).read_text(encoding="utf-8"))["recipe"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = reason or f"{RECIPE} is not readable: {one_line(error)}"
    if reason:
        raise UserError(f"data.store: {folder} is damaged: {reason}; delete it, and its images are encoded again")
    changed = [f"{k} {stored.get(k)!r}, not {value!r}" for k, value in store.recipe.items() if stored.get(k) != value]
    if changed:
        raise UserError(f"data.store: {folder} is of another recipe: {'; '.join(changed)}; delete or rename it")


def _map(folder: Path, latent_shape: tuple[int, ...]) -> tuple[torch.Tensor, list[str]]:
    """The latents of a whole store, read page by page as they are used, and the captions.

    Raises UserError where files and `latent_shape` (C, H, W) do not fit together.
    """
    try:
        with safe_open(folder / DATA, "pt") as file:
            latents = file.get_tensor("latents")
        captions = [json.loads(line)[0] for line in (folder / PICTURES).read_text(encoding="ascii").splitlines()]
        if latents.dtype != torch.float32 or latents.shape != (len(captions), *latent_shape):
            raise ValueError(f"it holds {tuple(latents.shape)} {latents.dtype} for {len(captions)} captions")
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise UserError(f"data.store: cannot read {folder}: {one_line(error)}; delete it") from error
    return latents, captions
