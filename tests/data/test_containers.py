"""What containers add to rows is not data: nulls of Arrow's structs, byte order marks, Windows line ends, encodings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from veneer._files import decode
from veneer.data.chat.template import read_template
from veneer.data.rows.row import Row
from veneer.data.rows.shapes import RowReader
from veneer.errors import DataError

BOM = b"\xef\xbb\xbf"


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "weather?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [call("weather", city="Rome", days=[{"n": 1}, {"m": "x"}])],
            },
            {"role": "tool", "content": "sunny", "name": "weather"},
            {"role": "assistant", "content": "It is sunny.", "reasoning_content": "easy"},
        ],
        "tools": [tool("weather", city={"type": "string"}), tool("add", a={"type": "number", "minimum": 0})],
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "1 + 2?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": ""}], "tool_calls": [call("add", a=1, b=2)]},
        ],
        "tools": [tool("add", a={"type": "number"}, b={"type": "number"})],
    },
]
TEXTS = json.loads(json.dumps(ROWS))
"""The rows with each content as text, since a column of a table has one type."""
TEXTS[1]["messages"][0]["content"], TEXTS[1]["messages"][1]["content"] = "1 + 2?", ""


def union(values: list[Any]) -> list[Any]:
    """Values as the structs of one Arrow column: every object has the keys of all, with nulls."""
    objects = [value for value in values if isinstance(value, dict)]
    if objects:
        keys = dict.fromkeys(key for value in objects for key in value)
        columns = {key: union([value.get(key) for value in objects]) for key in keys}
        full = iter([{key: columns[key][i] for key in keys} for i in range(len(objects))])
        return [next(full) if isinstance(value, dict) else value for value in values]
    lists = [value for value in values if isinstance(value, list)]
    if lists:
        items = iter(union([item for value in lists for item in value]))
        return [[next(items) for _ in value] if isinstance(value, list) else value for value in values]
    return values


def read(path: Path) -> list[Row]:
    rows = list(RowReader(path))
    assert all(isinstance(row, Row) for row in rows), [str(row) for row in rows]
    return rows  # type: ignore[return-value]


def test_nulls_of_a_parquet_struct_are_no_data(tmp_path: Path) -> None:
    """Messages, arguments and schemas come back with the keys that each row was written with."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.Table.from_pylist(TEXTS), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS), encoding="utf-8")
    from_parquet, from_json = read(tmp_path / "a.parquet"), read(tmp_path / "a.jsonl")
    assert [row.messages for row in from_parquet] == [row.messages for row in from_json]
    assert [row.tools for row in from_parquet] == [row.tools for row in from_json] == [row["tools"] for row in ROWS]


def test_nulls_that_an_export_to_json_keeps_are_no_data(tmp_path: Path) -> None:
    """Nulls in messages, calls, parts and schemas are passed over; arguments may hold a null of their own."""
    exported = union(ROWS)
    for row in exported:  # arguments are JSON text in such exports, or would be indistinguishable
        for message in row["messages"]:
            for one in message["tool_calls"] or ():
                kept = {key: value for key, value in one["function"]["arguments"].items() if value is not None}
                one["function"]["arguments"] = json.dumps({**kept, "days": None})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in exported), encoding="utf-8")
    first, second = read(tmp_path / "a.jsonl")
    assert first.tools == ROWS[0]["tools"] and second.tools == ROWS[1]["tools"]
    assert set(first.messages[3]) == {"role", "content", "reasoning_content"}
    assert second.messages[0]["content"] == "1 + 2?"
    assert second.messages[1]["tool_calls"][0] == call("add", a=1, b=2, days=None)


def test_a_default_of_null_stays_in_a_schema(tmp_path: Path) -> None:
    """null is a value of a schema's default and const."""
    tools = [tool("f", a={"type": ["string", "null"], "default": None, "title": None})]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages, "tools": tools}), encoding="utf-8")
    (row,) = read(tmp_path / "a.jsonl")
    assert row.tools == [tool("f", a={"type": ["string", "null"], "default": None})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_marks_and_windows_line_ends_are_no_data(tmp_path: Path, name: str) -> None:
    """Each container saved by a Windows editor gives the rows of the plain file."""
    separator = "\t" if name.endswith("tsv") else ","
    rows = [{"prompt": "a b", "completion": "c"}, {"prompt": "d", "completion": "e"}]
    lines = {
        "a.jsonl": [json.dumps(row) for row in rows],
        "a.json": ["[", json.dumps(rows[0]) + ",", json.dumps(rows[1]), "]"],
    }.get(name, [separator.join(rows[0]), *(separator.join(row.values()) for row in rows)])
    (tmp_path / name).write_bytes(BOM + "\r\n".join(lines).encode() + b"\r\n")
    assert [(row.prompt, row.completion) for row in read(tmp_path / name)] == [("a b", "c"), ("d", "e")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_refused_with_the_remedy(tmp_path: Path, encoding: str) -> None:
    """Rows and templates, with and without a mark."""
    (tmp_path / "a.csv").write_bytes("text\nhello\n".encode(encoding))
    with pytest.raises(DataError, match=r"a\.csv: the file is encoded as UTF-16 or UTF-32; save it as UTF-8"):
        RowReader(tmp_path / "a.csv")
    (tmp_path / "a.jinja").write_bytes("{{ messages }}".encode(encoding))
    with pytest.raises(DataError, match=r"a\.jinja: the file is encoded as UTF-16 or UTF-32; save it as UTF-8"):
        read_template(tmp_path / "a.jinja")


def test_a_template_is_read_without_its_mark(tmp_path: Path) -> None:
    """A byte order mark and Windows line ends change nothing; what is not UTF-8 is refused."""
    (tmp_path / "a.jinja").write_bytes(BOM + b"{{ 1 }}\r\n{{ 2 }}")
    assert read_template(tmp_path / "a.jinja") == "{{ 1 }}\n{{ 2 }}"
    with pytest.raises(ValueError, match="not valid UTF-8: invalid start byte at byte 1; save the file as UTF-8"):
        decode(b"a\xff\xfe and more")


def test_spaces_after_the_commas_of_a_table_are_no_data(tmp_path: Path) -> None:
    """Where the column names stand behind spaces, so do the values; it is said."""
    path = tmp_path / "a.csv"
    path.write_text('prompt, completion\na, "b, c"\n', encoding="utf-8")
    rows = RowReader(path)
    (row,) = rows
    assert isinstance(row, Row) and (row.prompt, row.completion) == ("a", "b, c")
    assert any("spaces after ','" in notice for notice in rows.notices())
