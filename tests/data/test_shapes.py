"""What columns mean, and what is said of rows that do not fit."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from tests.data.families import tokenizer_of

from veneer.data.chat.render import Renderer
from veneer.data.rows.row import BadRow, Row
from veneer.data.rows.shapes import RowReader
from veneer.errors import ConfigError, DataError

CHAT = {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "x"}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def file_of(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one(folder: Path, row: Any, **options: Any) -> Row:
    (found,) = RowReader(file_of(folder, row), **options)
    assert isinstance(found, Row), found
    return found


def faults(folder: Path, row: Any, good: Any = CHAT) -> list[str]:
    """What is said of a row behind a good one."""
    return [str(found) for found in RowReader(file_of(folder, good, row)) if isinstance(found, BadRow)]


def test_messages(tmp_path: Path) -> None:
    """Content may be a list of text parts, a weight is taken off, arguments of calls become objects."""
    row = one(
        tmp_path,
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
                {"role": "tool", "content": "3", "tool_call_id": "1"},
                {"role": "assistant", "content": "three", "weight": 1},
            ],
            "tools": [TOOL],
        },
    )
    assert row.kind == "chat" and row.weights == (1.0, 0.0, 1.0, 1.0) and row.tools == [TOOL]
    assert row.messages[0] == {"role": "user", "content": "ab"}
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": "x"}
    assert all("weight" not in message for message in row.messages)


def test_prompt_and_completion(tmp_path: Path) -> None:
    """Two texts are a pair; two lists of messages are a conversation of which only the completion is trained."""
    row = one(tmp_path, {"prompt": "ask ", "completion": "answer"})
    assert (row.kind, row.prompt, row.completion) == ("pair", "ask ", "answer")
    row = one(tmp_path, {"prompt": "[asked", "completion": '[{"role": "user"}]'})
    assert (row.kind, row.prompt, row.completion) == ("pair", "[asked", '[{"role": "user"}]')
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    row = one(tmp_path, {"prompt": before, "completion": [{"role": "assistant", "content": "d"}]})
    assert row.kind == "chat" and row.weights == (0.0, 0.0, 0.0, 1.0)


def test_alpaca(tmp_path: Path) -> None:
    """Instruction and input are asked together; system and history stand before."""
    row = one(tmp_path, {"instruction": "add", "input": "1 2", "output": "3", "system": "s", "history": [["a", "b"]]})
    assert [(m["role"], m["content"]) for m in row.messages] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "add\n\n1 2"),
        ("assistant", "3"),
    ]
    assert row.prompt == "s\n\na\n\nb\n\nadd\n\n1 2\n\n" and row.completion == "3"
    assert one(tmp_path, {"instruction": "add", "input": "", "output": "3"}).prompt == "add\n\n"


def test_sharegpt(tmp_path: Path) -> None:
    """Tags become roles, a function call becomes a call of a tool, other tags can be mapped."""
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}
    turns = [
        {"from": "human", "value": "a"},
        call,
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "b"},
    ]
    row = one(tmp_path, {"conversations": turns, "system": "s", "tools": json.dumps([TOOL])})
    assert [m["role"] for m in row.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}} and row.tools == [
        TOOL
    ]
    row = one(tmp_path, {"conversations": [{"from": "npc", "value": "hi"}]}, roles={"npc": "assistant"})
    assert row.messages == ({"role": "assistant", "content": "hi"},)
    row = one(tmp_path, {"conversations": [{"role": "assistant", "content": "hi"}]})
    assert row.messages == ({"role": "assistant", "content": "hi"},)


def test_lists_may_be_json_text_in_a_table(tmp_path: Path) -> None:
    """A CSV file may hold messages as JSON text."""
    path = tmp_path / "a.csv"
    path.write_text(
        'messages\n"[{""role"": ""user"", ""content"": ""a""}]"\n"[{""role"": ""user""]"\n', encoding="utf-8"
    )
    good, bad = RowReader(path)
    assert isinstance(good, Row) and good.messages == ({"role": "user", "content": "a"},)
    assert (
        isinstance(bad, BadRow) and bad.source == "a.csv:3" and bad.key == "messages" and "not valid JSON" in bad.reason
    )


def test_the_shape_is_reported_with_its_reason(tmp_path: Path) -> None:
    """What was recognised, which columns stand for ours and which are not used is one line."""
    rows = RowReader(file_of(tmp_path, {"q": "a", "a": "b", "id": 1}), columns={"prompt": "q", "completion": "a"})
    assert rows.notices() == [
        "rows.jsonl: format prompt (the rows have prompt and completion); prompt is column q, completion is column a; "
        "not used: id"
    ]
    (row,) = rows
    assert isinstance(row, Row) and row.key == "a"
    alpaca = RowReader(file_of(tmp_path, {"instruction": "a", "output": "b"}))
    assert "answers in history are trained" in alpaca.notices()[0]


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"question": "a", "answer": "b"}, {}, "--columns prompt=question,completion=answer"),
        ({"mr": "a", "ref": "b"}, {}, "--columns prompt=mr,completion=ref"),
        ({"x": "a", "y": "b"}, {}, "if x is the question and y the answer"),
        ({"body": "a"}, {}, "--columns text=body"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {},
            "pass --task dpo; to train on the chosen answers only, pass --columns completion=chosen",
        ),
        ({"message": []}, {}, "--columns messages=message"),
        ({"x": "a"}, {"columns": {"text": "y"}}, "no column 'y'"),
        ({"question": "a"}, {"columns": {"text": "qestion"}}, "did you mean text=question"),
        ({"text": "a"}, {"format": "prompt"}, "needs the columns prompt and completion"),
        ({"prompt": "a", "text": "x"}, {"format": "messages"}, "needs the column messages"),
    ],
)
def test_columns_that_are_not_understood(tmp_path: Path, row: Any, options: Any, words: str) -> None:
    """The error names the file and line, the columns it has, and the map that would read them."""
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        RowReader(file_of(tmp_path, row), **options)
    assert "rows.jsonl:1" in str(caught.value)
    assert all(name in str(caught.value) for name in row)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "mesages"}, "did you mean messages"),
        ({"columns": {"promt": "a"}}, "did you mean prompt"),
        ({"columns": {"question": "prompt"}}, "prompt=question"),
        ({"roles": {"npc": "asistant"}}, "expected user, assistant"),
    ],
)
def test_options_that_do_not_exist(tmp_path: Path, options: Any, words: str) -> None:
    """An unknown format, column or role is told with what is known."""
    with pytest.raises(ConfigError, match=words):
        RowReader(file_of(tmp_path, CHAT), **options)


def message(**changes: Any) -> dict[str, Any]:
    """A row whose second message is changed."""
    return {"messages": [CHAT["messages"][0], {**CHAT["messages"][1], **changes}]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, "messages: missing; the row has the column text"),
        ({"messages": "hello"}, "messages: expected a list of messages, found the text 'hello'"),
        ({"messages": []}, "messages: expected at least one message"),
        ({"messages": [5]}, "messages[0]: expected an object with role and content, found the number 5"),
        (message(role="asistant"), "messages[1].role: expected system"),
        (message(role="asistant"), "did you mean assistant?"),
        (message(role=None), "messages[1].role: expected"),
        (message(content=None), "messages[1].content: expected text, found null"),
        (message(content=5), "messages[1].content: expected text, found the number 5"),
        (message(content=" "), "messages[1].content: expected text, found an empty one"),
        (message(content=[{"type": "image_url"}]), "messages[1].content[0]: expected a part of type text"),
        (message(content=[{"type": "text", "text": 1}]), "messages[1].content[0].text: expected text"),
        (message(content="a\0b"), "messages[1].content: expected text without NUL"),
        (message(weight=2), "messages[1].weight: expected 0 or 1, found the number 2"),
        (message(weight=True), "messages[1].weight: expected 0 or 1, found true"),
        (message(wieght=0), "messages[1].wieght: unknown key; did you mean weight?"),
        (message(tool_calls={}), "messages[1].tool_calls: expected a list of calls"),
        (message(tool_calls=[{}]), "messages[1].tool_calls[0]: expected an object with a function"),
        (message(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "arguments: not valid JSON"),
        (message(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]), "arguments: expected an object"),
        (message(tool_calls=[{"function": {"name": "f", "arguments": {"\0": 1}}}]), "without NUL"),
        ({**CHAT, "tools": {}}, "tools: expected a list of tools"),
        ({**CHAT, "tools": [{"type": "function"}]}, "tools[0]: expected an object with a function and its name"),
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "only an assistant's message can be trained"),
    ],
)
def test_a_bad_message_is_told_by_place_and_key(tmp_path: Path, row: Any, words: str) -> None:
    """File, line, key path, what was expected and what was found."""
    found = faults(tmp_path, row)
    assert found and all(text.startswith("rows.jsonl:2: ") for text in found)
    assert any(words in text for text in found)


def test_all_faults_of_a_row_are_told(tmp_path: Path) -> None:
    """Three wrong keys are three faults, in one go."""
    found = faults(tmp_path, {"messages": [{"role": "x", "content": 1, "weight": 7}]})
    assert [text.split(": ")[1] for text in found] == ["messages[0].weight", "messages[0].role", "messages[0].content"]


@pytest.mark.parametrize(
    ("good", "row", "words"),
    [
        ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, "completion: missing"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 1}, "completion: expected text"),
        (
            {"prompt": "a", "completion": "b"},
            {"prompt": "a", "completion": ""},
            "completion: expected text, found an empty",
        ),
        ({"prompt": "a", "completion": "b"}, {"prompt": [1], "completion": "b"}, "prompt[0]: expected an object"),
        ({"text": "a"}, {"text": []}, "text: expected text, found an empty list"),
        ({"instruction": "a", "output": "b"}, {"instruction": 1, "output": 2}, "instruction: expected text"),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "input": 1}, "input: expected text"),
        (
            {"instruction": "a", "output": "b"},
            {"instruction": "a", "output": "b", "history": ["x"]},
            "history[0]: expected",
        ),
        ({"conversations": [{"from": "gpt", "value": "b"}]}, {"conversations": [{"value": "b"}]}, "[0].from: missing"),
        (
            {"conversations": [{"from": "gpt", "value": "b"}]},
            {"conversations": [{"from": "x", "value": ""}]},
            "[0].from: e",
        ),
        (
            {"conversations": [{"from": "gpt", "value": "b"}]},
            {"conversations": [{"from": "gpt", "value": 1}]},
            "[0].content",
        ),
        ({"conversations": [{"from": "gpt", "value": "b"}]}, {"conversations": 5}, "conversations: expected a list"),
    ],
)
def test_a_bad_row_of_the_other_shapes(tmp_path: Path, good: Any, row: Any, words: str) -> None:
    """The same holds for pairs, texts, alpaca and sharegpt rows."""
    found = faults(tmp_path, row, good)
    assert len(found) >= 1 and found[0].startswith("rows.jsonl:2: ") and any(words in text for text in found)


def test_columns_that_begin_in_a_later_row_are_reported_with_counts(tmp_path: Path) -> None:
    """The first row tells the shape; what is not used is told of all rows that were read, and images refuse a row that has some."""
    pair = {"prompt": "a", "completion": "b"}
    rows = RowReader(file_of(tmp_path, {**pair, "id": 1}, {**pair, "id": 2, "history": [["x", "y"]]}))
    assert len(list(rows)) == 2 and rows.notices()[0].endswith("; not used: id, history (1 of 2 rows)")
    rows = RowReader(file_of(tmp_path, {**pair, "images": []}, {**pair, "images": ["x.png"]}))
    good, bad = rows
    assert isinstance(good, Row) and str(bad).startswith("rows.jsonl:2: images: only text can be trained")


def test_a_column_for_the_system_message_is_used_in_every_shape(tmp_path: Path) -> None:
    """It stands before the messages, and in the plain form of a pair; another one that the messages begin with is an error."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    system = {"role": "system", "content": "S"}
    pair = one(tmp_path, {"prompt": "a", "completion": "b", "system": "S"})
    assert pair.messages == (system, *turns) and pair.prompt == "S\n\na"
    for row in ({"messages": turns}, {"messages": [system, *turns]}, {"prompt": turns[:1], "completion": turns[1:]}):
        found = one(tmp_path, {**row, "system": "S"})
        assert found.messages == (system, *turns) and found.weights[-1] == 1.0
    assert one(tmp_path, {"messages": turns, "system": ""}).messages == tuple(turns)
    chosen = {"chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": "c"}], "system": "S"}
    row = one(tmp_path, chosen, format="preference")
    assert row.messages[0] == system and row.rejected is not None and row.rejected.messages[0] == system
    other = RowReader(file_of(tmp_path, {"messages": [{"role": "system", "content": "T"}, *turns], "system": "S"}))
    assert [str(bad) for bad in other] == [
        "rows.jsonl:1: system: the messages begin with another system message; keep one of the two"
    ]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "a.jsonl",
            '[{"prompt": "a"}]',
            "the first row cannot be read: .*; the file is one JSON array: rename it to a.json",
        ),
        (
            "a.jsonl",
            '{"prompt": NaN}',
            r"not valid JSON: NaN is not a JSON value \(column 12\); write null, or leave the key out",
        ),
        ("a.jsonl", '{"a": 1, "a": 2}', "a.jsonl:1: duplicate key 'a'"),
        ("a.jsonl", "text", "not valid JSON: .*; expected one JSON object per line"),
        ("a.jsonl", '{"my question": "a", "my answer": "b"}', "--columns 'prompt=my question,completion=my answer'"),
    ],
)
def test_the_remedy_of_an_unreadable_file_fits_it(tmp_path: Path, name: str, text: str, says: str) -> None:
    """The sentence ends with what to do about this file."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=f"{says}$"):
        RowReader(tmp_path / name)


def test_a_missing_column_is_named_in_the_example_of_its_remedy(tmp_path: Path) -> None:
    """The example maps the columns that the format needs and the file lacks."""
    with pytest.raises(DataError, match=r"--columns chosen=BETTER,rejected=WORSE$"):
        RowReader(file_of(tmp_path, {"prompt": "a", "completion": "b"}), format="preference")


def test_faults_are_told_under_the_file_s_own_names(tmp_path: Path) -> None:
    """With a column map, the key in the message is the one that stands in the file."""
    rows = RowReader(
        file_of(tmp_path, {"q": "a", "a": "b"}, {"q": "a", "a": 5}), columns={"prompt": "q", "completion": "a"}
    )
    assert [str(found) for found in rows][1] == "rows.jsonl:2: a: expected text, found the number 5"


def test_a_file_without_a_readable_row(tmp_path: Path) -> None:
    """Where no row can be read, the first reason is told."""
    path = tmp_path / "rows.jsonl"
    path.write_text("this\nis text\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"none of the first 2 rows can be read: rows\.jsonl:1: not valid"):
        RowReader(path)
    path.write_text("\n\n", encoding="utf-8")
    with pytest.raises(DataError, match="the file has no rows"):
        RowReader(path)


# --- mutated rows -----------------------------------------------------------------------------------------------------

GOOD = (
    {"messages": [{"role": "system", "content": "s"}, *CHAT["messages"]], "tools": [TOOL]},
    {"prompt": "ask", "completion": "answer"},
    {"text": "some text \u4e2d"},
    {"instruction": "add", "input": "1", "output": "2", "history": [["a", "b"]]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
)
STRANGE = (
    *(
        None,
        True,
        0,
        -1,
        1e308,
        2**70,
        "",
        " ",
        "\0",
        "x" * 50,
        "<|im_end|>",
        "\ufdd0",
        "\ufdd4",
        "\u202e",
        [],
        {},
        [[]],
    ),
    *([None], [1, 2], {"role": 5}, [{}], {"a": {"b": []}}, [{"role": "user"}], "[", "{}", "[1]", ["a", ["b", ["c"]]]),
)


def mutated(rng: random.Random, row: Any) -> tuple[Any, str]:
    """A copy with one value replaced, removed or renamed somewhere, and the column in which that was."""
    copy = json.loads(json.dumps(row))
    column = rng.choice(list(copy))
    holder, key = copy, column
    while isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.75:
        holder = holder[key]
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    how = rng.random()
    if how < 0.7:
        holder[key] = rng.choice(STRANGE)
    elif how < 0.85 or isinstance(holder, list):
        del holder[key]
    else:
        holder[rng.choice([key + "s", key[:-1], key.upper(), "\0", ""])] = holder.pop(key)
    return copy, column


def spoiled(rng: random.Random, line: bytes) -> bytes:
    """A line with some bytes changed, put in, taken out or cut off; line ends stay where they are."""
    data = bytearray(line)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        how = rng.randrange(4)
        if how == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif how == 1:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 6)))
        elif how == 2:
            del data[at : at + rng.randint(1, 8)]
        else:
            data[at:] = data[at:][: rng.randint(0, 40)]
    return bytes(data).replace(b"\n", b" ").replace(b"\r", b" ")


@pytest.mark.parametrize("kind", range(len(GOOD)), ids=lambda k: next(iter(GOOD[k])))
def test_mutated_rows_never_crash_and_are_told_by_place_and_key(tmp_path: Path, kind: int) -> None:
    """2,000 mutated rows of each shape: rendered, or refused with file, line and the key that was changed."""
    rng = random.Random(kind)
    lines, columns = [json.dumps(GOOD[kind]).encode()], [""]
    for _ in range(1000):
        row, column = mutated(rng, GOOD[kind])
        lines.append(json.dumps(row).encode())
        columns.append(column)
    for _ in range(1000):
        lines.append(spoiled(rng, json.dumps(GOOD[kind]).encode()))
        columns.append("")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    renderer = Renderer(tokenizer_of("smollm"))
    refused: dict[int, list[BadRow]] = {}
    for _, found in renderer.render_many(RowReader(path)):
        if isinstance(found, BadRow):
            name, _, line = found.source.partition(":")
            assert name == "rows.jsonl" and found.reason
            refused.setdefault(int(line), []).append(found)
        else:
            assert all(len(piece.ids) == len(piece.weights) > 0 for piece in found)
    assert 1 not in refused and len(refused) > 600
    for line, bad in refused.items():
        if 1 < line <= 1001:
            keys = {one.key.partition("[")[0].partition(".")[0] for one in bad}
            assert columns[line - 1] in keys, (lines[line - 1], bad)
