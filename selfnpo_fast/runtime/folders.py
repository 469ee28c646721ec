"""Output folders: checked before any work, never emptied of foreign files, whole or not there.

A folder NAME of results is written aside, as `.writing-NAME.HOST-PID` in the same parent folder. It
is renamed to NAME when all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from selfnpo_fast.runtime.errors import RunError, UserError, one_line
from selfnpo_fast.runtime.exchange import exchange
from selfnpo_fast.runtime.files import read_json

RUN_ENTRIES = frozenset(
    {"negative", "checkpoints", "samples", "tensorboard", "replay", "config.yaml", "metrics.jsonl", "train.log"}
)
"""All that a training run writes into its output folder."""
ASIDE, DOOMED = ".writing-", ".deleting-"
"""Prefixes of the names of folders that are being written or deleted."""
REPLACED = ".replaced-"
"""Prefix of a whole folder that has made room for its successor, where names cannot be
exchanged."""
_PROCESS = re.compile(r"[^.].*\.([A-Za-z0-9-]+)-(\d+)$")
"""What follows the prefix: the name, the host and the process."""
MANIFEST = "manifest.json"
"""The file that holds size and SHA-256 of the other files of a folder."""


def check_writable(path: str) -> Path:
    """The folder `path` with `~` expanded, which can be written or created.

    Nothing is changed. Raises UserError where the folder cannot be written or created.
    """
    if not path.strip():
        raise UserError("output: no name is given; name a folder")
    folder = Path(os.path.expanduser(path))
    if path.startswith("~") and str(folder).startswith("~"):
        raise UserError(f"output: {path} names nobody's home; name another folder, or ./{path}")
    try:
        os.fspath(folder).encode(errors="surrogateescape")
        if "\0" in os.fspath(folder):
            raise ValueError("a name holds no NUL")
    except ValueError as error:  # a surrogate that is no byte of a name, too
        raise UserError(f"output: {one_line(error)}; name another folder") from error
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise UserError(f"output: {nearest} is a file; name a folder")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"output: {nearest} cannot be written; name another folder")
    except OSError as error:  # no permission, or a name longer than any can be
        raise UserError(f"output: {one_line(error)}; name another folder") from error
    return folder


def check_run_folder(path: str, *, resume: bool, overwrite: bool) -> Path:
    """The output folder of a training run, which is empty, or holds a run to resume or overwrite.

    Hidden files do not count. Nothing is changed. Raises UserError where the folder holds something
    and neither `resume` nor `overwrite` is given, and where `overwrite` would delete what no run
    wrote.
    """
    folder = check_writable(path)
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    # What desktops and file systems leave, such as .DS_Store, and the lock.
    names = [name for name in names if not name.startswith(".")]
    if names and not (resume or overwrite):
        raise UserError(f"output: {folder} is not empty; add --resume to go on, --overwrite to start over")
    foreign = [name for name in names if name not in RUN_ENTRIES]
    if overwrite and foreign:
        raise UserError(f"output: {folder} holds {foreign[0]!r}, which no run wrote; --overwrite will not delete it")
    return folder


def clear_run_folder(folder: Path) -> None:
    """Delete what a run wrote into `folder`; `check_run_folder` has refused all else but hidden
    files."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name not in RUN_ENTRIES and not entry.name.startswith((ASIDE, DOOMED, REPLACED)):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def aside_name(target: Path, prefix: str) -> Path:
    """The name beside `target` under which this process writes (ASIDE) or deletes (DOOMED) it."""
    return target.with_name(f"{prefix}{target.name}.{_host()}-{os.getpid()}")


def _host() -> str:
    """This host's name as part of a file name."""
    return re.sub("[^A-Za-z0-9]+", "-", socket.gethostname())[:40].strip("-") or "host"


def remove_leftovers(folder: Path, *, locked: bool = False) -> None:
    """Delete what killed processes of this host were writing or deleting directly in `folder`.

    What a living process writes stays, and so does what other hosts write. Where `locked`, this
    process is the only one that may write there, and all leftovers are deleted. Raises OSError.
    """
    for entry in (*folder.glob(f"{ASIDE}*"), *folder.glob(f"{DOOMED}*")):
        process = _PROCESS.match(entry.name.removeprefix(ASIDE).removeprefix(DOOMED))
        if locked or process is None or (process[1] == _host() and not _is_alive(int(process[2]))):
            remove(entry)


def _is_alive(process: int) -> bool:
    """Whether this host has a process of that number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def begin_aside(target: Path) -> Path:
    """A new empty folder in which to prepare `target`, in the same parent folder. Raises OSError.

    What killed processes have left there is deleted.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    put_back(target.parent)
    remove_leftovers(target.parent)
    aside = aside_name(target, ASIDE)
    for own in (aside, aside_name(target, DOOMED)):
        remove(own)  # of an earlier attempt of this process
    aside.mkdir()
    return aside


def put_back(parent: Path) -> None:
    """Give those folders in `parent` their names back whose replacement was cut off by a kill."""
    for replaced in parent.glob(f"{REPLACED}*"):
        name = parent / replaced.name.removeprefix(REPLACED)
        remove(replaced) if name.exists() else replaced.rename(name)


def finish_aside(aside: Path, target: Path) -> None:
    """Give `aside` the name `target` once its files are on the disk. An older `target` is deleted.

    At no time is there neither of them, wherever the process is killed. Where the file system
    cannot exchange two names, the older one may be left as `.replaced-NAME`, from which `put_back`
    restores it.
    """
    for path in (*aside.rglob("*"), aside):
        _sync(path)
    old = None
    if not target.exists():
        aside.rename(target)
    elif exchange(aside, target):
        old = aside
    else:
        old = target.rename(target.with_name(REPLACED + target.name))
        try:
            aside.rename(target)
        except OSError:
            old.rename(target)
            raise
    _sync(target.parent)
    if old is not None:
        with contextlib.suppress(OSError):  # the next folder that is written here removes it
            remove(old)


def remove(folder: Path) -> None:
    """Delete a folder or file, if it is there.

    A folder is renamed first, so that a half deleted one never has the name of a whole one.
    """
    if folder.is_dir() and not folder.is_symlink():
        if not folder.name.startswith((ASIDE, DOOMED)):
            doomed = aside_name(folder, DOOMED)
            remove(doomed)  # of an earlier attempt of this process
            folder = folder.rename(doomed)
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns an error of the disk inside it, such as that of a full one, into a RunError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder} could not be written: {one_line(error)}; make room, or name another") from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a name to write to; the file gets the name `path` at the end, and only as a whole.

    Where anything is raised inside, such as the OSError of a full disk, nothing is left of it.
    """
    aside = aside_name(path, ASIDE)
    try:
        yield aside
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def write_file(path: Path, text: str) -> None:
    """Write a text file, or replace it as a whole. Raises OSError."""
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")
        _sync(aside)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _facts(path: Path) -> dict[str, object]:
    """The entry of a file in a manifest."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_manifest(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write the manifest of these files in `folder`, by default of all. Raises OSError.

    It is an error where one of the files is not there.
    """
    names = [path.name for path in folder.iterdir()] if names is None else names
    facts = {name: _facts(folder / name) for name in sorted(names)}
    (folder / MANIFEST).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def why_not_whole(folder: Path) -> str | None:
    """Why a folder is not what its manifest describes, or None if it is."""
    try:
        for name, expected in read_json(folder / MANIFEST, MANIFEST).items():
            path = folder / name
            if path.parent != folder or not path.is_file():
                return f"{one_line(name)} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{one_line(name)} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
            if _facts(path) != expected:
                return f"{one_line(name)} has changed since it was written (its SHA-256 differs)"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} is not readable: {one_line(error).removeprefix(f'{MANIFEST}: ')}"
    return None
