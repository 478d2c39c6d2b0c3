"""Safe reading of untrusted folders, and atomic writing of adapter folders.

Reading: a folder is opened once; its files are opened relative to it, without following links or blocking on a named pipe, and must be
regular files. Content is read into private memory, never mapped, so a file that shrinks meanwhile is a short read and not a crash.

Writing: each file is written under a temporary name, flushed, and moved by `os.replace`; a new folder is written under a temporary name
and renamed. A failure leaves the old state and no temporary files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from veneer._files import ASIDE, aside, sync, write_new
from veneer.checkpoints.findings import shown
from veneer.errors import CheckpointError

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


class Folder:
    """An open folder, whose files can be read and nothing outside it. Use it as a context.

    The folder itself may be given through a link; a link in it is refused, except where a download cache of the model hub keeps
    files: ``snapshots/ID/name`` -> ``../../blobs/HASH``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        try:
            if os.open in os.supports_dir_fd and os.listdir in os.supports_fd:
                self._handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NONBLOCK)
            self.names = sorted(os.listdir(path if self._handle is None else self._handle))  # noqa: PTH208 - of a handle, not a path
        except (OSError, ValueError) as error:
            self.close()
            raise _unreadable(path, error, "a folder with adapter_config.json and adapter_model.safetensors") from error

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the handle of the folder."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __contains__(self, name: str) -> bool:
        return name in self.names

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        """A file of this folder, unbuffered, and its size in bytes.

        Raises CheckpointError for what is missing, a link, a pipe, a device, a folder, or cannot be read.
        """
        where = self.path / name
        try:
            handle = self._open(name, where)
        except OSError as error:
            raise _unreadable(where, error, "a regular file") from error
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            os.close(handle)
            raise CheckpointError(f"{where} is {_kind(found.st_mode)}; expected a regular file")
        with os.fdopen(handle, "rb", buffering=0) as file:
            yield cast(BinaryIO, file), found.st_size

    def read(self, name: str, limit: int) -> bytes:
        """The content of a small file. Raises CheckpointError above ``limit`` bytes."""
        with self.open(name) as (file, size):
            if size > limit:
                raise CheckpointError(f"{self.path / name} has {size:,} bytes; at most {limit:,} are read")
            return bytes(read_exactly(file, size, str(self.path / name)))

    def _open(self, name: str, where: Path) -> int:
        try:
            return os.open(where if self._handle is None else name, _FLAGS | _NOFOLLOW, dir_fd=self._handle)
        except OSError as error:
            blob = self._blob(where) if error.errno == errno.ELOOP else None
            if blob is None:
                raise
            return os.open(blob, _FLAGS | _NOFOLLOW)

    def _blob(self, where: Path) -> Path | None:
        """The target of a link in a hub cache, or None for other links."""
        try:
            folder = self.path.resolve()
            target = Path(os.path.normpath(folder / where.readlink()))
        except OSError:  # no link any more
            return None
        cached = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
        return target if cached else None


def read_exactly(file: BinaryIO, count: int, where: str) -> bytearray:
    """The next ``count`` bytes of a file. Raises CheckpointError if it ends before."""
    data = bytearray(count)
    fill(file, memoryview(data), where)
    return data


def fill(file: BinaryIO, view: memoryview, where: str) -> None:
    """Fill ``view`` from a file. Raises CheckpointError if the file ends before or cannot be read."""
    count, done = len(view), 0
    while done < count:
        try:
            got = file.readinto(view[done : done + (64 << 20)])  # type: ignore[attr-defined]
        except OSError as error:
            raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from error
        if not got:
            raise CheckpointError(
                f"{where} ended after {done:,} of {count:,} bytes: it is cut off, or changes while it is read"
            )
        done += got


def parse_json(data: bytes | bytearray, where: str) -> Any:
    """JSON as the standard has it: UTF-8, no duplicate names, no NaN or Infinity, no nesting beyond the parser's depth. A byte order mark
    is skipped.

    Raises CheckpointError naming ``where``.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            seen: set[str] = set()
            twice = next(name for name, _ in items if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise ValueError(f'the name "{shown(twice)}" occurs twice')
        return found

    def constant(text: str) -> Any:
        raise ValueError(f"{text} is not a number that JSON has")

    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise CheckpointError(f"{where} is not usable JSON: it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where} is not usable JSON: byte {error.start} is not UTF-8; save it as UTF-8"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{where} is not usable JSON: {shown(error)}") from None


def write_folder(path: Path, files: Mapping[str, Sequence[bytes | memoryview]]) -> None:
    """Write ``files`` (in this order) as, or into, the folder ``path``.

    Raises CheckpointError if the folder cannot be written; the old content is then unchanged, and no temporary files remain.
    """
    try:
        if path.exists():
            _write_into(path, files)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_new(path, files)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"{path} cannot be written: {reason}; nothing was changed there: choose a folder that can be written and has room"
        ) from error
    try:
        sync(path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path} was written, but the disk did not confirm it ({error.strerror or error}), so it may be lost with the power: save again"
        ) from error


def _write_new(path: Path, files: Mapping[str, Sequence[bytes | memoryview]]) -> None:
    beside = aside(path)
    beside.mkdir()
    try:
        for name, pieces in files.items():
            write_new(beside / name, pieces)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_into(path: Path, files: Mapping[str, Sequence[bytes | memoryview]]) -> None:
    for name in files:
        for left in path.glob(f"{name}{ASIDE}*"):  # by a process that was killed while it saved here
            left.unlink()
    beside = {name: aside(path / name) for name in files}
    try:
        for name, pieces in files.items():
            write_new(beside[name], pieces)
        for name in files:
            beside[name].replace(path / name)
    finally:
        for left in beside.values():
            with contextlib.suppress(OSError):
                left.unlink()


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((name for test, name in kinds.items() if test(mode)), "not a regular file")


def _unreadable(path: Path, error: OSError | ValueError, expected: str) -> CheckpointError:
    if isinstance(error, ValueError):  # a NUL in the path
        return CheckpointError(f"{shown(path)} cannot be a path; expected {expected}")
    if error.errno == errno.ENAMETOOLONG:
        return CheckpointError(f"{shown(path)}, a path of {len(str(path)):,} letters, is too long; expected {expected}")
    if error.errno == errno.ENOENT:
        return CheckpointError(f"{path} does not exist; expected {expected}")
    if error.errno == errno.ELOOP:
        return CheckpointError(
            f"{path} is a symbolic link; expected {expected}, so that nothing outside the folder is read: copy the file there"
        )
    if error.errno == errno.ENXIO:
        return CheckpointError(f"{path} is a socket or device; expected {expected}")
    if error.errno == errno.ENOTDIR:
        return CheckpointError(f"{path} is not a folder; expected {expected}")
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}; expected {expected}")
