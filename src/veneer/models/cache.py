"""Cache folders that are built once and then only read.

A cache folder is either complete or absent: it is built under another name beside its final path, flushed to the disk and renamed. A
killed builder leaves an unfinished folder that nothing reads and the next builder removes. A lock file lets one process build at a time;
on file systems without locks, all build, and the first rename wins.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from veneer._files import publish
from veneer._locks import lock
from veneer.errors import BaseModelError

_UNFINISHED = ".unfinished-"


def cache_root() -> Path:
    """The folder for everything that Veneer can make again: ``$VENEER_HOME``, else ``veneer`` in the user's cache."""
    if home := os.environ.get("VENEER_HOME"):
        return Path(home).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "veneer"
    return Path.home() / ".cache" / "veneer"


def build_once(relative: str, build: Callable[[Path], None]) -> Path:
    """Return the cache folder ``relative``, built by ``build(empty_folder)`` if it does not exist yet.

    Raises:
        BaseModelError: the cache cannot be written (read-only, full), with the place and the remedy.
    """
    final = cache_root() / relative
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _lock(final.with_name(final.name + ".lock")) as exclusive:
            if final.is_dir():  # another process built it while this one waited
                return final
            if exclusive:
                _sweep(final)
            _build(final, build)
    except OSError as error:
        raise _unwritable(final, error) from error
    return final


def _build(final: Path, build: Callable[[Path], None]) -> None:
    aside = final.with_name(f"{_UNFINISHED}{final.name}-{secrets.token_hex(4)}")
    aside.mkdir()
    try:
        build(aside)
        for file in aside.rglob("*"):
            if file.is_file() and not file.is_symlink():  # safetensors makes files that nobody else may read
                file.chmod(aside.stat().st_mode & 0o666)
        try:
            publish(aside, final)
        except OSError as error:
            # without locks another process may have been first: its folder holds the same
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not final.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(final: Path) -> None:
    """Remove what killed builders of this folder left; the lock says that none of them is alive."""
    for leftover in final.parent.glob(f"{_UNFINISHED}{final.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on ``path``; yields False where the system or the disk has no such locks."""
    try:
        handle = lock(path, wait=True)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        os.close(handle)


def _unwritable(final: Path, error: OSError) -> BaseModelError:
    reason = error.strerror or str(error)
    free = ""
    with contextlib.suppress(OSError):
        free = f" ({shutil.disk_usage(cache_root()).free / 1e9:.1f} GB free there)"
    return BaseModelError(
        f"the cache folder {final} cannot be written: {reason}{free}. Nothing half-written was kept; make room, or set "
        f"VENEER_HOME to a folder on a disk that can be written"
    )
