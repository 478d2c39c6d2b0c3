"""Containers: what is read, what is refused, and with which place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import re
from pathlib import Path

import pytest

from veneer.data.rows import readers
from veneer.data.rows.readers import RecordReader, splits
from veneer.data.rows.row import BadRow, Record
from veneer.errors import DataError

ROWS = [{"text": "one"}, {"text": "zwei \u00e4\u4e2d\U0001f44d"}, {"text": "three\nlines"}]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def values(path: Path) -> list[dict[str, object] | str]:
    return [r.values if isinstance(r, Record) else str(r) for r in RecordReader(path)]


def json_lines(rows: list[dict[str, str]], end: str = "\n") -> str:
    return "".join(json.dumps(row) + end for row in rows)


def csv_text(delimiter: str = ",", end: str = "\r\n") -> str:
    return f'id{delimiter}text{end}1{delimiter}one{end}2{delimiter}"zwei \u00e4\u4e2d\U0001f44d"{end}3{delimiter}"three\nlines"{end}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json_lines(ROWS)),
        ("a.ndjson", json_lines(ROWS, "\r\n")),
        ("a.jsonl", "\ufeff" + json_lines(ROWS)),
        ("a.jsonl", json_lines(ROWS).rstrip("\n")),
        ("a.jsonl", "\n" + json_lines(ROWS, "\n\n")),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", "\ufeff\n " + json.dumps(ROWS) + "\n"),
        ("a.json", json_lines(ROWS)),
        ("a.csv", csv_text()),
        ("a.csv", "\ufeff" + csv_text(end="\n")),
        ("a.csv", csv_text(";")),
        ("a.tsv", csv_text("\t")),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_container_gives_the_same_rows(tmp_path: Path, name: str, content: str, zipped: bool) -> None:
    """JSON lines, arrays and tables, with and without BOM, CRLF, blank lines, a last line end and gzip."""
    data = gzip.compress(content.encode()) if zipped else content.encode()
    path = write(tmp_path, name + (".gz" if zipped else ""), data)
    assert [row["text"] for row in values(path) if isinstance(row, dict)] == [row["text"] for row in ROWS]


def test_parquet(tmp_path: Path) -> None:
    """A parquet file is read in batches, its places are row numbers."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([{**row, "tags": ["x", None]} for row in ROWS] * 500), path)
    found = list(RecordReader(path))
    assert len(found) == 1500 and found[1499].source == "a.parquet:row 1500"
    assert isinstance(found[1], Record) and found[1].values == {**ROWS[1], "tags": ["x", None]}


def test_a_damaged_parquet_file_is_told(tmp_path: Path) -> None:
    """Bytes that are not parquet are one error of ours."""
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="cannot read the Parquet file"):
        list(RecordReader(write(tmp_path, "a.parquet", b"PAR1 nonsense PAR1")))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": NaN}', "not valid JSON"),
        (b'{"text": "a\xff"}', "not valid UTF-8"),
        (b'{"text": "\\ud800"}', "not valid JSON"),
        (b'{"text": "a\x00b"}', "not valid JSON"),
        (b'{"text": "a"', "not valid JSON"),
        (b"[" * 5000, "not valid JSON"),
        (b'["text"]', "expected a JSON object, found a list of 1"),
        (b"7", "found the number 7"),
        (b'{"text": "a", "text": "b"}', "duplicate key 'text'"),
        (b'{"text": "a"} {"text": "b"}', "not valid JSON"),
    ],
)
def test_a_bad_line_is_told_with_its_place_among_good_ones(tmp_path: Path, line: bytes, words: str) -> None:
    """A line that is not strict JSON is bad in its place; the others are read."""
    path = write(tmp_path, "a.jsonl", b'{"text": "x"}\n' + line + b'\n{"text": "y \\"text\\": z"}\n')
    first, bad, last = RecordReader(path)
    assert isinstance(first, Record) and isinstance(last, Record)
    assert isinstance(bad, BadRow) and bad.source == "a.jsonl:2" and words in bad.reason


def test_a_bad_array_is_told_with_its_line(tmp_path: Path) -> None:
    """A JSON array names the line of each element, and the line where it stops being JSON."""
    path = write(tmp_path, "a.json", '[\n{"text": "a"},\n\n{"text": 1e999},\n5\n,{"text": oops}]')
    found = list(RecordReader(path))
    assert [r.source for r in found] == ["a.json:2", "a.json:4", "a.json:5", "a.json:6"]
    assert "rest of the file was not read" in str(found[-1]) and "the number 5" in str(found[2])
    for text, words in (
        ("[]x", "found more text"),
        ('[{"a": 1} {"a": 2}]', "a comma"),
        ("7", "a JSON array of rows"),
        ("[", "JSON"),
    ):
        assert words in str(list(RecordReader(write(tmp_path, "b.json", text)))[-1])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a,b\n1,2\n3\n4,5\n", "a.csv:3: expected 2 columns as in the first line, found 1"),
        (b'a,b\n1,"x\ny"\n1,2,3\n', "a.csv:4: expected 2 columns"),
        (b"a,b\n1,\xff\n", "a.csv:2: b: the text is not valid UTF-8"),
        (b'a,b\n1,"open\n2,3\n', "a.csv:2: cannot read the row"),
        (b'a,b\n1,"x"y\n', "a.csv:2: cannot read the row"),
    ],
)
def test_a_bad_table_row_is_told_with_its_line(tmp_path: Path, content: bytes, words: str) -> None:
    """Rows of another width, broken quotes and bytes that are not text are told with the line they begin in."""
    bad = [str(r) for r in RecordReader(write(tmp_path, "a.csv", content)) if isinstance(r, BadRow)]
    assert len(bad) == 1 and bad[0].startswith(words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"a,a\n1,2\n", "'a' more than once"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16"),
        ("a.txt", b"x", "expected a name that ends in"),
        ("a", b"x", "found no extension"),
        ("a.parquet.gz", b"x", "expected a name that ends in"),
        ("a.jsonl.gz", b"not gzip", "cannot read the whole file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-12], "cannot read the whole file"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_error(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    """What makes a whole file unreadable is an error that names the file."""
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=words) as caught:
        list(RecordReader(path))
    assert name in str(caught.value)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    """A misspelt name is told with the file that may be meant."""
    write(tmp_path, "rows.jsonl", "{}")
    with pytest.raises(DataError, match=r"no such file; did you mean .*rows\.jsonl\?"):
        RecordReader(tmp_path / "row.jsonl")
    with pytest.raises(DataError, match="no such file"):
        RecordReader(tmp_path / "nowhere" / "row.jsonl")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_and_a_folder_are_refused_without_waiting(tmp_path: Path) -> None:
    """Only regular files are read: a pipe would hang, a folder is another thing."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="pipe, socket or device"):
        RecordReader(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="found a folder"):
        RecordReader(tmp_path / "folder.jsonl")


def test_a_file_that_becomes_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    """Replaced between being looked at and being opened, it does not hang the reader either."""
    path = write(tmp_path, "a.jsonl", "{}")
    source = RecordReader(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="expected a regular file"):
        list(source)


def test_a_line_beyond_the_bound_is_bad_and_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line longer than the cap is never held whole; the rows behind it are read."""
    monkeypatch.setattr(readers, "LINE_LIMIT", 1000)
    path = write(tmp_path, "a.jsonl", '{"text": "' + "x" * 5000 + '"}\n{"text": "y"}\n')
    bad, good = RecordReader(path)
    assert (
        isinstance(bad, BadRow) and "longer" in bad.reason and isinstance(good, Record) and good.source == "a.jsonl:2"
    )


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zipped file that grows a thousandfold is refused while it grows."""
    monkeypatch.setattr(readers, "_GROWTH_FROM", 1 << 20)
    path = write(tmp_path, "a.jsonl.gz", gzip.compress(b'{"text": "' + b"0" * (8 << 20) + b'"}\n'))
    with pytest.raises(DataError, match="grows more than 200 times"):
        list(RecordReader(path))


def test_a_folder_holds_splits(tmp_path: Path) -> None:
    """train, valid (or validation, val, dev) and test files are found; a missing or doubled one is told."""
    for name in ("train.jsonl", "validation.csv", "test.json.gz", "notes.txt", "train.md"):
        write(tmp_path, name, "x")
    found = splits(tmp_path)
    assert {split: path.name for split, path in found.items()} == {
        "train": "train.jsonl",
        "valid": "validation.csv",
        "test": "test.json.gz",
    }
    assert splits(tmp_path / "train.jsonl") == {"train": tmp_path / "train.jsonl"}
    write(tmp_path, "train.csv", "x")
    with pytest.raises(DataError, match=r"one train file, found train\.csv and train\.jsonl"):
        splits(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found nothing"):
        splits(tmp_path / "empty")


def spoiled(rng: random.Random, data: bytes) -> bytes:
    """A file with some bytes changed, put in, taken out, repeated or cut off."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(found) + 1)
        how = rng.randrange(5)
        if how == 0 and at < len(found):
            found[at] = rng.randrange(256)
        elif how == 1:
            found[at:at] = bytes(rng.choice(b'\0"\n\r,;[]{}\\\xff\xfe') for _ in range(rng.randint(1, 4)))
        elif how == 2:
            del found[at : at + rng.randint(1, 20)]
        elif how == 3:
            found[at:at] = found[at : at + rng.randint(1, 50)]
        else:
            del found[at:]
    return bytes(found)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.csv.gz", "a.parquet"])
def test_mutated_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    """400 spoiled files of each container: rows with places, or one error of ours; nothing else is ever raised."""
    rows = [{"id": str(k), "text": f'row {k} \u4e2d, "quoted"\nand more'} for k in range(20)]
    table = io.StringIO()
    writer = csv.DictWriter(table, ["id", "text"], delimiter="\t" if "tsv" in name else ",")
    writer.writeheader()
    writer.writerows(rows)
    content = {"jsonl": json_lines(rows), "json": json.dumps(rows, indent=1)}.get(name.split(".")[1], table.getvalue())
    data = gzip.compress(content.encode()) if name.endswith(".gz") else content.encode()
    if name == "a.parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), tmp_path / name)
        data = (tmp_path / name).read_bytes()
    rng = random.Random(name)
    whole = refused = 0
    for _ in range(400):
        path = write(tmp_path, name, spoiled(rng, data))
        try:
            found = list(RecordReader(path))
        except DataError as error:
            refused += name in str(error)
            continue
        whole += all(re.fullmatch(r"a\.[a-z.]+:(row )?\d+", record.source) is not None for record in found)
    assert whole + refused == 400 and refused > 0
