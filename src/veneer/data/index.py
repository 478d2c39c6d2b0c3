"""Any row of a file by its number, without reading those before it again.

For JSON lines the index is the byte offset of each row in the file itself. Other containers, and zipped files, are
copied once into a temporary file of JSON lines, which is then read by offset in the same way.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Sequence
from typing import IO, Any, overload

import orjson

from veneer.data.rows.json_rows import LINE_CAP, parse_row
from veneer.data.rows.readers import Source
from veneer.data.rows.row import Bad, Record

__all__ = ["RowIndex"]


class RowIndex(Sequence[Record | Bad]):
    """The rows of one file by number, from 0, bad ones included; 16 bytes of memory a row.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.source = Source(path)
        self._offsets = array("q")
        self._numbers = array("q")
        self._bad: dict[int, Bad] = {}
        self._before = f"{self.source.path.name}:"
        if self.source.container == "jsonl" and not self.source.zipped:
            self._file: IO[bytes] = self.source.open()
            self._scan()
        else:
            self._file = tempfile.TemporaryFile(prefix="veneer-rows-")  # noqa: SIM115 (lives as long as this)
            self._copy()

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Record | Bad: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record | Bad]: ...
    def __getitem__(self, index: int | slice) -> Record | Bad | list[Record | Bad]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if at in self._bad:
            return self._bad[at]
        self._file.seek(self._offsets[at])
        place = f"{self._before}{self._numbers[at]}"
        found = parse_row(self._file.readline(LINE_CAP).removeprefix(b"\xef\xbb\xbf"))
        return Bad(place, "", found) if isinstance(found, str) else Record(place, found)

    def close(self) -> None:
        """Close the file; rows can no longer be had."""
        self._file.close()

    def __enter__(self) -> RowIndex:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _scan(self) -> None:
        offset, number = 0, 0
        while line := self._file.readline(LINE_CAP + 1):
            number += 1
            if len(line) > LINE_CAP:
                self._bad[len(self._offsets)] = Bad(
                    f"{self._before}{number}", "", f"the line is longer than {LINE_CAP >> 20} MiB"
                )
            if not line.isspace():
                self._offsets.append(offset)
                self._numbers.append(number)
            offset += len(line)
            while len(line) > LINE_CAP and not line.endswith(b"\n"):
                more = self._file.readline(LINE_CAP)
                offset += len(more)
                if not more or more.endswith(b"\n"):
                    break

    def _copy(self) -> None:
        offset = 0
        for record in self.source:
            words, _, number = record.source[len(self._before) :].rpartition(" ")
            if words:
                self._before = f"{self.source.path.name}:{words} "
            line = b""
            if isinstance(record, Bad):
                self._bad[len(self._offsets)] = record
            else:
                line = orjson.dumps(record.values, default=_as_text) + b"\n"
            self._offsets.append(offset)
            self._numbers.append(int(number))
            offset += self._file.write(line)
        self._file.flush()


def _as_text(value: Any) -> str:
    """Dates, decimals and bytes of a parquet file: no shape takes them, and an error should still show them."""
    return str(value)
