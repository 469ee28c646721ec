"""Locks among commands that write: no two of them share an output folder or a store.

The lock is the kernel's (flock) on a small file, and ends with the process that holds it. Across
hosts it holds as far as the file system passes it on. Who only reads takes no lock.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_fast.runtime.files import open_regular

LOCK = ".selfnpo.lock"
"""The file in an output folder that its writer has locked."""
MADE = ".selfnpo.made"
"""The file that names folders made by processes that were refused."""
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of file systems that have no locks, such as some kinds of NFS."""
_TRIES = 100


@dataclass(frozen=True)
class Held:
    """A lock that this process holds."""

    path: Path
    """The locked file."""
    descriptor: int
    """The file, opened; the lock ends when it is closed."""
    locked: bool
    """False where the file system knows no locks."""

    def release(self) -> None:
        """End the lock and remove its file, unless somebody has put another file in its place."""
        with contextlib.suppress(OSError):
            # Without a lock, the file may be another process's, too.
            if self.locked and _is_at(self.descriptor, self.path):
                self.path.unlink()
        os.close(self.descriptor)


def hold(path: Path) -> Held | None:
    """Lock the file `path`, which is made with its folder; None where another process holds it.

    Raises OSError where the file cannot be made.
    """
    for attempt in range(_TRIES):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # NFS locks only files that are open for writing. A link is not followed: in a folder of
            # somebody else it could lead to any file of ours, which would be written.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # another process has just removed the folder that it had made
            if attempt == _TRIES - 1:
                raise
            continue
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise
            locked = False
            say_once(f"{path.parent}: this file system has no locks ({one_line(error)}): two runs are not kept apart")
        # The process that held the lock before may have removed the file since it was opened.
        if _is_at(descriptor, path):
            _sign(descriptor)
            return Held(path, descriptor, locked)
        os.close(descriptor)
    return None


def holder(path: Path) -> str:
    """Who holds the lock on the file `path`, as that process has written it there."""
    for _ in range(_TRIES):
        with contextlib.suppress(OSError, UserError), open_regular(path, "lock") as file:
            text = file.read(300).decode("utf-8", "replace")
            if text.strip():
                return one_line(text)
        time.sleep(0.002)  # between taking the lock and writing the line
    return "another process"


@contextlib.contextmanager
def only_writer(folder: Path, field: str = "output") -> Iterator[bool]:
    """Keeps other commands from writing to `folder` inside it.

    The folder is made; where nothing was written, it is removed again at the end. Gives False where
    the file system has no locks, so that others may write, too. Raises UserError
    that names `field` where another process writes to the folder, or it cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        lock = hold(folder / LOCK)
    except OSError as error:
        raise UserError(f"{field}: {one_line(error)}; name another folder") from error
    if lock is None:
        _leave_to_holder(folder, made)
        raise UserError(
            f"{field}: {folder} is being written by {holder(folder / LOCK)}; wait for its end, or name another folder"
        )
    try:
        yield lock.locked
    finally:
        lock.release()
        _remove_empty(folder, made)


def _leave_to_holder(folder: Path, made: list[Path]) -> None:
    """Leave it to the process that holds the lock to remove the folders that this one has made."""
    if not made:
        return
    with contextlib.suppress(OSError):
        with (folder / MADE).open("a", encoding="utf-8") as file:
            file.write("".join(f"{path}\n" for path in made))
        # The holder looks after it has released the lock: who cannot take it is in time.
        lock = hold(folder / LOCK)
        if lock is None:
            return
        lock.release()
    _remove_empty(folder, made)


def _remove_empty(folder: Path, made: list[Path]) -> None:
    """Remove those of the folders that are empty, and of those that were left to the holder."""
    with contextlib.suppress(OSError):
        left = (folder / MADE).read_text(encoding="utf-8", errors="replace").splitlines()
        (folder / MADE).unlink()
        made = [path for path in (folder, *folder.parents) if path in made or str(path) in left]
    with contextlib.suppress(OSError):  # it holds something
        for path in made:
            path.rmdir()


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has the name `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write into a locked file who holds it."""
    now = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
    with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode(), 0)
