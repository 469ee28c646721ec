"""Output folders: checked before any work is done, never emptied of what is not ours."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from selfnpo_fast.errors import UserError

RUN_ENTRIES = frozenset(
    {"negative", "checkpoints", "samples", "tensorboard", "config.yaml", "metrics.jsonl", "train.log"}
)
"""All that a training run writes into its output folder."""


def check_writable(path: str) -> Path:
    """The folder `path`, which exists and can be written, or can be made. Raises UserError; changes nothing."""
    folder = Path(path).expanduser()
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not nearest.is_dir():
            raise UserError(f"output: {nearest} is a file; name a folder")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"output: {nearest} cannot be written; name another folder")
    except PermissionError as error:
        raise UserError(f"output: {folder} cannot be reached: {error}; name another folder") from error
    return folder


def check_run_folder(path: str, *, resume: bool, overwrite: bool) -> Path:
    """A folder for a training run: empty, or its contents are a run's and the user said what to do with them."""
    folder = check_writable(path)
    held = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if held and not (resume or overwrite):
        raise UserError(f"output: {folder} is not empty; add --resume to go on, --overwrite to start anew")
    foreign = [name for name in held if name not in RUN_ENTRIES and not name.startswith(".writing-")]
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
