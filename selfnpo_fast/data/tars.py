"""Webdataset tars as a source of pictures: listed without unpacking, with bounds on every header.

A member is a byte range of a file. Its name only groups it with other members, and stands in
messages; it never becomes a path. Headers are read one after the other here, since Python's tarfile
reads headers of any size, keeps all members in memory and recurses for each pax header.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from selfnpo_fast.data.listing import FilePicture, Listing
from selfnpo_fast.data.pixels import IMAGE_SUFFIXES, OTHER_SUFFIXES
from selfnpo_fast.data.rows import checked, shown
from selfnpo_fast.runtime.errors import UserError, one_line, shortened
from selfnpo_fast.runtime.files import open_regular
from selfnpo_fast.runtime.limits import MAX_LINE_BYTES, MAX_TAR_HEADER_BYTES, MAX_TAR_MEMBERS

CAPTION_SUFFIXES = (".txt", ".caption", ".json")
"""Of captions, the preferred first."""

_KEY_AND_FIELD = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
"""webdataset's own expression: the key ends at the first dot of the base name."""
_BLOCK = tarfile.BLOCKSIZE
_NAME_HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_OTHER_HEADERS = (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)


@dataclass(frozen=True)
class Member:
    """One member of a tar."""

    name: str
    """The name, which may hold anything."""
    offset: int
    """The first byte of its content in the tar."""
    size: int
    """The number of bytes of its content."""
    plain: bool
    """Whether it is a file whose bytes lie in the tar as they are."""
    folder: bool
    """Whether it is a folder."""


def list_tar(shard: Path, listing: Listing) -> None:
    """Add the captioned pictures of an uncompressed tar, in its order, to `listing`.

    Members whose names share folder and stem up to the first dot are a sample, as webdataset reads
    them; the rest of a name is the field. A field that ends in a picture's suffix is a picture, and
    its caption is the field of the same name with .txt, .caption or .json. Raises UserError for a
    damaged tar.
    """
    with open_regular(shard, listing.field) as file:
        try:
            for key, fields in _samples(shard, file, listing):
                _add_sample(shard, file, key, fields, listing)
                if listing.full:
                    listing.more = True
                    return
        except OSError as error:
            raise UserError(f"{listing.field}: cannot read {shown(shard)}: {one_line(error)}") from error


# Headers


def members(shard: Path, file: IO[bytes], field: str) -> Iterator[Member]:
    """The members of a tar (ustar, GNU or pax), in order. Raises UserError for a damaged tar."""
    total, at = os.fstat(file.fileno()).st_size, 0
    facts: dict[str, str] = {}  # what the headers before a member say of it
    for _ in range(MAX_TAR_MEMBERS):
        file.seek(at)
        block = file.read(_BLOCK)
        if len(block) == _BLOCK and not any(block):  # a whole tar ends in blocks of zeros
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            if at == 0:
                reason = one_line(error)
                raise UserError(f"{field}: cannot read {shown(shard)} as an uncompressed tar: {reason}") from error
            raise _damaged(shard, at, field) from error
        start = at + _BLOCK
        if info.type in _NAME_HEADERS + _OTHER_HEADERS:
            size = info.size
        else:
            size = _size(info, facts)
        if not 0 <= size <= total - start:
            raise _damaged(shard, at, field)
        at = start + -(-size // _BLOCK) * _BLOCK
        if info.type in _NAME_HEADERS + _OTHER_HEADERS:
            if size > MAX_TAR_HEADER_BYTES:
                raise UserError(
                    f"{field}: {shown(shard)}: a header of {size:,} bytes at byte {start - _BLOCK:,}; "
                    f"at most {MAX_TAR_HEADER_BYTES:,} are read"
                )
            if info.type in _NAME_HEADERS:
                facts |= _facts(info.type, file.read(size), lambda at=start: _damaged(shard, at, field))
            continue
        if info.type == tarfile.GNUTYPE_SPARSE:
            at = _skip_sparse_map(file, block, start, total) + at - start
        sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in facts)
        yield Member(facts.get("path", info.name), start, size, info.isreg() and not sparse, info.isdir())
        facts = {}
    raise UserError(f"{field}: {shown(shard)} has more than {MAX_TAR_MEMBERS:,} members; split it")


def _damaged(shard: Path, at: int, field: str) -> UserError:
    """The error for what is wrong at byte `at` of a tar."""
    return UserError(f"{field}: {shown(shard)} is damaged or cut short at byte {at:,}")


def _size(info: tarfile.TarInfo, facts: dict[str, str]) -> int:
    """The bytes of a member's content in the tar; -1 for a size that is no number."""
    if not info.isreg() and info.type in tarfile.SUPPORTED_TYPES:
        return 0  # a link, folder or device, whatever its header says
    size = facts.get("size", "")
    if not size:
        return info.size
    return int(size) if size.isascii() and size.isdecimal() and len(size) <= 20 else -1


def _facts(kind: bytes, content: bytes, damaged) -> dict[str, str]:
    """What a header of a member's name (GNU) or of records (pax: "LENGTH KEY=VALUE\\n") says."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    facts, at = {}, 0
    while at < len(content) and content[at]:  # some writers fill the block with zeros
        digits = content[at : at + 20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = content[at + len(digits) + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n") or at + length > len(content):
            raise damaged()
        facts[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        at += length
    return facts


def _skip_sparse_map(file: IO[bytes], block: bytes, start: int, total: int) -> int:
    """Where the content of a sparse member (old GNU) begins: after the blocks of its map."""
    more, at = block[482], start
    while more and at < total:
        file.seek(at)
        extension = file.read(_BLOCK)
        more, at = len(extension) == _BLOCK and extension[504], at + _BLOCK
    return at


# Samples


def _samples(shard: Path, file: IO[bytes], listing: Listing) -> Iterator[tuple[str, dict[str, Member]]]:
    """The key of each sample, and its members by field, such as png or 0.png, in lower case.

    Members that are neither pictures nor captions are left out.
    """
    key, sample = "", {}
    for member in members(shard, file, listing.field):
        suffix = os.path.splitext(member.name)[1].lower()
        label = _label(shard, member)
        if member.folder or suffix not in IMAGE_SUFFIXES | OTHER_SUFFIXES | set(CAPTION_SUFFIXES):
            continue
        found = _KEY_AND_FIELD.fullmatch(member.name)
        if found is None:  # the base name begins with a dot
            listing.pass_over("hidden files", label)
        elif suffix in OTHER_SUFFIXES:
            listing.pass_over("of a kind that is not read", label)
        elif not member.plain:
            listing.refuse(UserError(f"{listing.field}: {label} is a link, a device or sparse, no plain file"))
        else:
            if found[1] != key:
                if sample:
                    yield key, sample
                key, sample = found[1], {}
            field = found[2].lower()
            if field in sample:
                listing.refuse(UserError(f"{listing.field}: {label} is there twice"))
            else:
                sample[field] = member
    if sample:
        yield key, sample


def _add_sample(shard: Path, file: IO[bytes], key: str, fields: dict[str, Member], listing: Listing) -> None:
    """Add the pictures of a sample to `listing`, until it is full."""
    images: dict[str, list[Member]] = {}  # by the field without its suffix, which is mostly empty
    captions: dict[str, dict[str, Member]] = {}
    for field, member in fields.items():
        stem, suffix = os.path.splitext("." + field)
        stem, suffix = (stem, suffix) if suffix else ("", stem)
        if suffix in IMAGE_SUFFIXES:
            images.setdefault(stem, []).append(member)
        else:
            captions.setdefault(stem, {})[suffix] = member
    if not images:
        listing.pass_over("captions without a picture", _label(shard, next(iter(fields.values()))))
    for stem, found in images.items():
        if listing.full:
            return
        label = _label(shard, found[0])
        texts = captions.get(stem) or (captions.get("") if len(images) == 1 else None)
        if texts is None and stem and "" in images:
            listing.pass_over("further pictures of a sample", label)
            continue
        try:
            if len(found) > 1:
                raise UserError(f"{listing.field}: {label} is one of {len(found)} images of the same key; keep one")
            if texts is None:
                raise UserError(
                    f"{listing.field}: {label} has no caption; put a .txt, a .caption, or a .json with a caption, "
                    "after it"
                )
            suffix = next(suffix for suffix in CAPTION_SUFFIXES if suffix in texts)
            caption = _caption(shard, file, texts[suffix], suffix, listing)
        except UserError as error:
            listing.refuse(error)
            continue
        mtime_ns = os.fstat(file.fileno()).st_mtime_ns
        listing.pictures.append(FilePicture(label, caption, shard, found[0].offset, found[0].size, mtime_ns))


def _caption(shard: Path, file: IO[bytes], member: Member, suffix: str, listing: Listing) -> str:
    """The caption in a member. Raises UserError."""
    where, key = _label(shard, member), listing.column or "caption"
    if member.size > MAX_LINE_BYTES:
        raise UserError(f"{listing.field}: {where}: {member.size:,} bytes; at most {MAX_LINE_BYTES:,} are a caption")
    file.seek(member.offset)
    try:
        text = file.read(member.size).decode("utf-8-sig")
        value = json.loads(text)[key] if suffix == ".json" else text
        if not isinstance(value, str | list):
            raise TypeError("the caption is no string")
    except (ValueError, RecursionError, TypeError, LookupError) as error:
        kind = f"JSON with a string `{key}`" if suffix == ".json" else "UTF-8 text"
        raise UserError(f"{listing.field}: {where} cannot be read as {kind}: {one_line(error)}") from error
    return checked(listing.field, where, value)


def _label(shard: Path, member: Member) -> str:
    """A member in messages: on one line, though its name may hold anything."""
    return f"{shown(shard)}, member {shortened(member.name, 100)}"
