"""Locks of files and folders between processes, which the system releases when the holder ends."""

from __future__ import annotations

import os
from pathlib import Path


def lock(path: Path, *, wait: bool = False) -> int:
    """Lock a folder, or a file, which is created if it is missing; returns a handle that holds the lock until it is closed.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is not set.
        OSError: the path cannot be opened, or the system or the disk has no such locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OSError(f"{path}: this system has no such locks") from error
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle
