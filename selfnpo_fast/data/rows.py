"""Rows of text files and tables that somebody else has written, streamed and checked.

Memory holds one bounded line or batch. Every function takes `field`, the config's field that named
the file, for the start of its errors. A row that is bad by itself comes as the UserError that
refuses it, so that a reader may go on with the next one; a damaged file raises.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import UserError, one_line, shortened
from selfnpo_fast.runtime.files import open_regular
from selfnpo_fast.runtime.limits import MAX_LINE_BYTES, MAX_PROMPT_CHARACTERS

BATCH_ROWS = 1024
"""Rows of a parquet file that are read at once."""

Rows = Iterator[tuple[int, tuple | UserError]]
"""(line or row number counted from 1, the wanted columns' values or why the row is refused)."""


def short(value: object) -> str:
    """`value` in messages."""
    return shortened(value, 60)


def shown(name: object) -> str:
    """The name of a file in messages: as it is if it can be printed on one line, else quoted.

    It is cut where it is longer than a path can be.
    """
    text = str(name)[:4096]
    return text if text.isprintable() else ascii(text)


def checked(field: str, where: str, value: object) -> str:
    """`value` stripped, possibly to nothing, if a text encoder can take it.

    Of a list, such as some data sets hold for each picture, it is the first text. Raises UserError
    for what is no text, is longer than MAX_PROMPT_CHARACTERS, or holds NUL or half a surrogate
    pair.
    """
    noun = field.removesuffix("s") if field == "prompts" else "caption"
    if isinstance(value, list) and value:
        value = value[0]
        say_once(f"{field}: of a list of {noun}s the first is used")
    if not isinstance(value, str):
        kind = "nothing (null)" if value is None else f"{type(value).__name__} {short(value)}"
        raise UserError(f"{field}: {where}: the {noun} is {kind}, not text; write a string or leave it out")
    text = value.strip()
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise UserError(
            f"{field}: {where}: a {noun} of {len(text):,} characters, {short(text)}, where "
            f"{MAX_PROMPT_CHARACTERS:,} are allowed; is this the right file? Otherwise shorten or split it"
        )
    refuse_nul(field, where, text)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell such a half, and no tokenizer takes it
            raise UserError(
                f"{field}: {where}: half a surrogate pair (\\u{ord(text[error.start]):04x}) in {short(text)}; "
                "write the whole character"
            ) from error
    return text


def refuse_nul(field: str, where: str, text: str) -> None:
    """Raise UserError for a text with a NUL character."""
    if "\0" in text:
        at = text.index("\0")
        raise UserError(
            f"{field}: {where}: a NUL character after {short(text[max(0, at - 30) : at])}; "
            "save the file as UTF-8 text without it"
        )


def refuse_missing(field: str, where: str, columns: Sequence[str], present) -> None:
    """Raise UserError for the first of `columns` that is not among those `present`."""
    for column in columns:
        if column not in present:
            shown = ", ".join(short(name) for name in islice(present, 20)) or "none"
            more = ", ..." if len(present) > 20 else ""
            raise UserError(
                f"{field}: {where}: no column {short(column)}; there are: {shown}{more}. Rename one, or name the one "
                f"that holds the prompts ({field.partition('.')[0]}.column)"
            )


def lines(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """(number, text with its line end) of each line of a UTF-8 file.

    Raises UserError, also for a line of more than MAX_LINE_BYTES and for what is no regular file.
    """
    with open_regular(path, field) as file:
        offset = 0
        # One byte beyond the bound tells a line that is too long, without reading the rest of it.
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            where = f"{shown(path)}, line {number}"
            if len(raw) > MAX_LINE_BYTES:
                start = short(raw[:60].decode("utf-8", "replace"))
                raise UserError(
                    f"{field}: {where}: {start} goes on for more than {MAX_LINE_BYTES:,} bytes; is this the right "
                    "file? Otherwise put each prompt on a line of its own"
                )
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                mark = len(raw) - len(error.object)  # utf-8-sig does not count the byte order mark
                raise UserError(
                    f"{field}: {where}: not UTF-8, byte 0x{error.object[error.start]:02x} at offset "
                    f"{offset + mark + error.start} of the file; save it as UTF-8"
                ) from error
            refuse_nul(field, where, text)
            yield number, text
            offset += len(raw)


def text_rows(path: Path, columns: Sequence[str], field: str) -> Rows:
    """The lines of a .txt file, which has no columns."""
    for number, text in lines(path, field):
        text = text.strip()
        if "\r" in text:
            start = short(text.partition("\r")[0])
            raise UserError(
                f"{field}: {shown(path)}, line {number}: a bare carriage return after {start}; "
                "save the file with line ends LF or CRLF"
            )
        yield number, (text,)


def jsonl_rows(path: Path, columns: Sequence[str], field: str) -> Rows:
    """`columns` of the object on each line of a .jsonl file; blank lines are left out."""
    for number, text in lines(path, field):
        text = text.strip()
        if text:
            try:
                yield number, _json_values(f"{shown(path)}, line {number}", text, columns, field)
            except UserError as error:
                yield number, error


def _json_values(where: str, text: str, columns: Sequence[str], field: str) -> tuple:
    """`columns` of a JSON object. Raises UserError."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{field}: {where}: no JSON ({one_line(error, 200)}): {short(text)}; write one object a line"
        ) from error
    if not isinstance(row, dict):
        example = ", ".join(f'"{column}": "..."' for column in columns)
        raise UserError(f"{field}: {where}: JSON, but no object: {short(text)}; write {{{example}}}")
    refuse_missing(field, where, columns, row)
    return tuple(row[column] for column in columns)


def csv_rows(path: Path, columns: Sequence[str], field: str) -> Rows:
    """`columns` of each record of a comma-separated file.

    The first record that is not blank names the columns.
    """
    table = csv.reader((text for _, text in lines(path, field)), strict=True)
    places: list[int] = []
    while True:
        number = table.line_num + 1  # the first line of the record, whose fields may span lines
        where = f"{shown(path)}, line {number}"
        try:
            record = next(table, None)
        except csv.Error as error:
            raise UserError(
                f"{field}: {where}: no valid CSV ({one_line(error, 200)}); close each quote, and double those within"
            ) from error
        if record is None:
            return
        if not record:
            continue
        if not places:
            names = [name.strip() for name in record]
            refuse_missing(field, where, columns, names)
            places = [names.index(column) for column in columns]
        elif max(places) >= len(record):
            yield (
                number,
                UserError(
                    f"{field}: {where}: {len(record)} fields, {short(','.join(record))}, where the first line has "
                    f"{len(names)}; write {', '.join(map(short, columns))} in every record"
                ),
            )
        else:
            yield number, tuple(record[place] for place in places)


def cell_value(field: str, where: str, cell) -> object:
    """The Python value of a pyarrow scalar. Raises UserError for text that is not UTF-8."""
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{field}: {where}: not UTF-8, byte 0x{error.object[error.start]:02x} at offset {error.start} of the text; "
            "write the file again from UTF-8 text"
        ) from error


def parquet_rows(path: Path, columns: Sequence[str], field: str) -> Rows:
    """`columns` of a parquet file; other columns are not read."""
    import pyarrow
    import pyarrow.parquet

    open_regular(path, field).close()
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            refuse_missing(field, shown(path), columns, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns)):
                found = [batch.column(column) for column in columns]
                for cells in zip(*found, strict=True):
                    number += 1
                    where = f"{shown(path)}, row {number}"
                    yield number, tuple(cell_value(field, where, cell) for cell in cells)
    # UnicodeError comes from damaged column names and from paths that are no text, KeyError from two
    # columns of one name.
    except (pyarrow.ArrowException, OSError, UnicodeError, KeyError) as error:
        reason = one_line(error, 200)
        raise UserError(f"{field}: {shown(path)}: no readable parquet file ({reason}); write it again") from error
