"""Folders of pictures with captions, read with their sub-folders.

One rule for symbolic links: a link to a regular file is that file, wherever it lies; a link to a
folder is not entered. What begins with a dot is passed over.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from selfnpo_fast.data.listing import FilePicture, Listing
from selfnpo_fast.data.pixels import IMAGE_SUFFIXES, OTHER_SUFFIXES, VIDEO_SUFFIXES
from selfnpo_fast.data.rows import checked, csv_rows, jsonl_rows, short, shown
from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_fast.runtime.files import read_text
from selfnpo_fast.runtime.limits import MAX_LINE_BYTES

TABLES = {"metadata.jsonl": jsonl_rows, "metadata.csv": csv_rows}
"""Files that name the pictures of their folder and of its sub-folders, and their readers."""
CAPTION_SUFFIXES = (".txt", ".caption")
"""Of the files beside pictures that hold their captions, the preferred first."""


def walk(root: Path, listing: Listing | None = None) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Every folder from `root` down, with the names of its folders and files, sorted.

    Folders that the reader removes from the list of names are not entered, nor are links to folders
    and folders whose names begin with a dot. A folder that cannot be read is refused by `listing`,
    or left out without one.
    """

    def refuse(error: OSError) -> None:
        if listing is not None:
            listing.refuse(UserError(f"{listing.field}: cannot read a folder: {one_line(error)}"))

    try:
        for path, folders, files in os.walk(root, onerror=refuse):
            linked = {name for name in folders if os.path.islink(os.path.join(path, name))}
            for name in sorted(linked) if listing is not None else ():
                listing.pass_over("linked folders", Path(path, name))
            folders[:] = sorted(name for name in folders if name not in linked and not name.startswith("."))
            yield Path(path), folders, sorted(files)
    except RecursionError as error:
        raise UserError(f"data.source: {shown(root)}: folders are nested too deeply") from error


def list_folder(folder: Path, listing: Listing) -> None:
    """Add the captioned pictures of a folder and of its sub-folders to `listing`.

    A folder's own pictures come first, by name, then those of its sub-folders. Where a folder holds
    a table, the table's rows take the place of all that. Raises UserError for a damaged table.
    """
    for path, folders, files in walk(folder.resolve(), listing):
        tables = [name for name in TABLES if name in files]
        if tables:
            _list_table(path, tables[0], listing)
            for name in tables[1:]:
                listing.pass_over(f"tables beside {tables[0]}", path / name)
            folders.clear()
            continue
        names, stems = set(files), {os.path.splitext(name)[0] for name in files if is_picture(name)}
        for name in files:
            stem, suffix = os.path.splitext(name)
            if is_picture(name) and listing.full:
                listing.pass_over("beyond the limit", path / name)
            elif is_picture(name):
                try:
                    _add(path / name, beside(path, name, names, listing), listing)
                except UserError as error:
                    listing.refuse(error)
            elif suffix in CAPTION_SUFFIXES and stem not in stems and not name.startswith("."):
                listing.pass_over("captions without a picture", path / name)
            else:
                pass_over(path / name, listing)


def is_picture(name: str) -> bool:
    """Whether a file of this name is read as a picture."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def pass_over(path: Path, listing: Listing) -> None:
    """Count a file that is not read, if its name says that it holds pictures or a video."""
    suffix = path.suffix.lower()
    if path.name.startswith("."):
        if suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            listing.pass_over("hidden files", path)
    elif suffix in VIDEO_SUFFIXES:
        listing.pass_over("videos, which a model of pictures does not take", path)
    elif suffix in OTHER_SUFFIXES:
        listing.pass_over("of a kind that is not read", path)
    elif suffix in (".tar", ".parquet"):
        listing.pass_over("tars or tables beside pictures", path)


def _add(path: Path, caption: str, listing: Listing) -> None:
    """Add the picture at `path` to `listing`. Raises UserError for what is no regular file."""
    try:
        facts = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: NUL in a name from a table
        raise UserError(f"{listing.field}: cannot read the image {shown(path)}: {one_line(error)}") from error
    if not stat.S_ISREG(facts.st_mode):
        raise UserError(f"{listing.field}: cannot read the image {shown(path)}: it is no regular file")
    listing.pictures.append(FilePicture(shown(path), caption, path, 0, facts.st_size, facts.st_mtime_ns))


def beside(folder: Path, name: str, names: set[str], listing: Listing) -> str:
    """The caption of the picture or video `name` in `folder`: it lies in one of the files `names`
    there, of the same stem; a folder of frames is all stem. Raises UserError."""
    stem = name if (folder / name).is_dir() else os.path.splitext(name)[0]
    for suffix in CAPTION_SUFFIXES:
        if stem + suffix in names:
            path = folder / (stem + suffix)
            text = read_text(path, listing.field, MAX_LINE_BYTES)
            return checked(listing.field, shown(path), text.removeprefix("\ufeff"))
    raise UserError(f"{listing.field}: {shown(folder / name)} has no caption; put it into {shown(stem)}.txt")


def _list_table(folder: Path, name: str, listing: Listing) -> None:
    """Add the pictures that a table names to `listing`, and count those that it leaves out."""
    listed: set[Path] = set()
    parents: set[Path] = set()
    for number, values in TABLES[name](folder / name, ("file_name", listing.column or "text"), listing.field):
        where = f"{shown(folder / name)}, line {number}"
        try:
            if isinstance(values, UserError):
                raise values
            path = inside(folder, values[0], parents, where, listing.field)
            listed.add(path)
            if listing.full:
                listing.pass_over("beyond the limit", path)
            else:
                _add(path, checked(listing.field, where, values[1]), listing)
        except UserError as error:
            listing.refuse(error)
    for path, _, files in walk(folder, listing):
        for file in files:
            if is_picture(file) and path / file not in listed:
                listing.pass_over(f"not in {name}", path / file)
            elif not is_picture(file):
                pass_over(path / file, listing)


def inside(folder: Path, name: object, parents: set[Path], where: str, field: str) -> Path:
    """The path of a picture that a table in `folder` names. Raises UserError for one elsewhere.

    `parents` gains the folders that are found to lie in `folder`.
    """
    if not isinstance(name, str) or not name:
        raise UserError(f"{field}: {where}: file_name is {short(name)}, not the name of a file")
    parts = PurePosixPath(name)
    path = folder / parts
    inside = not parts.is_absolute() and ".." not in parts.parts
    if inside and path.parent not in parents:
        try:
            inside = path.parent.resolve() == path.parent
        except (OSError, ValueError, RuntimeError):  # NUL, or links in a circle
            inside = False
    if not inside:
        raise UserError(f"{field}: {where}: {short(name)} lies outside {shown(folder)}, or behind a link to a folder")
    parents.add(path.parent)
    return path
