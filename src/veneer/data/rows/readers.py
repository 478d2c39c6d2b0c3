"""Readers for files of rows: one record at a time, each with its file and line.

Formats: JSON lines, a JSON array, CSV and TSV (each plain or gzipped), and Parquet. A row that cannot be read is yielded
as a ``BadRow`` between the others, so that all bad rows of a file are reported at once; a file that cannot be read at all
raises ``DataError``. A file may be larger than memory, except for a JSON array, which is read whole and limited in size.

JSON is parsed strictly: no NaN, no lone surrogates, no invalid UTF-8, no duplicate key at the top level of a row. Only
regular files are read, so that a pipe cannot block the reader. The length of a line and the growth of a gzip file are
limited, so that a file cannot exhaust the memory.

Here a row maps column names to values; ``shapes.py`` interprets the columns.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from veneer.data.rows.hub_sets import hub_set
from veneer.data.rows.json_rows import LINE_LIMIT, array_rows, parse_row
from veneer.data.rows.memory_rows import source_of
from veneer.data.rows.row import BadRow, Record
from veneer.errors import DataError

__all__ = ["RecordReader", "near_file", "splits"]

_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"}
_ARRAY_LIMIT = 1 << 30
_BUFFER = 1 << 18
_PARQUET_ROWS = 1024
_BOM = b"\xef\xbb\xbf"
_GROWTH = 200  # rows of text grow 3 to 50 times when unzipped, a gzip bomb about 1,000 times
_GROWTH_FROM = 64 << 20  # bytes; the ratio of a smaller file is not checked


class RecordReader:
    """Reads the records of one file; each iteration starts at the beginning of the file.

    Attributes:
        path: the file.
        container: "jsonl", "json", "csv", "tsv", "parquet", or "hub" for a data set of the hub.
        zipped: True if the file is gzipped.
        notices: facts about the format that were detected while reading, for the user.

    Raises:
        DataError: the file is missing, empty, not a regular file, or its name has no known extension.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.notices: list[str] = []
        self.hub = hub_set(self.path)
        if self.hub is not None:
            self.container, self.zipped = "hub", False
            return
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        self.zipped = suffixes[-1:] == [".gz"]
        extension = suffixes[-2:-1] if self.zipped else suffixes[-1:]
        self.container = _FORMATS.get(extension[0], "") if extension else ""
        size = _regular_file(self.path).st_size
        if not self.container or (self.zipped and self.container == "parquet"):
            raise DataError(
                f"{self.path}: unknown file format: expected a name that ends in {', '.join(_FORMATS)} (all but .parquet "
                f"may be followed by .gz), found {''.join(self.path.suffixes) or 'no extension'}"
            )
        if size == 0:
            raise DataError(f"{self.path}: the file is empty; expected at least one row")

    def __iter__(self) -> Iterator[Record | BadRow]:
        if self.hub is not None:
            for number, values in enumerate(self.hub.rows(), 1):
                yield Record(f"{self.hub}:row {number}", _without_nulls(values))
            return
        if self.container == "parquet":
            yield from _parquet_rows(self.path)
            return
        with self._open() as file:
            try:
                yield from self._rows(file)
            except (OSError, EOFError, zlib.error) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                raise DataError(f"{self.path}: cannot read the whole file: {reason}") from error

    def _open(self) -> io.BufferedReader[Any]:
        try:
            # O_NONBLOCK: the file may have been replaced by a pipe since its status was checked
            handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise DataError(f"{self.path}: cannot open the file: {error.strerror}") from error
        raw = io.BufferedReader(io.FileIO(handle), _BUFFER)
        if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
            raw.close()
            raise DataError(f"{self.path}: expected a regular file")
        return io.BufferedReader(_Unzipped(raw, self.path), _BUFFER) if self.zipped else raw

    def _rows(self, file: io.BufferedReader[Any]) -> Iterator[Record | BadRow]:
        start = file.peek(4)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start[:4]:
            raise DataError(f"{self.path}: the file is encoded as UTF-16 or UTF-32; save it as UTF-8")
        if start.startswith(_BOM):
            file.read(len(_BOM))
        if self.container == "jsonl":
            yield from _json_lines(self.path, file)
        elif self.container == "json":
            yield from self._json(file)
        else:
            yield from self._table(file)

    def _json(self, file: io.BufferedReader[Any]) -> Iterator[Record | BadRow]:
        if file.peek(1).lstrip().startswith(b"{"):
            self.notices.append("the file holds JSON lines, although its name ends in .json")
            yield from _json_lines(self.path, file)
            return
        data = file.read(_ARRAY_LIMIT + 1)
        if len(data) > _ARRAY_LIMIT:
            raise DataError(
                f"{self.path}: a JSON array is limited to {_ARRAY_LIMIT >> 20} MiB; write the rows as JSON lines "
                "(one object per line, file name ending in .jsonl)"
            )
        for line, result in array_rows(data):
            yield _record(f"{self.path.name}:{line}", result)

    def _table(self, file: io.BufferedReader[Any]) -> Iterator[Record | BadRow]:
        name = self.path.name
        csv.field_size_limit(LINE_LIMIT)
        header_line = file.readline(LINE_LIMIT + 1)
        delimiter = "\t" if self.container == "tsv" else ","
        if self.container == "csv" and b"," not in header_line:
            delimiter = next((other for other in ";\t" if other.encode() in header_line), ",")
            if delimiter != ",":
                self.notices.append(f"columns are separated by {'tabs' if delimiter == chr(9) else repr(delimiter)}")
        spaced = delimiter != "\t" and f"{delimiter} ".encode() in header_line
        if spaced:
            self.notices.append(f"spaces after {delimiter!r} are left out, as between the column names")
        reader = csv.reader(
            _text_lines(header_line, file, name), delimiter=delimiter, strict=True, skipinitialspace=spaced
        )
        try:
            header = next(reader)
        except (csv.Error, StopIteration) as error:
            raise DataError(f"{name}:1: cannot read the line of column names: {error}") from error
        _check_header(header, name)
        line = reader.line_num + 1
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadRow(f"{name}:{line}", "", f"cannot read the row: {error}; the rest of the file was not read")
                return
            if values:
                yield _table_row(f"{name}:{line}", header, values)
            line = reader.line_num + 1


class _Unzipped(io.RawIOBase):
    """Unzips a gzip file and refuses one that grows like a bomb."""

    def __init__(self, raw: IO[bytes], path: Path) -> None:
        self._raw = raw
        self._file = gzip.GzipFile(fileobj=raw)
        self._path = path
        self._zipped_size = max(1, os.fstat(raw.fileno()).st_size)
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._size += len(data)
        if self._size > _GROWTH_FROM and self._size > _GROWTH * self._zipped_size:
            raise DataError(
                f"{self._path}: the file grows more than {_GROWTH} times when unzipped, which text does not; unzip it "
                "yourself if you trust it"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        self._raw.close()
        super().close()


def splits(path: str | os.PathLike[str]) -> dict[str, Path]:
    """Find the files of a data set.

    Args:
        path: a file, a folder with files named train, valid (or validation, val, dev) and test, or a data set of the hub with such splits.

    Returns:
        The files by split: "train", and where the folder has them "valid" and "test". A single file is "train".

    Raises:
        DataError: the path does not exist, or the folder has no train file or two files for one split.
    """
    folder = Path(path)
    if hub := hub_set(folder):
        known = {} if hub.split else {_SPLITS[name]: Path(f"{hub}:{name}") for name in hub.splits() if name in _SPLITS}
        return known if "train" in known else {"train": folder}
    if not folder.is_dir():
        _regular_file(folder)
        return {"train": folder}
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        split = _SPLITS.get(file.name.split(".")[0])
        extensions = [suffix.lower() for suffix in file.suffixes if suffix.lower() != ".gz"]
        if split is None or len(extensions) != 1 or extensions[0] not in _FORMATS:
            continue
        if split in found:
            raise DataError(f"{folder}: expected one {split} file, found {found[split].name} and {file.name}")
        found[split] = file
    if "train" not in found:
        names = ", ".join(file.name for file in sorted(folder.iterdir())[:10]) or "nothing"
        raise DataError(
            f"{folder}: expected a file train.jsonl (or .json, .csv, .tsv, .parquet), found {names}{_saved_set(folder)}"
        )
    return found


def _saved_set(folder: Path) -> str:
    """A hint to append to a missing train file: the folder is one of ``datasets``, or holds files that can be named."""
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        return "; the folder was written by save_to_disk of datasets: write its rows with to_json or to_parquet in place of that"
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in _FORMATS]
    return f"; to read other files, name them one by one, such as {files[0]}" if files else ""


def near_file(path: Path) -> str:
    """A hint to append to "no such file": the closest name in the folder, that the folder is missing too, or that a file is needed."""
    if str(path) == "-":
        return "; rows are read several times, so write those of the standard input to a file"
    try:
        names = [file.name for file in path.parent.iterdir()][:10_000]
    except OSError:
        return f", nor a folder {path.parent}"
    close = [name for name in difflib.get_close_matches(path.name, names, n=2, cutoff=0.75) if name != path.name]
    return f"; did you mean {path.with_name(close[0])}?" if close else ""


def _regular_file(path: Path) -> os.stat_result:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file{near_file(path)}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot open the file: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        found = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise DataError(f"{path}: expected a regular file, found {found}")
    return status


def _record(source: str, result: dict[str, Any] | str) -> Record | BadRow:
    return BadRow(source, "", result) if isinstance(result, str) else Record(source, result)


def _json_lines(path: Path, file: IO[bytes]) -> Iterator[Record | BadRow]:
    number = 0
    while line := file.readline(LINE_LIMIT + 1):
        number += 1
        if len(line) > LINE_LIMIT:
            yield BadRow(source_of(path, number), "", f"the line is longer than {LINE_LIMIT >> 20} MiB")
            while line and not line.endswith(b"\n"):
                line = file.readline(LINE_LIMIT)
        elif not line.isspace():
            yield _record(source_of(path, number), parse_row(line))


def _text_lines(first: bytes, file: IO[bytes], name: str) -> Iterator[str]:
    line, number = first, 1
    while line:
        if len(line) > LINE_LIMIT:
            raise DataError(f"{name}:{number}: the line is longer than {LINE_LIMIT >> 20} MiB")
        yield line.decode("utf-8", "surrogateescape")  # invalid UTF-8 is reported with its row
        line, number = file.readline(LINE_LIMIT + 1), number + 1


def _check_header(header: list[str], name: str) -> None:
    if any(not _valid_utf8(column) for column in header):
        raise DataError(f"{name}:1: the column names are not valid UTF-8; save the file as UTF-8")
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise DataError(f"{name}:1: expected distinct column names, found {', '.join(map(repr, twice))} more than once")


def _table_row(source: str, header: list[str], values: list[str]) -> Record | BadRow:
    if len(values) != len(header):
        return BadRow(source, "", f"expected {len(header)} columns as in the first line, found {len(values)}")
    for column, value in zip(header, values, strict=True):
        if not _valid_utf8(value):
            return BadRow(source, column, "the text is not valid UTF-8; save the file as UTF-8")
    return Record(source, dict(zip(header, values, strict=True)))


def _valid_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(path: Path) -> Iterator[Record | BadRow]:
    """Yield each row as a record; its source is "file:row N", counted from 1."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow, which is not installed; run: pip install 'veneer[parquet]'"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(
                        f"{path.name}:row {number}", {key: _without_nulls(item) for key, item in values.items()}
                    )
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # pyarrow raises many types for a damaged file
        after = f" after row {number}" if number else ""
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{path}: cannot read the Parquet file{after}: {reason}") from error


def _without_nulls(value: Any) -> Any:
    """Remove null fields of structs: Arrow gives every struct of a column the fields of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
