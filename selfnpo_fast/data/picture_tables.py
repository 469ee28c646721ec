"""Tables that hold encoded pictures in their rows: parquet files and Hugging Face datasets.

A column of pictures holds bytes, or what datasets' Image feature writes: {bytes, path}. Rows are
read one after the other; a picture further back costs a start from its row group.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from selfnpo_fast.data.listing import Listing, Picture
from selfnpo_fast.data.rows import checked, parquet_rows, refuse_missing, shown
from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_fast.runtime.files import open_regular
from selfnpo_fast.runtime.limits import MAX_IMAGE_BYTES

BATCH_PICTURES = 16
"""Rows with pictures that are in memory at once."""


@dataclass(frozen=True)
class Table:
    """A table of pictures."""

    name: str
    """The file, or the data set and its split, in messages."""
    column: str
    """The column of pictures."""
    jump: ClassVar[int] = 64 * BATCH_PICTURES
    """Rows ahead from which a new start is faster than reading on."""

    @abstractmethod
    def values(self, start: int) -> Iterator[object]:
        """The values of `column` from row `start` (counted from 0) on. May raise any exception."""

    def mtime_ns(self) -> int:
        """When the table was last written to, in nanoseconds since 1970; 0 if it has no such time."""
        return 0


@dataclass(frozen=True)
class RowPicture(Picture):
    """A picture in a row of a table."""

    table: Table
    """The table."""
    row: int
    """The row, counted from 0."""
    stamp: int
    """The table's size or version, as a number."""
    mtime_ns: int
    """`table.mtime_ns()` when the picture was listed."""

    @property
    def facts(self) -> tuple[int, int, int]:
        """The row, and what changes with the table."""
        return self.row, self.stamp, self.mtime_ns

    def content(self) -> bytes:
        """The bytes in the table. Raises ValueError."""
        try:
            if self.table.mtime_ns() != self.mtime_ns:
                raise ValueError(f"{self.table.name} has been written to since the run looked at it; start again")
            value = _cursor.read(self.table, self.row)
        except Exception as error:  # pyarrow's and the Hub client's exceptions have no common base
            raise ValueError(one_line(error)) from error
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                raise ValueError(
                    "the row names a file and does not hold the picture; download the data set with its files and "
                    "name that folder"
                )
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise ValueError(f"the row holds {type(value).__name__}, no bytes")
        if len(value) > MAX_IMAGE_BYTES:
            raise ValueError(f"{len(value):,} bytes are no picture; at most {MAX_IMAGE_BYTES:,} are read")
        return value


class _Cursor:
    """The table that is being read, and how far; one picture after the other is cheap."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.table: Table | None = None
        self.next, self.values = 0, iter(())

    def read(self, table: Table, row: int) -> object:
        """The picture column's value in a row of a table."""
        with self.lock:
            if table != self.table or row < self.next or row > self.next + table.jump:
                self.table, self.next, self.values = None, row, table.values(row)
                self.table = table
            try:
                for value in self.values:
                    self.next += 1
                    if self.next > row:
                        return value
            except BaseException:
                self.table = None
                raise
            self.table = None
            raise ValueError(f"{table.name} has no row {row + 1} any more")


_cursor = _Cursor()


# Parquet files


@dataclass(frozen=True)
class ParquetTable(Table):
    """A parquet file."""

    path: Path
    """The file."""

    def mtime_ns(self) -> int:
        """That of the file."""
        return self.path.stat().st_mtime_ns

    def values(self, start: int) -> Iterator[object]:
        """Row groups before that of `start` are not read."""
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.path, pre_buffer=False) as file:
            first = group = 0
            while group < file.num_row_groups and first + file.metadata.row_group(group).num_rows <= start:
                first, group = first + file.metadata.row_group(group).num_rows, group + 1
            groups = list(range(group, file.num_row_groups))
            for batch in file.iter_batches(BATCH_PICTURES, row_groups=groups, columns=[self.column]):
                for cell in batch.column(self.column)[max(0, start - first) :]:
                    yield cell.as_py()
                first += batch.num_rows


def list_parquet(path: Path, listing: Listing) -> None:
    """Add the pictures of a parquet file, in order, to `listing`. Raises UserError."""
    wanted = listing.column or "text"
    table, facts = ParquetTable(shown(path), _picture_column(path, listing.field), path), path.stat()
    with closing(parquet_rows(path, (wanted,), listing.field)) as rows:
        for number, values in rows:
            if listing.full:
                listing.more = True
                return
            where = f"{shown(path)}, row {number}"
            try:
                caption = checked(listing.field, where, values[0])
            except UserError as error:
                listing.refuse(error)
            else:
                picture = RowPicture(where, caption, table, number - 1, facts.st_size, facts.st_mtime_ns)
                listing.pictures.append(picture)


def _picture_column(path: Path, field: str) -> str:
    """The first column of a parquet file that holds bytes, or {bytes, path}. Raises UserError."""
    import pyarrow
    import pyarrow.parquet

    open_regular(path, field).close()
    try:
        schema = pyarrow.parquet.read_schema(path)
        for column in schema:
            kind = column.type
            if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                kind = kind.field("bytes").type
            if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
                return column.name
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        reason = one_line(error, 200)
        raise UserError(f"{field}: {shown(path)}: no readable parquet file ({reason}); write it again") from error
    raise UserError(
        f"{field}: {shown(path)} has no column of pictures: bytes, or {{bytes, path}} as datasets' Image writes it"
    )


# Hugging Face datasets


@dataclass(frozen=True)
class HubTable(Table):
    """A split of a data set on the Hub or in a folder, which is streamed."""

    source: str
    """The id or the folder."""
    split: str
    """The split."""
    jump: ClassVar[int] = 1 << 62

    def stream(self):
        """The split as datasets' IterableDataset, with pictures left encoded."""
        import datasets

        return datasets.load_dataset(self.source, split=self.split, streaming=True).decode(False)

    def values(self, start: int) -> Iterator[object]:
        """Rows before `start` are streamed too."""
        for row in self.stream().select_columns([self.column]).skip(start):
            yield row[self.column]


def version(source: str) -> str:
    """What changes when a data set changes: its commit on the Hub, or its files' sizes and times.

    Raises any exception.
    """
    import datasets

    builder = datasets.load_dataset_builder(source)
    files = {split: list(map(str, found.origin_metadata)) for split, found in (builder.config.data_files or {}).items()}
    return f"{builder.hash} {sorted(files.items())}"


def list_dataset(source: str, split: str, stamp: int, listing: Listing) -> None:
    """Add the pictures of a split of a Hugging Face dataset to `listing`. Raises UserError.

    `stamp` changes with the version of the dataset.
    """
    import datasets

    name, caption = f"{source}:{split}", listing.column or "text"
    try:
        data = HubTable(name, "", source, split).stream()
        features = data.features or {}
        refuse_missing(listing.field, name, [caption], list(features))
        column = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
        if column is None:
            raise UserError(f"{listing.field}: {name} has no column of datasets' Image; there are: {list(features)}")
        table = HubTable(name, column, source, split)
        for number, row in enumerate(data.select_columns([caption]), 1):
            if listing.full:
                listing.more = True
                return
            where = f"{name}, row {number}"
            try:
                text = checked(listing.field, where, row[caption])
            except UserError as error:
                listing.refuse(error)
            else:
                listing.pictures.append(RowPicture(where, text, table, number - 1, stamp, 0))
    except UserError:
        raise
    except Exception as error:  # what the Hub's client and its readers raise has no common base
        raise cannot_read(listing.field, name, error) from error


def cannot_read(field: str, name: str, error: Exception) -> UserError:
    """The error for a data set that the Hub or its reader has not given."""
    import datasets

    offline = " (offline: HF_HUB_OFFLINE is set)" if datasets.config.HF_HUB_OFFLINE else ""
    return UserError(
        f"{field}: the dataset {name} cannot be read{offline}: {one_line(error, 200)}; check the id, the split and "
        "the connection, or give a file"
    )
