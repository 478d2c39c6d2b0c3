"""Bytes of a file with care: a beginning that was read already, and gzip that must not grow like a bomb."""

from __future__ import annotations

import gzip
import io
import os
from pathlib import Path
from typing import IO, Any

from veneer.data.rows.json_rows import LINE_CAP
from veneer.errors import DataError

__all__ = ["GROWTH", "GROWTH_FROM", "Prefixed", "Unzipped"]

GROWTH = 200
"""How many times a gzip file may grow: text of rows grows 3 to 50 times, a bomb about 1,000 times."""
GROWTH_FROM = 64 << 20
"""Bytes from which growth is looked at."""


class Prefixed:
    """A file of which the first bytes were read already."""

    def __init__(self, head: bytes, file: IO[bytes]) -> None:
        self._head = head
        self._file = file

    def readline(self, limit: int = LINE_CAP + 1) -> bytes:
        if not self._head:
            return self._file.readline(limit)
        head, newline, self._head = self._head.partition(b"\n")
        return head + newline if newline else head + self._file.readline(limit)

    def read(self, limit: int) -> bytes:
        head, self._head = self._head, b""
        return head + self._file.read(limit - len(head))

    def peek_text(self) -> bytes:
        """The first byte that is not white space."""
        while not self._head.strip() and (more := self._file.read(64)):
            self._head += more
        return self._head.strip()[:1]


class Unzipped(io.RawIOBase):
    """Unzips a gzip file and refuses one that grows like a bomb."""

    def __init__(self, raw: IO[bytes], path: Path) -> None:
        self._raw = raw
        self._file = gzip.GzipFile(fileobj=raw)
        self._path = path
        self._zipped = max(1, os.fstat(raw.fileno()).st_size)
        self._given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._given += len(data)
        if self._given > GROWTH_FROM and self._given > GROWTH * self._zipped:
            raise DataError(
                f"{self._path}: the gzip file grows more than {GROWTH} times when it is unzipped, as no file of rows does; "
                "unzip it yourself if you trust it."
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        self._raw.close()
        super().close()
