"""Captioned pictures of a folder or of webdataset tars: listed first, each read when it is wanted.

Nothing is unpacked. A member of a tar is a byte range of a file. Its name only groups it with other
members, and stands in messages; it never becomes a path.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from selfnpo_fast.runtime.errors import UserError, one_line, shortened

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
MEMBER_SUFFIXES = IMAGE_SUFFIXES | {".txt", ".json"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Formats that are read. Others that Pillow knows start programs (EPS) or are seldom meant."""
TABLES = ("metadata.jsonl", "metadata.csv")
MAX_IMAGE_BYTES, MAX_CAPTION_BYTES, MAX_SHARDS = 1 << 28, 1 << 20, 100_000

_BRACES = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}|\{([^{}]*,[^{}]*)\}")


@dataclass(frozen=True)
class Picture:
    """One captioned picture: a whole file, or a byte range of a tar."""

    label: str
    """The picture's name in messages."""
    caption: str
    """The caption, stripped."""
    path: Path
    """The image file, or the tar."""
    offset: int
    """The first byte of the picture in the file `path`."""
    size: int
    """The number of bytes from `offset` on."""
    mtime_ns: int
    """When `path` was last written to, in nanoseconds since 1970."""

    def read_square(self, resolution: int) -> torch.Tensor:
        """Read the picture, crop it to its central square and resize that.

        Gives (3, resolution, resolution) float32 in [-1, 1]. Raises UserError with the picture's
        label where it cannot be read.
        """
        try:
            if self.size > MAX_IMAGE_BYTES:
                raise ValueError(f"{self.size:,} bytes are no picture; at most {MAX_IMAGE_BYTES:,} are read")
            with self.path.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                image = opened.convert("RGB")
        except Exception as error:  # what Pillow raises for damaged files has no common base class
            unknown = isinstance(error, UnidentifiedImageError)
            reason = f"it is no {', '.join(FORMATS)}" if unknown else one_line(error)
            raise UserError(f"data.source: cannot read the image {self.label}: {reason}") from error
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


@dataclass(frozen=True)
class ImageSource:
    """The captioned pictures of a folder or of tars, not yet listed."""

    name: str
    """The absolute path, or the pattern of paths."""
    stamp: str
    """A SHA-256 that changes when a file is added, removed, renamed, resized or written to.

    It is made of names, sizes, times and, of folders, captions. Images and tars are not read for
    it.
    """
    pictures: Callable[[], list[Picture]]
    """Lists the pictures in a fixed order, at least one. Raises UserError."""


def open_source(source: str, limit: int) -> ImageSource:
    """The first `limit` captioned pictures of a folder, a .tar file, a folder of tars or a pattern.

    A folder holds images with captions in metadata.jsonl or metadata.csv (`file_name` and `text`),
    or in a .txt file of the same name for each image. Tars are webdataset shards: the members of a
    sample follow each other and share a name up to its first dot. A sample is an image and a .txt,
    or an image and a .json with a `caption`; members with other suffixes are passed over. A pattern
    is a path with braces: {000..012} counts, {a,b} lists. Raises UserError with the name of the bad
    file or member.
    """
    name = os.path.abspath(os.path.expanduser(source))
    if os.path.isdir(name):
        folder = Path(name)
        shards = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".tar")
        if shards and not _holds_images(folder):
            return _tar_source(source, name, shards, limit)
        return _folder_source(source, folder, limit)
    if os.path.isfile(name) or _BRACES.search(source):
        paths = [name] if os.path.isfile(name) else _expanded(source, name)
        return _tar_source(source, name, [Path(path) for path in paths], limit)
    raise UserError(
        f"data.source: no such folder: {source}; give a folder of images with captions, webdataset tars (a file, a "
        "folder of them, or a pattern such as data/{000..012}.tar), or 'digits'"
    )


def _stamp(facts: Iterable[tuple]) -> str:
    """The SHA-256 of tuples of plain values, in order."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(json.dumps(fact).encode() + b"\n")
    return digest.hexdigest()


def _caption(text: str, where: str) -> str:
    """`text` stripped. Raises UserError, which names `where`, for half a surrogate pair.

    JSON can spell such a half, and no tokenizer takes it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"data.source: {where}: half a surrogate pair in the caption; write it whole") from error
    return text.strip()


# Folders


def _holds_images(folder: Path) -> bool:
    """Whether a folder holds images or a table of them."""
    return any(path.name in TABLES or path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())


def _folder_source(source: str, folder: Path, limit: int) -> ImageSource:
    """The pictures of a folder of images. Raises UserError where there are none."""
    pairs = _captioned(folder)[:limit]
    if not pairs:
        raise UserError(
            f"data.source: {source} holds no captioned images (metadata.jsonl, metadata.csv or .txt files) and no tars"
        )
    pictures = []
    for path, caption in pairs:
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"data.source: cannot read the image {path}: {one_line(error)}") from error
        pictures.append(Picture(str(path), caption, path, 0, stat.st_size, stat.st_mtime_ns))
    stamp = _stamp((p.label, p.size, p.mtime_ns, p.caption) for p in pictures)
    return ImageSource(str(folder), stamp, lambda: pictures)


def _captioned(folder: Path) -> list[tuple[Path, str]]:
    """(image, caption) of all pictures, in a fixed order; the paths lie in the resolved folder."""
    folder = folder.resolve()
    for name in TABLES:
        table = folder / name
        if table.is_file():
            return [_row(folder, table, number, row) for number, row in enumerate(_rows(table), 1)]
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    missing = [path.name for path in images if not path.with_suffix(".txt").is_file()]
    if missing:
        raise UserError(f"data.source: {folder / missing[0]} has no caption; put it into {Path(missing[0]).stem}.txt")
    texts = (path.with_suffix(".txt") for path in images)
    return [(path, _caption(_read_text(text), str(text))) for path, text in zip(images, texts, strict=True)]


def _read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises UserError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.source: {path} cannot be read as UTF-8 text: {error}") from error


def _rows(table: Path) -> list[dict]:
    """The rows of a .csv file, or the values of the lines of a .jsonl file. Raises UserError."""
    text = _read_text(table)
    if table.suffix == ".csv":
        try:
            return list(csv.DictReader(io.StringIO(text, newline="")))
        except csv.Error as error:
            raise UserError(f"data.source: {table} is not CSV: {error}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"data.source: {table} line {number} is not JSON: {one_line(error)}") from error
    return rows


def _row(folder: Path, table: Path, number: int, row: object) -> tuple[Path, str]:
    """(image, caption) of row `number` of a table. Raises UserError, also for images elsewhere."""
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not isinstance(row.get("text"), str):
        raise UserError(f"data.source: {table} row {number} needs the strings file_name and text")
    path = (folder / row["file_name"]).resolve()
    if not path.is_relative_to(folder):
        raise UserError(f"data.source: {table} row {number}: {row['file_name']!r} lies outside {folder}")
    return path, _caption(row["text"], f"{table} row {number}")


# Tars


def _expanded(source: str, pattern: str) -> list[str]:
    """All paths that `pattern` stands for, in order; `source` names the pattern in messages."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last, listed = found.groups()
    tails = _expanded(source, pattern[found.end() :])
    middles = listed.split(",") if listed is not None else range(int(first), int(last) + 1)
    if not 1 <= len(middles) * len(tails) <= MAX_SHARDS:
        raise UserError(f"data.source: {source} stands for no name, or for more than {MAX_SHARDS:,}")
    if listed is None:
        middles = [f"{number:0{len(first)}d}" for number in middles]
    return [pattern[: found.start()] + middle + tail for middle in middles for tail in tails]


def _tar_source(source: str, name: str, shards: list[Path], limit: int) -> ImageSource:
    """The pictures of tars, which are opened only to list them. Raises UserError."""
    facts = []
    for shard in shards:
        try:
            stat = shard.stat()
        except OSError as error:
            raise UserError(f"data.source: cannot read {shard}: {one_line(error)}") from error
        facts.append((str(shard), stat.st_size, stat.st_mtime_ns))

    def pictures() -> list[Picture]:
        """The first `limit` pictures of all shards, in order."""
        found: list[Picture] = []
        for shard in shards:
            found += _shard_pictures(shard, limit - len(found))
            if len(found) == limit:
                return found
        if not found:
            raise UserError(f"data.source: {source} holds no images with captions (key.jpg with key.txt or key.json)")
        return found

    return ImageSource(name, _stamp(facts), pictures)


def _shard_pictures(shard: Path, limit: int) -> list[Picture]:
    """The first `limit` captioned pictures of a tar, in the order of its members."""
    found = []
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for sample in _samples(shard, tar):
                picture = _picture(shard, file, sample)
                if picture is not None:
                    found.append(picture)
                if len(found) == limit:
                    return found
            # tarfile takes a damaged header for the end, but a whole tar ends in blocks of zeros.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"data.source: {shard} is damaged or cut short at byte {tar.offset:,}")
    except UserError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        raise UserError(f"data.source: cannot read {shard} as an uncompressed tar: {one_line(error)}") from error
    return found


def _samples(shard: Path, tar: tarfile.TarFile) -> Iterator[dict[str, tarfile.TarInfo]]:
    """The members of each sample by suffix (.jpg, .txt, ...); other members are left out.

    The members of a sample follow each other and share folder and stem, which are its key.
    """
    key, sample = None, {}
    for member in tar:
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        suffix = "." + suffix.lower()
        if not stem or suffix not in MEMBER_SUFFIXES or member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise UserError(f"data.source: {_label(shard, member)} is a link, a device or sparse, no plain file")
        if (folder, stem) != key:
            if sample:
                yield sample
            key, sample = (folder, stem), {}
        if suffix in sample:
            raise UserError(f"data.source: {_label(shard, member)} is there twice")
        sample[suffix] = member
    if sample:
        yield sample


def _picture(shard: Path, file: BinaryIO, sample: dict[str, tarfile.TarInfo]) -> Picture | None:
    """The captioned picture of a sample, or None if it has no image; `file` is the open shard."""
    images = [suffix for suffix in sample if suffix in IMAGE_SUFFIXES]
    if not images:
        return None
    member = sample[images[0]]
    label = _label(shard, member)
    if len(images) > 1:
        raise UserError(f"data.source: {label} is one of {len(images)} images of the same key; keep one")
    text = sample.get(".txt") or sample.get(".json")
    if text is None:
        raise UserError(f"data.source: {label} has no caption; put a .txt, or a .json with a caption, after it")
    where = _label(shard, text)
    if text.size > MAX_CAPTION_BYTES:
        raise UserError(f"data.source: {where}: {text.size:,} bytes; at most {MAX_CAPTION_BYTES:,} are a caption")
    file.seek(text.offset_data)
    content = file.read(text.size)
    try:
        caption = content.decode("utf-8-sig")
        if text is sample.get(".json"):
            caption = json.loads(caption)["caption"]
        if not isinstance(caption, str):
            raise TypeError("the caption is no string")
    except (ValueError, RecursionError, TypeError, LookupError) as error:
        kind = "UTF-8 text" if text is sample.get(".txt") else "JSON with a string `caption`"
        raise UserError(f"data.source: {where} cannot be read as {kind}: {one_line(error)}") from error
    mtime_ns = os.fstat(file.fileno()).st_mtime_ns
    return Picture(label, _caption(caption, where), shard, member.offset_data, member.size, mtime_ns)


def _label(shard: Path, member: tarfile.TarInfo) -> str:
    """A member in messages: on one line, though its name may hold anything."""
    return f"{shard}, member {shortened(member.name, 100)}"
