"""Files of rows, read one row at a time, each with its place.

Containers: JSON lines, a JSON array, CSV, TSV, each plain or gzipped, and parquet. A row that cannot be read is a ``Bad``
in its place among the others, so that all bad rows of a file are told at once; what makes the whole file unreadable is
an error. Files may be larger than memory, except a JSON array, which is read whole and therefore bounded.

JSON is read strictly: no NaN, no half surrogate pair, no invalid UTF-8, no key given twice at the top of a row. A file
must be a regular one, so that reading cannot hang; a line and a gzip file's growth are bounded, so that it cannot fill
the memory.

Boundary: a row is a mapping of column names to values here; what it means is ``shapes.py``'s business.
"""

from __future__ import annotations

import csv
import io
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from veneer.data.rows.json_rows import LINE_CAP, array_rows, parse_row
from veneer.data.rows.parquet_rows import parquet_rows
from veneer.data.rows.row import Bad, Record
from veneer.data.streams import Prefixed, Unzipped
from veneer.errors import DataError

__all__ = ["Source", "near_file", "splits"]

_CONTAINERS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_ARRAY_CAP = 1 << 30
_BOM = b"\xef\xbb\xbf"


class Source:
    """One file of rows; iterating reads it from the start.

    Attributes:
        path: the file.
        container: "jsonl", "json", "csv", "tsv" or "parquet".
        zipped: whether it is gzipped.
        notes: what was recognised about the file while reading it, to be told.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.notes: list[str] = []
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        self.zipped = suffixes[-1:] == [".gz"]
        inner = suffixes[-2:-1] if self.zipped else suffixes[-1:]
        self.container = _CONTAINERS.get(inner[0], "") if inner else ""
        self.size = _regular(self.path).st_size
        if not self.container or (self.zipped and self.container == "parquet"):
            raise DataError(
                f"{self.path}: the name does not say what kind of file it is: expected an ending of "
                f"{', '.join(_CONTAINERS)} (each but .parquet also with .gz behind it), found "
                f"{''.join(self.path.suffixes) or 'none'}."
            )
        if self.size == 0:
            raise DataError(f"{self.path}: the file is empty; expected at least one row.")

    def __iter__(self) -> Iterator[Record | Bad]:
        if self.container == "parquet":
            yield from parquet_rows(self.path)
            return
        with self.open() as file:
            try:
                yield from self._rows(file)
            except (OSError, EOFError, zlib.error) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                raise DataError(f"{self.path}: the file cannot be read to its end: {reason}.") from error

    def open(self) -> IO[bytes]:
        """The file's bytes, unzipped; refused if they grow like a bomb."""
        try:
            # a file that became a pipe since it was looked at must not hang the reader
            handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise DataError(f"{self.path}: the file cannot be opened: {error.strerror}.") from error
        raw = os.fdopen(handle, "rb", buffering=1 << 18)
        if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
            raw.close()
            raise DataError(f"{self.path}: expected a regular file.")
        return io.BufferedReader(Unzipped(raw, self.path), 1 << 18) if self.zipped else raw

    def _rows(self, file: IO[bytes]) -> Iterator[Record | Bad]:
        head = file.read(4)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{self.path}: the file is UTF-16; save it as UTF-8.")
        head = head.removeprefix(_BOM)
        first = Prefixed(head, file)
        if self.container == "jsonl":
            yield from _json_lines(self.path.name, first)
        elif self.container == "json":
            yield from self._json(first)
        else:
            yield from self._table(first)

    def _json(self, file: Prefixed) -> Iterator[Record | Bad]:
        start = file.peek_text()
        if start == b"{":
            self.notes.append("rows are JSON lines in spite of the file's name")
            yield from _json_lines(self.path.name, file)
            return
        data = file.read(_ARRAY_CAP + 1)
        if len(data) > _ARRAY_CAP:
            raise DataError(
                f"{self.path}: a JSON array is read whole, and this one has more than {_ARRAY_CAP >> 20} MiB; write the "
                "rows as JSON lines (one object a line, file name ending in .jsonl)."
            )
        for line, result in array_rows(data):
            yield _record(f"{self.path.name}:{line}", result)

    def _table(self, file: Prefixed) -> Iterator[Record | Bad]:
        name = self.path.name
        csv.field_size_limit(LINE_CAP)
        header_line = file.readline()
        delimiter = "\t" if self.container == "tsv" else ","
        if self.container == "csv" and b"," not in header_line:
            for other in (";", "\t"):
                if other.encode() in header_line:
                    delimiter = other
                    self.notes.append(f"columns are separated by {'tabs' if other == chr(9) else other!r}")
                    break
        lines = _text_lines(header_line, file, name)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(reader)
        except (csv.Error, StopIteration) as error:
            raise DataError(f"{name}:1: the line of column names cannot be read: {error}.") from error
        _check_header(header, name)
        begin = reader.line_num + 1
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Bad(f"{name}:{begin}", "", f"the row cannot be read: {error}; the rest of the file was not read")
                return
            if values:
                yield _table_row(f"{name}:{begin}", header, values)
            begin = reader.line_num + 1


def splits(path: str | os.PathLike[str]) -> dict[str, Path]:
    """The files of a path: {"train": file} for a file; train, valid and test of a folder, as far as they are there.

    Raises:
        DataError: the folder has no train file, or two for the same split.
    """
    folder = Path(path)
    if not folder.is_dir():
        _regular(folder)
        return {"train": folder}
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        split = {"validation": "valid", "val": "valid", "dev": "valid"}.get(
            file.name.split(".")[0], file.name.split(".")[0]
        )
        ending = [s for s in file.suffixes if s.lower() != ".gz"]
        if split not in ("train", "valid", "test") or len(ending) != 1 or ending[0].lower() not in _CONTAINERS:
            continue
        if split in found:
            raise DataError(f"{folder}: expected one {split} file, found {found[split].name} and {file.name}.")
        found[split] = file
    if "train" not in found:
        names = ", ".join(file.name for file in sorted(folder.iterdir())[:10]) or "nothing"
        raise DataError(f"{folder}: expected a file train.jsonl (or .json, .csv, .tsv, .parquet) in it, found {names}.")
    return found


def _regular(path: Path) -> os.stat_result:
    try:
        status = path.stat()
    except FileNotFoundError:
        near = near_file(path)
        raise DataError(f"{path}: there is no such file{near}.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the file cannot be opened: {getattr(error, 'strerror', None) or error}.") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "something else (a pipe, socket or device)"
        raise DataError(f"{path}: expected a regular file, found {kind}.")
    return status


def near_file(path: Path) -> str:
    """What to say behind "there is no such file": the nearest name beside it, or that the folder is missing too."""
    import difflib

    try:
        names = [file.name for file in path.parent.iterdir()][:10_000]
    except OSError:
        return f", nor a folder {path.parent}"
    close = [name for name in difflib.get_close_matches(path.name, names, n=2, cutoff=0.75) if name != path.name]
    return f"; perhaps {path.with_name(close[0])} is meant" if close else ""


def _record(place: str, result: dict[str, Any] | str) -> Record | Bad:
    return Bad(place, "", result) if isinstance(result, str) else Record(place, result)


def _json_lines(name: str, file: Prefixed) -> Iterator[Record | Bad]:
    number = 0
    while line := file.readline(LINE_CAP + 1):
        number += 1
        if len(line) > LINE_CAP:
            yield Bad(f"{name}:{number}", "", f"the line is longer than {LINE_CAP >> 20} MiB")
            while line and not line.endswith(b"\n"):
                line = file.readline(LINE_CAP)
        elif not line.isspace():
            yield _record(f"{name}:{number}", parse_row(line))


def _text_lines(first: bytes, file: Prefixed, name: str) -> Iterator[str]:
    line, number = first, 1
    while line:
        if len(line) > LINE_CAP:
            raise DataError(f"{name}:{number}: the line is longer than {LINE_CAP >> 20} MiB.")
        yield line.decode("utf-8", "surrogateescape")  # what is not UTF-8 is told with the row that holds it
        line, number = file.readline(LINE_CAP + 1), number + 1


def _check_header(header: list[str], name: str) -> None:
    if any(not _valid(column) for column in header):
        raise DataError(f"{name}:1: the column names are not valid UTF-8; save the file as UTF-8.")
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise DataError(
            f"{name}:1: expected column names that differ, found {', '.join(map(repr, twice))} more than once."
        )


def _table_row(place: str, header: list[str], values: list[str]) -> Record | Bad:
    if len(values) != len(header):
        return Bad(place, "", f"expected {len(header)} columns as in the first line, found {len(values)}")
    for column, value in zip(header, values, strict=True):
        if not _valid(value):
            return Bad(place, column, "the text is not valid UTF-8; save the file as UTF-8")
    return Record(place, dict(zip(header, values, strict=True)))


def _valid(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
