"""Latents on the disk: encoded once, then mapped into memory by every run that asks for the same.

A store is a folder `<name of the source>-<fingerprint of the recipe>`; another recipe is another folder:

    latents.safetensors   one tensor, `latents` (N, C, H, W) float32, scaled
    pictures.jsonl        for each latent a line: caption, name, place, size and time stamp of the picture
    store.json            the recipe: what was encoded, and how
    manifest.json         sizes and hashes of the others

Until all is encoded it is called `<name>-<fingerprint without the state of the source>.partial`. A picture's line is
written once its latent is on the disk: whole lines count the latents that are kept when a run is killed, and when the
source is mended, those before the first picture that has changed are kept. Any folder may be deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from selfnpo_fast.data.image_sources import Picture, open_source
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import RunError, UserError, one_line
from selfnpo_fast.runtime.folders import MANIFEST, finish_aside, why_not_whole, write_manifest
from selfnpo_fast.runtime.world import World

DATA, PICTURES, RECIPE = "latents.safetensors", "pictures.jsonl", "store.json"
FORMAT = 1  # of the recipe and of what it stands for: another number makes no use of older stores
HEADER = 4096  # bytes before the first latent, a page: the count in the header is known at the end
BATCH = 16  # pictures that a rank encodes between two writes
WAIT = 1.0  # seconds between two looks at a store that another run is encoding


@dataclass(frozen=True)
class _Store:
    """Where a store lies, whole and until it is whole, and what it holds."""

    folder: Path
    part: Path
    recipe: dict

    @property
    def lock(self) -> Path:
        """A file beside the unfinished store, locked by the run that is encoding it."""
        return self.part.with_suffix(".lock")


def stored_latents(
    source: str, root: str, adapter, *, limit: int, seed: int, world: World
) -> tuple[torch.Tensor, list[str]]:
    """Latents (N, C, H, W) float32, mapped from the store, and captions of the first `limit` pictures of `source`.

    `root` is the folder of stores. Where it has none of this recipe, all ranks encode one together. A latent depends on
    its picture, its place in the source, the autoencoder, the resolution and the seed alone, save the autoencoder's own
    rounding, which may differ with the batch. Raises UserError for what is wrong with source or store, and RunError
    where the disk takes no more, on all ranks.
    """
    store = world.on_main(lambda: _identify(source, root, adapter, limit, seed))
    pictures = world.on_main(lambda: None if store.folder.is_dir() else open_source(source, limit).pictures())
    with contextlib.ExitStack() as held:
        if pictures is not None and _claim(store, held, world):
            _encode_all(pictures, store, adapter, seed, world)
            world.on_main(lambda: _finish(store, adapter, len(pictures)))
        else:
            world.on_main(lambda: _check(store))
            logger.info("data: %s is encoded already: %s", source, store.folder)
    mapped = []  # kept out of what ranks tell each other, which is copied
    world.together(lambda: mapped.append(_map(store.folder, adapter.latent_shape)))
    return mapped[0]


def _identify(source: str, root: str, adapter, limit: int, seed: int) -> _Store:
    """The store of a source as it is now."""
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
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _claim(store: _Store, held: contextlib.ExitStack, world: World) -> bool:
    """Whether the store is this run's to encode, until `held` is closed; False where it is whole.

    Waits while another run is encoding it. The kernel drops the claim of a process that is killed.
    """
    waiting = False
    while (claimed := world.on_main(lambda: _try_to_claim(store, held))) is None:
        if not waiting:
            logger.info("data: waiting for another run, which is encoding into %s", store.part)
        waiting = True
        time.sleep(WAIT)
    return claimed


def _try_to_claim(store: _Store, held: contextlib.ExitStack) -> bool | None:
    """As `_claim`, but None where another run is encoding."""
    if store.folder.is_dir():
        return False
    try:
        store.lock.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(store.lock, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks nothing that cannot be written
        held.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if store.folder.is_dir():  # another run has just finished
            store.lock.unlink(missing_ok=True)
            return False
        if store.lock.exists() and os.path.samestat(os.fstat(lock), store.lock.stat()):
            store.part.mkdir(exist_ok=True)
            return True
    except BlockingIOError:
        pass
    except OSError as error:
        raise UserError(f"data.store: {one_line(error)}; name another folder") from error
    held.pop_all().close()  # locked by another run, which may have deleted the file since
    return None


def _encode_all(pictures: list[Picture], store: _Store, adapter, seed: int, world: World) -> None:
    """Encode what the unfinished store lacks: each rank BATCH pictures a round, which rank 0 writes.

    The pictures of the next round are read meanwhile.
    """
    from tqdm import tqdm

    done = world.on_main(lambda: _resume(store, pictures, 4 * math.prod(adapter.latent_shape)))
    said = f", going on after {done:,}" if done else ""
    logger.info("data: encoding %s images into %s%s", f"{len(pictures):,}", store.folder, said)

    def read(start: int) -> tuple[range, list[torch.Tensor]]:
        first = start + world.rank * BATCH
        places = range(len(pictures))[first : first + BATCH]
        return places, [pictures[i].read_square(adapter.resolution) for i in places]

    def encode(reading: Future) -> torch.Tensor:
        """Latents of the pictures that have been read, on the CPU."""
        places, images = reading.result()
        if not places:
            return torch.empty(0, *adapter.latent_shape)
        batch, ids = torch.stack(images).to(world.device), torch.tensor(places, device=world.device)
        latents = adapter.encode(batch, ids, seed).float().cpu().contiguous()
        finite = latents.flatten(1).isfinite().all(dim=1).tolist()
        if not all(finite):
            label = pictures[places[finite.index(False)]].label
            raise UserError(f"data.source: the model's autoencoder gives no finite latent of {label}")
        return latents

    with (
        ThreadPoolExecutor(1) as reader,
        tqdm(total=len(pictures), initial=done, unit="image", dynamic_ncols=True, disable=not world.is_main) as bar,
    ):
        ahead = reader.submit(read, done)
        for start in range(done, len(pictures), BATCH * world.size):
            end = min(start + BATCH * world.size, len(pictures))
            now, ahead = ahead, reader.submit(read, end)
            latents = torch.cat(world.together(functools.partial(encode, now)))
            world.on_main(functools.partial(_append, store, latents, pictures[start:end]))
            bar.update(end - start)


@contextlib.contextmanager
def _writing(store: _Store):
    """What the disk refuses is a RunError."""
    try:
        yield
    except OSError as error:
        said = f"data.store: {store.part} could not be written ({one_line(error)}); what is encoded is kept"
        raise RunError(said) from error


def _line(picture: Picture) -> bytes:
    facts = (picture.caption, picture.label, picture.offset, picture.size, picture.mtime_ns)
    return json.dumps(facts).encode() + b"\n"


def _resume(store: _Store, pictures: list[Picture], row: int) -> int:
    """How many latents of `row` bytes an earlier run has left of these pictures; what else it left is cut off."""
    part = store.part
    with _writing(store), (part / PICTURES).open("a+b") as lines, (part / DATA).open("a+b") as data:
        whole = (data.seek(0, os.SEEK_END) - HEADER) // row
        done = end = 0
        lines.seek(0)
        for line, picture in zip(lines, pictures, strict=False):
            if line != _line(picture) or done >= whole:
                break
            done, end = done + 1, end + len(line)
        lines.truncate(end)
        data.truncate(HEADER + done * row)
    return done


def _append(store: _Store, latents: torch.Tensor, pictures: list[Picture]) -> None:
    """Add latents (n, C, H, W) and, once they are on the disk, the lines that count them."""
    with _writing(store):
        for name, content in ((DATA, latents.numpy()), (PICTURES, b"".join(map(_line, pictures)))):
            with (store.part / name).open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())


def _finish(store: _Store, adapter, count: int) -> None:
    """Make a whole store of the encoded parts, at once."""
    shape = [count, *adapter.latent_shape]
    entry = {"latents": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}}
    header = json.dumps(entry).encode().ljust(HEADER - 8)  # the format allows spaces at the end
    facts = {"recipe": store.recipe, "model": adapter.path, "shape": shape, "dtype": "float32"}
    with _writing(store):
        with (store.part / DATA).open("r+b") as data:
            data.write(len(header).to_bytes(8, "little") + header)
        (store.part / RECIPE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        (store.part / MANIFEST).unlink(missing_ok=True)  # of a run that was killed right here
        write_manifest(store.part)
        finish_aside(store.part, store.folder)
        store.lock.unlink(missing_ok=True)


def _check(store: _Store) -> None:
    """Refuse a store that is damaged or of another recipe; reads all of it once, in pieces."""
    folder, stored = store.folder, {}
    reason = why_not_whole(folder)
    try:
        stored = dict(json.loads((folder / RECIPE).read_text(encoding="utf-8"))["recipe"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = reason or f"{RECIPE} is not readable: {one_line(error)}"
    if reason:
        raise UserError(f"data.store: {folder} is damaged: {reason}; delete it, and its images are encoded anew")
    changed = [f"{k} {stored.get(k)!r}, not {value!r}" for k, value in store.recipe.items() if stored.get(k) != value]
    if changed:
        raise UserError(f"data.store: {folder} is of another recipe: {'; '.join(changed)}; delete or rename it")


def _map(folder: Path, latent_shape: tuple[int, ...]) -> tuple[torch.Tensor, list[str]]:
    """The latents, whose pages are read as they are used, and the captions."""
    try:
        with safe_open(folder / DATA, "pt") as file:
            latents = file.get_tensor("latents")
        captions = [json.loads(line)[0] for line in (folder / PICTURES).read_text(encoding="ascii").splitlines()]
        if latents.dtype != torch.float32 or latents.shape != (len(captions), *latent_shape):
            raise ValueError(f"it holds {tuple(latents.shape)} {latents.dtype} for {len(captions)} captions")
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise UserError(f"data.store: cannot read {folder}: {one_line(error)}; delete it") from error
    return latents, captions
