"""Text embeddings on the disk: encoded once, then mapped into memory by every run with the same
recipe.

A store is a folder `<name of the model>-<fingerprint of the recipe>`:

    NAME.safetensors    one tensor, the rows (M, ...) of an argument of the denoiser; row 0 is the
                        empty prompt's. Of ragged rows all lengths one after the other
    batches.jsonl       a line per batch: how many rows it has, and the lengths of ragged ones
    store.json          the recipe: what was encoded, and how; which prompts were cut
    manifest.json       sizes and hashes of the other files

Until all prompts are encoded the folder is called `<name>-<fingerprint>.partial`. The line of a
batch is written when its rows are on the disk, so the whole lines count the batches that a killed
run has done. Any folder may be deleted.

Memory holds one batch of each rank, whatever the number of prompts.

Shape letter: M distinct prompts and the empty one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from selfnpo_fast.data.prompts import fingerprint
from selfnpo_fast.data.store_files import (
    HEADER,
    RECIPE,
    Store,
    append,
    check_store,
    claim,
    finish,
    header,
    recipe_name,
    writing,
)
from selfnpo_fast.runtime.console import logger, say_once
from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_fast.runtime.files import read_json
from selfnpo_fast.runtime.screen import progress_bar
from selfnpo_fast.runtime.stopping import check_stop
from selfnpo_fast.runtime.world import World

FIELD, BATCHES = "prompts.store", "batches.jsonl"
FORMAT = 1
"""Version of the recipe and of the files."""

Tensors = dict[str, torch.Tensor]
Contents = list[tuple[str, Any]]
"""Bytes by the name of the file that they are appended to."""


def stored_text(
    prompts: Sequence[str], root: str, adapter, *, dtype: torch.dtype, encoder_dtype: torch.dtype, world: World
) -> tuple[Tensors, Tensors]:
    """The rows of the empty prompt and of distinct `prompts`, mapped from the store.

    root             the folder of stores; where it holds none of this recipe, all ranks encode one
                     together
    adapter          has text_encoders, text_sha256 and conditioning_rows, as `models.base.Adapter`
    dtype            in which rows are kept
    encoder_dtype    in which the text encoders are loaded

    Returns tensors (M, ...) by name, ragged ones with all lengths one after the other, and the
    lengths (M,) int64 of those. Raises UserError on all ranks for a damaged store, and RunError on
    all ranks where the disk is full.
    """
    store = world.on_main(lambda: _identify(prompts, root, adapter, dtype, encoder_dtype))
    with contextlib.ExitStack() as held:
        if claim(store, held, world):
            _encode_all(prompts, store, adapter, dtype, encoder_dtype, world)
        else:
            world.on_main(lambda: check_store(store))
            logger.info("prompts: text embeddings are encoded already: %s", store.folder)
    mapped = []  # not a result of `together`, which would copy the rows to all ranks
    world.together(lambda: mapped.append(_map(store, adapter, dtype)))
    return mapped[0]


def _identify(prompts: Sequence[str], root: str, adapter, dtype: torch.dtype, encoder_dtype: torch.dtype) -> Store:
    """The store of these prompts."""
    import diffusers
    import transformers

    rows = {
        name: [list(row.shape), row.ragged, _dtype_name(row.dtype or dtype)]
        for name, row in adapter.conditioning_rows.items()
    }
    recipe = {
        "format": FORMAT,
        "prompts": len(prompts),
        "prompts_sha256": fingerprint(prompts),
        "text_sha256": adapter.text_sha256,
        "encoder": _dtype_name(encoder_dtype),
        "rows": rows,
        # A pipeline's own code prepares prompts.
        "versions": [diffusers.__version__, transformers.__version__],
    }
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(adapter.path).name)[:40].strip("-") or "model"
    folder = Path(os.path.abspath(os.path.expanduser(root))) / f"{name}-{recipe_name(recipe)}"
    return Store(folder, folder.with_name(f"{folder.name}.partial"), recipe, FIELD, "prompts")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _file(name: str) -> str:
    """The file of the rows of one argument."""
    return f"{name}.safetensors"


def _encode_all(
    prompts: Sequence[str], store: Store, adapter, dtype: torch.dtype, encoder_dtype: torch.dtype, world: World
) -> None:
    """Encode what the partial store lacks, and make it the whole one."""
    done = world.on_main(lambda: _resume(store, adapter.conditioning_rows, dtype))
    rest = f", going on after batch {done:,}" if done else ""
    logger.info("prompts: encoding %s text embeddings into %s%s", f"{len(prompts):,}", store.folder, rest)
    with contextlib.ExitStack() as loaded:
        opened: list[Any] = []

        def load() -> None:
            opened.append(loaded.enter_context(adapter.text_encoders(world.device, encoder_dtype)))

        world.together(load)  # a rank that cannot load them must not leave the others waiting
        cut = world.together(lambda: opened[0].what_is_cut(prompts))[0]
        _encode_batches(prompts, store, opened[0], adapter.conditioning_rows, dtype, done, world)
    world.on_main(lambda: _finish(store, adapter, dtype, cut))


def _encode_batches(
    prompts: Sequence[str],
    store: Store,
    encoders,
    facts: Mapping[str, Any],
    dtype: torch.dtype,
    done: int,
    world: World,
) -> None:
    """Encode the batches from `done` on. In a round each rank encodes one; then they are written in
    order, each by its own rank: rows do not travel."""
    total = encoders.batches(prompts)
    encoded: list[Contents] = []

    def encode(number: int) -> None:
        if number < total:
            encoded.append(_contents(encoders.batch(prompts, number), facts, dtype))

    def write() -> None:
        append(store, encoded.pop())

    with progress_bar(total, "batch", initial=done, disable=not world.is_main) as bar:
        for start in range(done, total, world.size):
            check_stop(f"after {start:,} of {total:,} batches of prompts, which are kept; the same command goes on")
            world.together(functools.partial(encode, start + world.rank))
            ranks = range(min(world.size, total - start))
            for rank in ranks:
                world.together(write if rank == world.rank else lambda: None)
            bar.update(len(ranks))


def _contents(rows: Mapping[str, Any], facts: Mapping[str, Any], dtype: torch.dtype) -> Contents:
    """What a batch adds to each file of the store, in this order; the last is the batch's line."""
    contents, lengths, count = [], {}, 0
    for name, value in rows.items():
        row = facts[name]
        if row.ragged is not None:
            lengths[name] = [part.shape[row.ragged] for part in value]
            value = torch.cat([part.movedim(row.ragged, 0) for part in value])
        count = len(lengths[name]) if name in lengths else len(value)
        plain = value.to("cpu", row.dtype or dtype).contiguous()
        contents.append((_file(name), plain.view(-1).view(torch.uint8).numpy()))
    line = json.dumps({"rows": count, "lengths": lengths}).encode() + b"\n"
    return [*contents, (BATCHES, line)]


def _item_bytes(row: Any, dtype: torch.dtype) -> int:
    """Bytes of a row, or of one position of a ragged one."""
    shape = [length for axis, length in enumerate(row.shape) if axis != row.ragged]
    return (row.dtype or dtype).itemsize * torch.Size(shape).numel()


def _resume(store: Store, facts: Mapping[str, Any], dtype: torch.dtype) -> int:
    """The number of batches, from the first one on, that an earlier run has done.

    What else that run left is cut off.
    """
    with writing(store), contextlib.ExitStack() as opened:
        lines = opened.enter_context((store.partial / BATCHES).open("a+b"))
        files = {name: opened.enter_context((store.partial / _file(name)).open("a+b")) for name in facts}
        there = {name: file.seek(0, os.SEEK_END) - HEADER for name, file in files.items()}
        kept, done, end = dict.fromkeys(facts, 0), 0, 0
        lines.seek(0)
        for line in lines:
            try:
                size = _sizes(json.loads(line), facts, dtype)
            except (ValueError, TypeError, LookupError):  # half a line, or none of ours
                break
            if not line.endswith(b"\n") or any(kept[name] + size[name] > there[name] for name in facts):
                break
            kept = {name: kept[name] + size[name] for name in facts}
            done, end = done + 1, end + len(line)
        lines.truncate(end)
        for name, file in files.items():
            file.truncate(HEADER + kept[name])
    return done


def _sizes(batch: dict, facts: Mapping[str, Any], dtype: torch.dtype) -> dict[str, int]:
    """Bytes of a batch in each file, by name, from its line."""
    return {
        name: _item_bytes(row, dtype) * (batch["rows"] if row.ragged is None else sum(batch["lengths"][name]))
        for name, row in facts.items()
    }


def _counts(folder: Path, facts: Mapping[str, Any]) -> tuple[int, dict[str, list[int]]]:
    """The number of rows of a store, and the lengths of its ragged ones by name."""
    with (folder / BATCHES).open(encoding="ascii") as lines:
        batches = [json.loads(line) for line in lines]
    ragged = [name for name, row in facts.items() if row.ragged is not None]
    return sum(batch["rows"] for batch in batches), {
        name: [length for batch in batches for length in batch["lengths"][name]] for name in ragged
    }


def _shape(row: Any, count: int, lengths: Sequence[int] | None) -> list[int]:
    """The shape of the tensor that holds all rows of one argument."""
    if lengths is None:
        return [count, *row.shape]
    return [sum(lengths), *(length for axis, length in enumerate(row.shape) if axis != row.ragged)]


def _finish(store: Store, adapter, dtype: torch.dtype, cut: str | None) -> None:
    """Turn the partial store, all of whose batches are done, into the whole store."""
    facts = adapter.conditioning_rows
    with writing(store):
        count, lengths = _counts(store.partial, facts)
        for name, row in facts.items():
            with (store.partial / _file(name)).open("r+b") as data:
                data.write(header(_shape(row, count, lengths.get(name)), name, row.dtype or dtype))
        finish(store, {"model": adapter.path, "cut": cut})


def _map(store: Store, adapter, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """The rows of a whole store, read page by page as they are used, and the lengths of ragged ones.

    Raises UserError where the files do not fit together.
    """
    folder, facts = store.folder, adapter.conditioning_rows
    tensors: Tensors = {}
    try:
        count, lengths = _counts(folder, facts)
        for name, row in facts.items():
            with safe_open(folder / _file(name), "pt") as file:
                tensors[name] = file.get_tensor(name)
            expected = _shape(row, count, lengths.get(name)), row.dtype or dtype
            if (list(tensors[name].shape), tensors[name].dtype) != expected or count != store.recipe["prompts"] + 1:
                raise ValueError(f"{name} is {tuple(tensors[name].shape)} {tensors[name].dtype} for {count} prompts")
        cut = read_json(folder / RECIPE, FIELD)["cut"]
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise UserError(f"{FIELD}: cannot read {folder}: {one_line(error)}; delete it") from error
    if cut:
        say_once(str(cut))
    return tensors, {name: torch.tensor(values) for name, values in lengths.items()}
