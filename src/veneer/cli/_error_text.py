"""Turns an exception into a message for the user and an exit code."""

from __future__ import annotations

import errno
import os
import re

from veneer._files import ASIDE
from veneer.errors import VeneerError

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""The form in which libraries written in Rust report an error of the operating system."""
_ASIDE = re.compile(re.escape(ASIDE) + r"[0-9a-f]{8}")
"""The end of a name under which a file is written before it takes its own."""
_REASONS = {
    errno.ENOSPC: "the disk is full; free some space, or choose a folder on another disk",
    errno.EDQUOT: "the disk quota is used up; free some space, or choose a folder on another disk",
    errno.EACCES: "permission denied; choose a folder that you may read and write",
    errno.EPERM: "permission denied; choose a folder that you may read and write",
    errno.EROFS: "the file system is read-only; choose a writable folder",
    errno.ENOENT: "no such file or folder",
    errno.EISDIR: "expected a file, found a folder",
    errno.ENOTDIR: "expected a folder, but this path or one of its parents is a file",
    errno.EEXIST: "already exists",
    errno.ENAMETOOLONG: "the name is too long for the file system",
    errno.EMFILE: "too many open files; raise the limit with ulimit -n",
    errno.EIO: "the disk reports an error while reading or writing",
}


def explain(error: Exception) -> tuple[str, int]:
    """Return the message for the user (several lines if there are several problems) and the exit code."""
    if isinstance(error, VeneerError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        return _system_error(error), 1
    if (number := _OS_ERROR.search(str(error))) is not None:
        return _system_error(OSError(int(number.group(1)), str(error))), 1
    if _out_of_memory(error):
        return "not enough memory; use fewer tokens per pass, shorter examples or a smaller base", 1
    text = " ".join(str(error).split())
    bug = f"this is a bug in veneer: {type(error).__name__}: {text}" if text else f"this is a bug in veneer: {error!r}"
    return f"{bug}; run again with --debug for the traceback", 1


def _system_error(error: OSError) -> str:
    given = (error.filename, error.filename2)
    paths = [_ASIDE.sub("", os.fsdecode(name)) for name in given if isinstance(name, str | bytes)]
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    return ": ".join([" -> ".join(dict.fromkeys(paths)), reason]) if paths else reason


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    signs = ("can't allocate memory", "cannot allocate memory", "out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in signs))
