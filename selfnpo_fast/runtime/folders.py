"""Output folders: checked before any work is done, never emptied of what is not ours, whole or not there.

A folder of results is written aside (`.writing-NAME` beside it) and renamed when all of it is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from selfnpo_fast.runtime.errors import UserError, one_line

RUN_ENTRIES = frozenset(
    {"negative", "checkpoints", "samples", "tensorboard", "replay", "config.yaml", "metrics.jsonl", "train.log"}
)
"""All that a training run writes into its output folder."""
ASIDE, DOOMED = ".writing-", ".deleting-"
MANIFEST = "manifest.json"


def check_writable(path: str) -> Path:
    """The folder `path`, which exists and can be written, or can be made. Raises UserError; changes nothing."""
    folder = Path(os.path.expanduser(path))
    if path.startswith("~") and str(folder).startswith("~"):
        raise UserError(f"output: {path} names nobody's home; name another folder, or ./{path}")
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not nearest.is_dir():
            raise UserError(f"output: {nearest} is a file; name a folder")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"output: {nearest} cannot be written; name another folder")
    except OSError as error:  # no permission, or a name longer than any can be
        raise UserError(f"output: {one_line(error)}; name another folder") from error
    return folder


def check_run_folder(path: str, *, resume: bool, overwrite: bool) -> Path:
    """A folder for a training run: empty, or its contents are a run's and the user said what to do with them."""
    folder = check_writable(path)
    held = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if held and not (resume or overwrite):
        raise UserError(f"output: {folder} is not empty; add --resume to go on, --overwrite to start anew")
    foreign = [name for name in held if name not in RUN_ENTRIES and not name.startswith((ASIDE, DOOMED))]
    if overwrite and foreign:
        raise UserError(f"output: {folder} holds {foreign[0]!r}, which no run wrote; --overwrite will not delete it")
    return folder


def clear_run_folder(folder: Path) -> None:
    """Delete what a run wrote; anything else was refused by `check_run_folder`."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def begin_aside(target: Path) -> Path:
    """An empty folder in which to prepare `target`. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (*target.parent.glob(f"{ASIDE}*"), *target.parent.glob(f"{DOOMED}*")):
        remove(leftover)  # of a run that was killed
    aside = target.with_name(ASIDE + target.name)
    aside.mkdir()
    return aside


def finish_aside(aside: Path, target: Path) -> None:
    """Make `aside` the folder `target`, in place of one that may be there, once its files are on the disk."""
    for path in (*aside.rglob("*"), aside):
        _sync(path)
    doomed = target.with_name(DOOMED + target.name)
    if target.exists():
        target.rename(doomed)
    aside.rename(target)
    _sync(target.parent)
    remove(doomed)


def remove(folder: Path) -> None:
    """Delete a folder or file that may be gone already. What stops half-way is never taken for a whole one."""
    if folder.is_dir() and not folder.is_symlink():
        if not folder.name.startswith((ASIDE, DOOMED)):
            folder = folder.rename(folder.with_name(DOOMED + folder.name))
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def write_file(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    aside = path.with_name(ASIDE + path.name)
    aside.write_text(text, encoding="utf-8")
    _sync(aside)
    aside.replace(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _facts(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_manifest(folder: Path) -> None:
    """Note size and hash of every file directly in `folder`."""
    facts = {path.name: _facts(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def why_not_whole(folder: Path) -> str | None:
    """What is wrong with a folder according to its manifest, or None where all is well."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            path = folder / name
            if path.parent != folder or not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
            if _facts(path) != expected:
                return f"{name} has changed since it was written (its SHA-256 differs)"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} is not readable: {one_line(error)}"
    return None
