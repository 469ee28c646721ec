"""Exchanging two folders in one step of the kernel."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NOT_OFFERED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What kernels and file systems answer that cannot exchange names, such as NFS."""


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders of one file system, which at no time are missing.

    Returns False, and changes nothing, where the system offers no such step. Raises OSError.
    Source: renameat2(2), RENAME_EXCHANGE.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # no Linux, or an old C library
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_OFFERED:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
