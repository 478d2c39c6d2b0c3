"""Files and folders that are whole or absent: written aside, flushed to the disk, renamed.

A reader sees the old content or the new, never a part. The temporary name is ``name.tmp-`` and eight random hex digits; a killed process
leaves nothing else behind.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ASIDE = ".tmp-"


def decode(data: bytes) -> str:
    """Decode a text file: UTF-8, with or without a byte order mark.

    Raises:
        ValueError: the bytes are not UTF-8; the message names the encoding or the position, and the remedy.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise ValueError("the file is encoded as UTF-16 or UTF-32; save it as UTF-8")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8: {error.reason} at byte {error.start}; save the file as UTF-8") from None


def aside(path: Path) -> Path:
    """A fresh name beside ``path`` to write under."""
    return path.with_name(f"{path.name}{ASIDE}{secrets.token_hex(4)}")


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_new(path: Path, pieces: Sequence[bytes | memoryview]) -> None:
    """Write a file that does not exist yet, and flush it.

    Raises:
        OSError: the file cannot be written. ``filename`` is always set.
    """
    try:
        with path.open("xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is None and error.errno is not None:  # errors of an open file carry no path
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under, which takes the place of ``path`` in one step when the context ends without an error."""
    beside = aside(path)
    try:
        yield beside
        sync(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_bytes(path: Path, data: bytes) -> None:
    """Write or replace a small file in one step."""
    with replacing(path) as beside:
        write_new(beside, [data])


def replace_text(path: Path, text: str) -> None:
    """Write or replace a small UTF-8 file in one step."""
    replace_bytes(path, text.encode())


def publish(beside: Path, final: Path) -> None:
    """Flush a finished folder with everything in it, and rename it to ``final``, which is absent or an empty folder."""
    for path in [*beside.rglob("*"), beside]:
        sync(path)
    if final.is_dir():
        final.rmdir()  # empty, or this fails and nothing is lost
    beside.rename(final)
    sync(final.parent)
