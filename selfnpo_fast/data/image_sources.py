"""What `data.source` names: captioned pictures in folders, tars, parquet files or a dataset, or
videos in folders.

Sources are listed first, and each picture is read when it is wanted. Nothing is unpacked.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from selfnpo_fast.data.image_folders import TABLES, list_folder, walk
from selfnpo_fast.data.listing import ClipShape, Listing, passed
from selfnpo_fast.data.picture_tables import cannot_read, list_dataset, list_parquet, version
from selfnpo_fast.data.pixels import IMAGE_SUFFIXES
from selfnpo_fast.data.rows import shown
from selfnpo_fast.data.tars import list_tar
from selfnpo_fast.data.videos import check_decoder, is_video, list_video, list_videos
from selfnpo_fast.runtime.errors import UserError, one_line, shortened
from selfnpo_fast.runtime.limits import MAX_SHARDS

DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
"""`owner/name:split` as on the Hub; owner and split may be left out."""

BRACES = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}|\{([^{}]*,[^{}]*)\}")
"""A part of a pattern of paths: a range of numbers, or alternatives."""
_OTHER_SPLIT = re.compile(r"(test|validation|valid|val|dev|eval)(?![a-z])")
_LISTERS = {".tar": list_tar, ".parquet": list_parquet}


@dataclass(frozen=True)
class ImageSource:
    """The captioned pictures of a source, not yet listed."""

    name: str
    """The absolute path, the pattern of paths, or the id of a dataset and its split."""
    stamp: str
    """A SHA-256 that changes when a file is added, removed, renamed, resized or written to.

    It is made of names, sizes, times and, of folders, captions; of a dataset it is made of its
    version. Images, tars and tables are not read for it.
    """
    listing: Callable[[], Listing]
    """Lists the pictures in a fixed order, at least one. Raises UserError."""


def open_source(
    source: str,
    limit: int,
    *,
    column: str | None = None,
    skip: bool = False,
    field: str = "data.source",
    clip: ClipShape | None = None,
) -> ImageSource:
    """The first `limit` captioned pictures of what `source` names:

    - a folder of images, with its sub-folders: captions lie in metadata.jsonl or metadata.csv
      (`file_name` and `text`), or in a .txt or .caption file of the same name for each image
    - webdataset tars (`tars.list_tar`): a .tar file, a folder of them, or a pattern, which is a path
      with braces: {000..012} counts, {a,b} lists
    - parquet files with encoded pictures, named likewise
    - `id:split`, a Hugging Face dataset or a folder of one; without a split it is `train`

    `column` names the column or JSON key of captions. With `skip` what cannot be used is counted
    and passed over; otherwise it raises UserError with the name of the bad file or member. `field`
    is the config's field that named the source.

    With `clip` the source holds videos: it is an .mp4 file, or a folder of them or of folders of
    frames (`videos.list_videos`).
    """
    listing = Listing(source, limit, column=column, skip=skip, field=field, clip=clip)
    name = os.path.abspath(os.path.expanduser(source))
    if clip is not None:
        return _video_source(source, name, listing)
    if os.path.isdir(name):
        kind = find_kind(Path(name))
        if kind in _LISTERS:
            return _file_source(name, _files(Path(name), kind, listing), listing)
        return _folder_source(name, listing)
    if os.path.isfile(name) or BRACES.search(source):
        paths = [name] if os.path.isfile(name) else _expanded(source, name, field)
        return _file_source(name, [Path(path) for path in paths], listing)
    if os.path.exists(name):
        raise UserError(f"{field}: {shown(source)} is no regular file; name a file or a folder, not a pipe or device")
    if is_dataset(source):
        return _dataset_source(source, listing)
    raise UserError(
        f"{field}: no such folder, file or dataset: {shown(source)}; give a folder of images with captions, "
        "webdataset tars or parquet files (a file, a folder of them, or a pattern such as data/{000..012}.tar), "
        "the id of a dataset such as owner/name:split, or 'digits'"
    )


def find_kind(folder: Path) -> str | None:
    """What a folder holds: "images", ".tar" or ".parquet" files, or None.

    The first folder from the top that holds any of these decides, for images (or a table of them)
    before tars before parquet files.
    """
    for _, _, names in walk(folder):
        kinds = set(map(_kind_of, names))
        for kind in ("images", *_LISTERS):
            if kind in kinds:
                return kind
    return None


def _kind_of(name: str) -> str | None:
    """What a file of this name is: part of a folder of "images", a suffix of _LISTERS, or None."""
    suffix = os.path.splitext(name)[1].lower()
    if name.startswith("."):
        return None
    if name in TABLES or suffix in IMAGE_SUFFIXES:
        return "images"
    return suffix if suffix in _LISTERS else None


def _files(folder: Path, kind: str, listing: Listing) -> list[Path]:
    """The tars or parquet files of a folder and its sub-folders, sorted; `listing` counts the rest.

    Files that are named after a test or validation split belong to the rest if there are others.
    """
    found = []
    for path, _, names in walk(folder, listing):
        for name in names:
            if _kind_of(name) == kind:
                found.append(path / name)
            elif _kind_of(name):
                listing.pass_over(f"files beside {kind} files", path / name)
    found.sort()
    others = [path for path in found if any(_OTHER_SPLIT.match(p.lower()) for p in path.relative_to(folder).parts)]
    if len(others) in (0, len(found)):
        return found
    for path in others:
        listing.pass_over("files of other splits", path)
    return [path for path in found if path not in set(others)]


def is_dataset(source: str) -> bool:
    """Whether `source`, which is no path, can be the id of a dataset or a folder of one, with a
    split.

    A mistyped path is then reported as one, and is not looked up on the Hub.
    """
    name, _, split = source.partition(":")
    if split and os.path.isdir(name):
        return True
    parent = os.path.dirname(source)
    # An id has one slash at most, and its owner is hardly ever the name of a local folder.
    nested = source.count("/") > 1 or (parent != "" and os.path.isdir(parent))
    suffix = os.path.splitext(source)[1].lower()
    meant_as_path = suffix in {*_LISTERS, *IMAGE_SUFFIXES} or source.startswith((".", "~", "/")) or nested
    return not meant_as_path and "/" in source and DATASET_ID.fullmatch(source) is not None


def _stamp(facts: Iterable[tuple]) -> str:
    """The SHA-256 of tuples of plain values, in order."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(json.dumps(fact).encode() + b"\n")
    return digest.hexdigest()


def _stamp_of(listing: Listing) -> str:
    """The stamp of pictures or videos that are listed."""
    return _stamp((p.label, *p.facts, p.caption) for p in listing.pictures)


def _some(listing: Listing) -> Listing:
    """`listing`, which is not empty. Raises UserError with what was passed over where it is."""
    if listing.pictures:
        return listing
    parts = passed(listing.passed_over, listing.bad)
    over = f"; passed over: {', '.join(parts)}" if parts else ""
    wanted = (
        "images (an image with a .txt of its name, a row of metadata.jsonl or metadata.csv, key.jpg with key.txt or "
        "key.json in a tar)"
    )
    if listing.clip is not None:
        wanted = (
            "videos (an .mp4 file or a folder of numbered frames with a .txt of its name, a row of metadata.jsonl or "
            "metadata.csv)"
        )
    raise UserError(f"{listing.field}: {shown(listing.source)} holds no captioned {wanted}{over}")


def _folder_source(name: str, listing: Listing) -> ImageSource:
    """The pictures of a folder of images."""
    list_folder(Path(name), listing)
    _some(listing)
    return ImageSource(name, _stamp_of(listing), lambda: listing)


def _video_source(source: str, name: str, listing: Listing) -> ImageSource:
    """The videos of a folder, or one .mp4 file."""
    if os.path.isdir(name):
        list_videos(Path(name), listing)
    elif os.path.isfile(name) and is_video(os.path.basename(name)):
        list_video(Path(name).resolve(), listing)
    else:
        raise UserError(
            f"{listing.field}: {shown(source)} holds no videos; a model of videos takes an .mp4 file, or a folder of "
            ".mp4 files or of folders of frames"
        )
    check_decoder(_some(listing))
    return ImageSource(name, _stamp_of(listing), lambda: listing)


def _file_source(name: str, files: list[Path], listing: Listing) -> ImageSource:
    """The pictures of tars or parquet files, which are opened only to list them."""
    facts = []
    for path in files:
        try:
            stat = path.stat()
        except (OSError, ValueError) as error:
            raise UserError(f"{listing.field}: cannot read {shown(path)}: {one_line(error)}") from error
        facts.append((str(path), stat.st_size, stat.st_mtime_ns))

    def listed() -> Listing:
        """The first pictures of all files, in order."""
        for path in files:
            if listing.full:
                listing.more = True
                break
            try:
                _LISTERS.get(path.suffix.lower(), list_tar)(path, listing)
            except OSError as error:
                raise UserError(f"{listing.field}: cannot read {shown(path)}: {one_line(error)}") from error
        return _some(listing)

    return ImageSource(name, _stamp(facts), functools.cache(listed))


def _dataset_source(source: str, listing: Listing) -> ImageSource:
    """The pictures of a Hugging Face dataset."""
    name, _, split = source.partition(":")
    try:
        stamp = _stamp([(version(name),)])
    except Exception as error:  # what the Hub's client raises has no common base
        raise cannot_read(listing.field, source, error) from error

    def listed() -> Listing:
        """The first pictures of the split."""
        list_dataset(name, split or "train", int(stamp[:15], 16), listing)
        return _some(listing)

    return ImageSource(f"{name}:{split or 'train'}", stamp, functools.cache(listed))


def _expanded(source: str, pattern: str, field: str) -> list[str]:
    """All paths that `pattern` stands for, in order; `source` names the pattern in messages."""
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last, listed = found.groups()
    tails = _expanded(source, pattern[found.end() :], field)
    middles = listed.split(",") if listed is not None else range(int(first), int(last) + 1)
    if not 1 <= len(middles) * len(tails) <= MAX_SHARDS:
        raise UserError(f"{field}: {shortened(source)} stands for no name, or for more than {MAX_SHARDS:,}")
    if listed is None:
        middles = [f"{number:0{len(first)}d}" for number in middles]
    return [pattern[: found.start()] + middle + tail for middle in middles for tail in tails]
