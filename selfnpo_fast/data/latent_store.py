"""Latents on the disk: encoded once, then mapped into memory by every run with the same recipe.

A store is a folder `<name of the source>-<fingerprint of the recipe>`:

    latents.safetensors   one tensor, `latents` (N, ...) float32, scaled
    pictures.jsonl        a line per picture: caption, label, and three numbers that change with it;
                          then the reason if it could not be used, and then there is no latent
    store.json            the recipe: what was encoded, and how; what was passed over
    manifest.json         sizes and hashes of the other files

Until all pictures are encoded the folder is called `<name>-<fingerprint>.partial`. This fingerprint
leaves out the state of the source, so that the folder is found again after a picture was repaired.

The line of a picture is written when its latent is on the disk, so the whole lines count the
pictures that a killed run has done. A later run keeps those before the first picture that has
changed. Any folder may be deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from selfnpo_fast.data.image_sources import ImageSource, open_source
from selfnpo_fast.data.listing import ClipShape, Listing, Picture
from selfnpo_fast.data.store_files import (
    DATA,
    FORMAT,
    HEADER,
    PICTURES,
    Store,
    append,
    captions_and_refusals,
    check_store,
    claim,
    finish,
    header,
    map_store,
    recipe_name,
    refuse_older,
    say_what_is_left_out,
    writing,
)
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.screen import progress_bar
from selfnpo_fast.runtime.stopping import check_stop
from selfnpo_fast.runtime.world import World

BATCH = 16
"""Pictures that a rank encodes between two writes."""


def stored_latents(
    source: str,
    root: str,
    adapter,
    *,
    limit: int,
    seed: int,
    world: World,
    column: str | None = None,
    skip: bool = False,
    stride: int = 1,
) -> tuple[torch.Tensor, list[str], str]:
    """Latents and captions of the first `limit` pictures of `source`, and the latents' fingerprint.

    The latents are (N, ...) float32, mapped from the store. The fingerprint is `fingerprint` of
    them, without reading them again. `root` is the folder of stores; where it holds none of this
    recipe, all ranks encode one together. A latent depends only on its picture, the picture's index
    in the source, the autoencoder, the resolution and the seed, up to rounding of the autoencoder
    that may vary with the batch. `column` and `skip` are those of `open_source`; pictures that
    cannot be decoded are then passed over, too, and a line says how many. Where the adapter is of
    videos the source holds videos, whose frames are taken `stride` apart. Raises UserError on all
    ranks for a bad source or store, and RunError on all ranks where the disk is full.
    """
    clip = clip_of(adapter, stride)
    store, listing = world.on_main(lambda: _look(source, root, adapter, limit, seed, column, skip, clip))
    with contextlib.ExitStack() as held:
        if listing is not None and claim(store, held, world):
            _encode_all(listing.pictures, store, adapter, seed, skip, world, clip)
            world.on_main(lambda: _finish(store, adapter, listing))
        else:
            world.on_main(lambda: check_store(store))
            logger.info("data: %s is encoded already: %s", source, store.folder)
    world.on_main(lambda: say_what_is_left_out(store, skip))
    mapped = []  # not a result of `together`, which would copy the latents to all ranks
    world.together(lambda: mapped.append(map_store(store.folder, adapter.latent_shape)))
    return mapped[0]


def clip_of(adapter, stride: int) -> ClipShape | None:
    """What is taken of a video; None for a model of pictures."""
    if not adapter.family.draws_videos:
        return None
    size = adapter.size
    return ClipShape(size.frames, size.height, size.width, stride)


def _look(
    source: str, root: str, adapter, limit: int, seed: int, column: str | None, skip: bool, clip: ClipShape | None
) -> tuple[Store, Listing | None]:
    """The store for the present state of a source and, if it is to be encoded, its Listing or None."""
    found = open_source(source, limit, column=column, skip=skip, clip=clip)
    store = _identify(found, root, adapter, limit, seed, column, clip)
    if store.folder.is_dir():
        return store, None
    refuse_older(store)
    return store, found.listing()


def _identify(
    found: ImageSource, root: str, adapter, limit: int, seed: int, column: str | None, clip: ClipShape | None
) -> Store:
    """The store for the present state of a source."""
    lasting = {
        "format": FORMAT,
        "source": found.name,
        "limit": limit,
        "column": column,
        "resolution": adapter.resolution if clip is None else list(dataclasses.astuple(clip)),
        "vae_sha256": adapter.vae_sha256,
        "seed": seed,
    }
    recipe = lasting | {"source_sha256": found.stamp}
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(found.name).name)[:40].strip("-") or "data"
    base = Path(os.path.abspath(os.path.expanduser(root)))
    return Store(base / f"{name}-{recipe_name(recipe)}", base / f"{name}-{recipe_name(lasting)}.partial", recipe)


def _encode_all(
    pictures: list[Picture], store: Store, adapter, seed: int, skip: bool, world: World, clip: ClipShape | None
) -> None:
    """Encode the pictures that the partial store lacks.

    In a round each rank encodes BATCH pictures, or as many frames and one clip at least, and rank 0
    writes them all. Meanwhile a thread reads the pictures of the next round.
    """
    batch = BATCH if clip is None else max(1, BATCH // clip.frames)
    # What an earlier run has left is kept.
    done = world.on_main(lambda: _resume(store, pictures, 4 * math.prod(adapter.latent_shape), skip))
    resumed = f", going on after {done:,}" if done else ""
    noun = "image" if clip is None else "video"
    logger.info("data: encoding %s %ss into %s%s", f"{len(pictures):,}", noun, store.folder, resumed)

    def read(start: int) -> tuple[range, list[torch.Tensor | UserError]]:
        """The indices and the images of this rank in the round that begins with picture `start`."""
        first = start + world.rank * batch
        indices = range(len(pictures))[first : first + batch]
        return indices, [_read(pictures[i], clip or adapter.resolution, skip) for i in indices]

    def encode(reading: Future) -> tuple[torch.Tensor, list[bytes]]:
        """The latents (n, ...) float32, on the CPU, of the images that could be read, and the
        lines of all of them."""
        indices, images = reading.result()
        good = [(i, image) for i, image in zip(indices, images, strict=True) if isinstance(image, torch.Tensor)]
        refused = {i: image for i, image in zip(indices, images, strict=True) if isinstance(image, UserError)}
        latents = torch.empty(0, *adapter.latent_shape)
        if good:
            ids = torch.tensor([i for i, _ in good])
            batch = torch.stack([image for _, image in good]).to(world.device)
            latents = adapter.encode(batch, ids.to(world.device), seed).float().cpu().contiguous()
            finite = latents.flatten(1).isfinite().all(dim=1)
            for i in ids[~finite].tolist():
                error = f"data.source: the model's autoencoder gives no finite latent of {pictures[i].label}"
                refused[i] = UserError(error)
                if not skip:
                    raise refused[i]
            latents = latents[finite]
        return latents, [_line(pictures[i], refused.get(i)) for i in indices]

    # The rounds; `ahead` is the reading of the next one.
    with (
        ThreadPoolExecutor(1) as reader,
        progress_bar(len(pictures), noun, initial=done, disable=not world.is_main) as bar,
    ):
        ahead = reader.submit(read, done)
        for start in range(done, len(pictures), batch * world.size):
            check_stop(
                f"after {start:,} of {len(pictures):,} {noun}s, whose latents are kept; the same command goes on"
            )
            end = min(start + batch * world.size, len(pictures))
            reading, ahead = ahead, reader.submit(read, end)
            encoded = world.together(functools.partial(encode, reading))
            latents, lines = torch.cat([part for part, _ in encoded]), [line for _, part in encoded for line in part]
            # A picture counts as done once its latent is on the disk.
            contents = [(DATA, latents.numpy()), (PICTURES, b"".join(lines))]
            world.on_main(functools.partial(append, store, contents))
            bar.update(end - start)


def _read(picture: Picture, wanted: ClipShape | int, skip: bool) -> torch.Tensor | UserError:
    """The pixels of a clip, or of a picture of so many pixels a side; or, with `skip`, why there
    are none. Raises UserError without."""
    try:
        return picture.read_clip(wanted) if isinstance(wanted, ClipShape) else picture.read_square(wanted)
    except UserError as error:
        if not skip:
            raise
        return error


def _line(picture: Picture, error: UserError | None = None) -> bytes:
    """The line of a picture in pictures.jsonl; `error` says why it could not be used."""
    facts = (picture.caption, picture.label, *picture.facts)
    refused = () if error is None else (str(error).removeprefix("data.source: "),)
    return json.dumps(facts + refused).encode() + b"\n"


def _resume(store: Store, pictures: list[Picture], latent_bytes: int, skip: bool) -> int:
    """The number of pictures, from the first one on, that an earlier run has done.

    What else that run left is cut off. A latent has `latent_bytes` bytes. Pictures that could not
    be used count as done with `skip` only.
    """
    folder = store.partial
    with writing(store), (folder / PICTURES).open("a+b") as lines, (folder / DATA).open("a+b") as data:
        whole = (data.seek(0, os.SEEK_END) - HEADER) // latent_bytes
        done = latents = end = 0
        lines.seek(0)
        for line, picture in zip(lines, pictures, strict=False):
            expected = _line(picture)
            refused = skip and line.startswith(expected[:-2] + b", ") and line.endswith(b"]\n")
            if not refused and (line != expected or latents >= whole):
                break
            done, latents, end = done + 1, latents + (not refused), end + len(line)
        lines.truncate(end)
        data.truncate(HEADER + latents * latent_bytes)
    return done


def _finish(store: Store, adapter, listing: Listing) -> None:
    """Turn the partial store, all of whose pictures are done, into the whole store.

    Raises UserError where none of them could be used.
    """
    with writing(store):
        captions, refusals = captions_and_refusals(store.partial)
        if not captions:
            nouns = "images" if listing.clip is None else "videos"
            raise UserError(f"data.source: none of {len(refusals):,} {nouns} can be used; the first: {refusals[0]}")
        count, first = listing.bad
        shape = [len(captions), *adapter.latent_shape]
        facts = {
            "model": adapter.path,
            "shape": shape,
            "dtype": "float32",
            "passed_over": listing.passed_over,
            "bad": [count + len(refusals), first or "".join(refusals[:1])],
            "more": listing.more,
        }
        with (store.partial / DATA).open("r+b") as data:
            data.write(header(shape))
        finish(store, facts)
