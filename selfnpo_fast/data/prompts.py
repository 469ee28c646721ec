"""Prompts of the package, of a file, of a Hugging Face dataset, or the captions of pictures.

Files are streamed: memory holds the prompts that are asked for, and one bounded line or batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path

from selfnpo_fast.data.image_sources import BRACES, DATASET_ID, find_kind, open_source
from selfnpo_fast.data.listing import summary
from selfnpo_fast.data.picture_tables import cannot_read
from selfnpo_fast.data.rows import (
    Rows,
    checked,
    csv_rows,
    jsonl_rows,
    parquet_rows,
    refuse_missing,
    short,
    shown,
    text_rows,
)
from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import UserError, one_line

ASSETS = Path(__file__).resolve().parents[1] / "assets"
PACKAGED = {"shipped": ASSETS / "prompts.txt", "digits": ASSETS / "digits" / "prompts.txt"}
"""The files of prompts that are part of the package, by the source that names them."""
FIELD = "prompts"
"""What errors begin with."""


def read_prompts(source: str, *, column: str = "prompt", limit: int | None = None) -> list[str]:
    """The prompts of `source`, stripped, in order; blank ones are left out, duplicates are kept.

    `source` is one of

    - `shipped` or `digits`, the prompts of the package
    - a file: .txt with one prompt a line, or .jsonl, .csv or .parquet with prompts in `column`
    - the id or the folder of a Hugging Face dataset, which is streamed from its split `train`, or
      from another as `id:split`
    - a folder of captioned images, a .tar, a folder of tars or a pattern of them, as `data.source`
      takes them: the prompts are the captions, in `column` where that is not `prompt`

    Of a list of prompts in one row the first is used. Reading stops after `limit` prompts, which
    bounds memory. Text is UTF-8, with or without a byte order mark. Raises UserError, whose line
    names the source, the line or row, the value, and what to do about it.
    """
    if limit is not None and limit < 1:
        raise UserError(f"{FIELD}: the limit is {limit}; it has to be at least 1")
    name, unit, rows = _open(source, column, limit)
    prompts: list[str] = []
    with closing(rows):
        try:
            for number, values in rows:
                if isinstance(values, UserError):
                    raise values
                prompt = checked(FIELD, f"{name}, {unit} {number}", values[0])
                if prompt:
                    prompts.append(prompt)
                if len(prompts) == limit:
                    break
        except OSError as error:
            raise UserError(f"{FIELD}: {name} cannot be read: {one_line(error.strerror or error, 200)}") from error
    if not prompts:
        raise UserError(f"{FIELD}: {name} is empty, or all its {unit}s are blank; put at least one prompt into it")
    return prompts


def fingerprint(prompts: Iterable[str]) -> str:
    """The SHA-256, in hexadecimal, of prompts or captions in their order.

    Any change of a text, of their number or of their order changes it; where they were read from
    does not.
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(prompt).encode() + b"\n")  # no string holds the line's end unescaped
    return digest.hexdigest()


def _open(source: str, column: str, limit: int | None) -> tuple[str, str, Rows]:
    """(name of the source in messages, "line" or "row", the rows), before any row is read."""
    if source in PACKAGED:
        return str(PACKAGED[source]), "line", text_rows(PACKAGED[source], [column], FIELD)
    path = os.path.expanduser(source)
    suffix = Path(path).suffix.lower()
    if os.path.isfile(path) and suffix in READERS:
        unit, reader = READERS[suffix]
        return shown(source), unit, reader(Path(path), [column], FIELD)
    of_pictures = os.path.isdir(path) and find_kind(Path(path)) in ("images", ".tar")
    if of_pictures or (suffix == ".tar" and (os.path.isfile(path) or BRACES.search(source))):
        return shown(source), "picture", _captions(source, column, limit)
    if os.path.isfile(path):
        raise UserError(
            f"{FIELD}: {shown(source)} is of no known kind; name it {_known_suffixes()} after what it holds"
        )
    if os.path.isdir(path):
        if suffix in READERS:
            raise UserError(f"{FIELD}: {shown(source)} is a directory; give a file inside it")
        return shown(source), "row", _dataset_rows(path, "train", column)
    if os.path.exists(path):
        raise UserError(f"{FIELD}: {shown(source)} is no regular file; give a {_known_suffixes()} file")
    name, _, split = path.partition(":")
    if not os.path.isdir(name):
        _refuse_strange_id(source, path)
    return shown(source), "row", _dataset_rows(name, split or "train", column)


def _refuse_strange_id(source: str, path: str) -> None:
    """Raise UserError for what was meant as a file or cannot be the id of a dataset.

    A mistyped path is then reported as one, and is not looked up on the Hub.
    """
    parent = os.path.dirname(path)
    # The id of a dataset has one slash at most, and its owner is hardly ever the name of a local
    # folder.
    nested = path.count("/") > 1 or (parent != "" and os.path.isdir(parent))
    meant_as_file = Path(path).suffix.lower() in READERS or path.startswith((".", "~", "/")) or nested
    if meant_as_file and "://" not in path:
        raise UserError(f"{FIELD}: no such file: {short(source)}; check the path")
    if not DATASET_ID.fullmatch(path):
        raise UserError(
            f"{FIELD}: {short(source)} is neither a file nor the id of a dataset; give 'shipped', 'digits', "
            f"a {_known_suffixes()} file, a folder of captioned images, or an id such as owner/name:split"
        )


def _captions(source: str, column: str, limit: int | None) -> Rows:
    """The captions of pictures, which are listed and not read."""
    # The default of `prompts.column` is no name that captions usually have.
    found = open_source(source, limit or 1 << 62, column=None if column == "prompt" else column, field=FIELD)
    listing = found.listing()
    line = summary(len(listing.pictures), listing.passed_over, listing.bad, listing.more)
    if line:
        say_once(f"{FIELD}: {shown(source)}: {line}")
    for number, picture in enumerate(listing.pictures, 1):
        yield number, (picture.caption,)


def _dataset_rows(name: str, split: str, column: str) -> Rows:
    """`column` of a Hugging Face dataset: an id on the Hub, or a folder of data files."""
    import datasets

    try:
        data = datasets.load_dataset(name, split=split, streaming=True)
        # Without a declared schema the first row tells; other columns are then dropped, so that no
        # image is decoded.
        columns = data.column_names or list(next(iter(data), {column: ""}))
        refuse_missing(FIELD, shown(f"{name}:{split}"), [column], columns)
        for number, row in enumerate(data.select_columns([column]), 1):
            yield number, (row[column],)
    except UserError:
        raise
    except Exception as error:  # what the Hub's client and its readers raise has no common base
        raise cannot_read(FIELD, shown(f"{name}:{split}"), error) from error


READERS: dict[str, tuple[str, Callable[[Path, Sequence[str], str], Rows]]] = {
    ".txt": ("line", text_rows),
    ".jsonl": ("line", jsonl_rows),
    ".csv": ("line", csv_rows),
    ".parquet": ("row", parquet_rows),
}
"""For each suffix: "line" or "row", and the reader (path, columns, field) -> rows."""


def _known_suffixes() -> str:
    """The suffixes of files that are read, for messages."""
    return "/".join(READERS)
