"""Prompts of the package, of a file (.txt, .jsonl, .csv, .parquet) or of a Hugging Face dataset.

Files are streamed: memory holds the prompts that are asked for, and one bounded line or batch.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import chain, islice
from pathlib import Path

from selfnpo_fast.runtime.errors import UserError, one_line, shortened

ASSETS = Path(__file__).resolve().parents[1] / "assets"
PACKAGED = {"shipped": ASSETS / "prompts.txt", "digits": ASSETS / "digits" / "prompts.txt"}
"""The files of prompts that are part of the package, by the source that names them."""

MAX_CHARACTERS = 10_000
"""Of one prompt. A text encoder reads some 77 tokens, so a longer prompt is the wrong file."""
MAX_LINE_BYTES = 1 << 20
"""Of one line of a file. A line of JSON or CSV may hold other fields than the prompt."""
BATCH_ROWS = 1024
"""Rows of a parquet file that are read at once."""

DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
"""`owner/name:split` as on the Hub; owner and split may be left out."""

Rows = Iterator[tuple[int, object]]
"""(line or row number counted from 1, value that should be a prompt)."""


class PromptError(UserError):
    """A source of prompts that cannot be read.

    Its one line names the source, the line or row, the value, and what to do about it.
    """


def read_prompts(source: str, *, column: str = "prompt", limit: int | None = None) -> list[str]:
    """The prompts of `source`, stripped, in order; blank ones are left out, duplicates are kept.

    `source` is one of

    - `shipped` or `digits`, the prompts of the package
    - a file: .txt with one prompt a line, or .jsonl, .csv or .parquet with prompts in `column`
    - the id or the folder of a Hugging Face dataset, which is streamed from its split `train`, or
      from another as `id:split`

    Reading stops after `limit` prompts, which bounds memory. Text is UTF-8, with or without a byte
    order mark. Raises PromptError.
    """
    if limit is not None and limit < 1:
        raise PromptError(f"prompts: the limit is {limit}; it has to be at least 1")
    name, unit, rows = _open(source, column)
    prompts: list[str] = []
    with closing(rows):
        try:
            for number, value in rows:
                prompt = _checked(f"{name}, {unit} {number}", value)
                if prompt:
                    prompts.append(prompt)
                if len(prompts) == limit:
                    break
        except OSError as error:
            raise PromptError(f"prompts: {name} cannot be read: {one_line(error.strerror or error, 200)}") from error
    if not prompts:
        raise PromptError(f"prompts: {name} is empty, or all its {unit}s are blank; put at least one prompt into it")
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


def _open(source: str, column: str) -> tuple[str, str, Rows]:
    """(name of the source in messages, "line" or "row", the rows), before any row is read."""
    if source in PACKAGED:
        return str(PACKAGED[source]), "line", _text_rows(PACKAGED[source], column)
    path = os.path.expanduser(source)
    suffix = Path(path).suffix.lower()
    if os.path.isfile(path):
        if suffix not in READERS:
            raise PromptError(f"prompts: {source} is of no known kind; name it {_known_suffixes()} after what it holds")
        unit, reader = READERS[suffix]
        return source, unit, reader(Path(path), column)
    if os.path.isdir(path):
        if suffix in READERS:
            raise PromptError(f"prompts: {source} is a directory; give a file inside it")
        return source, "row", _dataset_rows(path, "train", column)
    if os.path.exists(path):
        raise PromptError(f"prompts: {source} is no regular file; give a {_known_suffixes()} file")
    name, _, split = path.partition(":")
    if not os.path.isdir(name):
        _refuse_strange_id(source, path)
    return source, "row", _dataset_rows(name, split or "train", column)


def _refuse_strange_id(source: str, path: str) -> None:
    """Raise PromptError for what was meant as a file or cannot be the id of a dataset.

    A mistyped path is then reported as one, and is not looked up on the Hub.
    """
    parent = os.path.dirname(path)
    # The id of a dataset has one slash at most, and its owner is hardly ever the name of a local
    # folder.
    nested = path.count("/") > 1 or (parent != "" and os.path.isdir(parent))
    meant_as_file = Path(path).suffix.lower() in READERS or path.startswith((".", "~", "/")) or nested
    if meant_as_file and "://" not in path:
        raise PromptError(f"prompts: no such file: {_short(source)}; check the path")
    if not DATASET_ID.fullmatch(path):
        raise PromptError(
            f"prompts: {_short(source)} is neither a file nor the id of a dataset; give 'shipped', 'digits', "
            f"a {_known_suffixes()} file, or an id such as owner/name:split"
        )


def _checked(where: str, value: object) -> str:
    """`value` stripped, possibly to nothing, if a text encoder can take it. Raises PromptError."""
    if not isinstance(value, str):
        kind = "nothing (null)" if value is None else f"{type(value).__name__} {_short(value)}"
        raise PromptError(f"prompts: {where}: the prompt is {kind}, not text; write a string or leave it out")
    prompt = value.strip()
    if len(prompt) > MAX_CHARACTERS:
        raise PromptError(
            f"prompts: {where}: a prompt of {len(prompt):,} characters, {_short(prompt)}, where {MAX_CHARACTERS:,} are "
            "allowed; is this the right file? Otherwise shorten or split it"
        )
    _refuse_nul(where, prompt)
    if not prompt.isascii():
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell such a half, and no tokenizer takes it
            raise PromptError(
                f"prompts: {where}: half a surrogate pair (\\u{ord(prompt[error.start]):04x}) in {_short(prompt)}; "
                "write the whole character"
            ) from error
    return prompt


def _refuse_nul(where: str, text: str) -> None:
    """Raise PromptError for a text with a NUL character."""
    if "\0" in text:
        at = text.index("\0")
        raise PromptError(
            f"prompts: {where}: a NUL character after {_short(text[max(0, at - 30) : at])}; "
            "save the file as UTF-8 text without it"
        )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text with its line end) of each line of a UTF-8 file.

    Raises PromptError, also for a line of more than MAX_LINE_BYTES.
    """
    with path.open("rb") as file:
        offset = 0
        # One byte beyond the bound tells a line that is too long, without reading the rest of it.
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            where = f"{path}, line {number}"
            if len(raw) > MAX_LINE_BYTES:
                start = _short(raw[:60].decode("utf-8", "replace"))
                raise PromptError(
                    f"prompts: {where}: {start} goes on for more than {MAX_LINE_BYTES:,} bytes; is this the right "
                    "file? Otherwise put each prompt on a line of its own"
                )
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                mark = len(raw) - len(error.object)  # utf-8-sig does not count the byte order mark
                raise PromptError(
                    f"prompts: {where}: not UTF-8, byte 0x{error.object[error.start]:02x} at offset "
                    f"{offset + mark + error.start} of the file; save it as UTF-8"
                ) from error
            _refuse_nul(where, text)
            yield number, text
            offset += len(raw)


def _text_rows(path: Path, column: str) -> Rows:
    """The lines of a .txt file, which has no columns."""
    for number, text in _lines(path):
        text = text.strip()
        if "\r" in text:
            raise PromptError(
                f"prompts: {path}, line {number}: a bare carriage return after {_short(text.partition(chr(13))[0])}; "
                "save the file with line ends LF or CRLF"
            )
        yield number, text


def _jsonl_rows(path: Path, column: str) -> Rows:
    """`column` of the object on each line of a .jsonl file."""
    for number, text in _lines(path):
        text = text.strip()
        if not text:
            yield number, text
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PromptError(
                f"prompts: {where}: no JSON ({one_line(error, 200)}): {_short(text)}; write one object a line"
            ) from error
        if not isinstance(row, dict):
            raise PromptError(
                f'prompts: {where}: JSON, but no object: {_short(text)}; write {{"{column}": "a prompt"}}'
            )
        _refuse_missing(where, column, row)
        yield number, row[column]


def _csv_rows(path: Path, column: str) -> Rows:
    """`column` of each record of a comma-separated file.

    The first record that is not blank names the columns.
    """
    table = csv.reader((text for _, text in _lines(path)), strict=True)
    column_index = None
    while True:
        number = table.line_num + 1  # the first line of the record, whose fields may span lines
        where = f"{path}, line {number}"
        try:
            record = next(table, None)
        except csv.Error as error:
            raise PromptError(
                f"prompts: {where}: no valid CSV ({one_line(error, 200)}); close each quote, and double those within"
            ) from error
        if record is None:
            return
        if not record:
            continue
        if column_index is None:
            names = [name.strip() for name in record]
            _refuse_missing(where, column, names)
            column_index = names.index(column)
        elif column_index >= len(record):
            raise PromptError(
                f"prompts: {where}: {len(record)} fields, {_short(','.join(record))}, where the first line has "
                f"{len(names)}; write {_short(column)} in every record"
            )
        else:
            yield number, record[column_index]


def _parquet_rows(path: Path, column: str) -> Rows:
    """`column` of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            _refuse_missing(str(path), column, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=BATCH_ROWS, columns=[column])
            cells = chain.from_iterable(batch.column(0) for batch in batches)
            for number, cell in enumerate(cells, 1):
                yield number, _cell_value(f"{path}, row {number}", cell)
    # UnicodeDecodeError comes from damaged column names.
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = one_line(error, 200)
        raise PromptError(f"prompts: {path}: no readable parquet file ({reason}); write it again") from error


def _cell_value(where: str, cell) -> object:
    """The Python value of a pyarrow scalar. Raises PromptError for text that is not UTF-8."""
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"prompts: {where}: not UTF-8, byte 0x{error.object[error.start]:02x} at offset {error.start} of the text; "
            "write the file again from UTF-8 text"
        ) from error


def _dataset_rows(name: str, split: str, column: str) -> Rows:
    """`column` of a Hugging Face dataset: an id on the Hub, or a folder of data files."""
    source = f"{name}:{split}"
    import datasets

    try:
        data = datasets.load_dataset(name, split=split, streaming=True)
        # Without a declared schema the first row tells; other columns are then dropped, so that no
        # image is decoded.
        columns = data.column_names or list(next(iter(data), {column: ""}))
        _refuse_missing(source, column, columns)
        for number, row in enumerate(data.select_columns([column]), 1):
            yield number, row[column]
    except PromptError:
        raise
    except Exception as error:  # what the Hub's client and its readers raise has no common base
        offline = " (offline: HF_HUB_OFFLINE is set)" if datasets.config.HF_HUB_OFFLINE else ""
        raise PromptError(
            f"prompts: the dataset {source} cannot be read{offline}: {one_line(error, 200)}; check the id, the split "
            f"and the connection, or give a {_known_suffixes()} file"
        ) from error


READERS: dict[str, tuple[str, Callable[[Path, str], Rows]]] = {
    ".txt": ("line", _text_rows),
    ".jsonl": ("line", _jsonl_rows),
    ".csv": ("line", _csv_rows),
    ".parquet": ("row", _parquet_rows),
}
"""For each suffix: "line" or "row", and the reader (path, column) -> rows."""


def _refuse_missing(where: str, column: str, columns) -> None:
    """Raise PromptError where `column` is not among `columns`."""
    if column in columns:
        return
    shown = ", ".join(_short(name) for name in islice(columns, 20)) or "none"
    more = ", ..." if len(columns) > 20 else ""
    raise PromptError(
        f"prompts: {where}: no column {_short(column)}; there are: {shown}{more}. Rename one, or name the one that "
        "holds the prompts"
    )


def _known_suffixes() -> str:
    """The suffixes of files that are read, for messages."""
    return "/".join(READERS)


def _short(value: object) -> str:
    """`value` in messages."""
    return shortened(value, 60)
