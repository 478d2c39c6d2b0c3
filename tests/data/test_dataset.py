"""Files to examples, hashes, checks, previews: what training takes and what people are told."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.families import tokenizer_of

from veneer.data import dataset
from veneer.data.chat.render import Renderer, RenderOptions
from veneer.data.chat.rendered import NOTES
from veneer.data.check import FINDINGS, CheckReport, check_files, report_lines
from veneer.data.dataset import Examples, Subset, load_examples
from veneer.data.example import Example
from veneer.data.hashing import data_hash, template_hash
from veneer.data.preview import html_page, id_lines, plain_text, rich_text, shown_tokens, summary
from veneer.data.rows.row import Row
from veneer.errors import ConfigError, DataError


def chat(*said: str, **last: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(said)
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    messages[-1].update(last)
    return {"messages": messages}


def file_of(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def renderer_of(name: str = "chatml", **options: Any) -> Renderer:
    return Renderer(tokenizer_of(name), RenderOptions(**options))


# --- examples ---------------------------------------------------------------------------------------------------------


def test_examples_come_in_the_file_s_order(tmp_path: Path) -> None:
    """Rows of several files become examples in order, with their places, and a report that adds up."""
    one = file_of(tmp_path, chat("a", "b"), chat("c", "d", "e", "f"), name="one.jsonl")
    two = file_of(tmp_path, chat("g", "h"), name="two.jsonl")
    examples, report = load_examples([one, two], renderer_of())
    assert [example.source for example in examples] == ["one.jsonl:1", "one.jsonl:2", "two.jsonl:1"]
    assert (report.rows, report.examples, report.problems) == (3, 3, 0)
    assert report.tokens == examples.tokens == sum(examples.lengths) == sum(len(example) for example in examples)
    assert report.trained == sum(example.trained for example in examples)
    assert report.notices == [
        f"{name}: format messages (the rows have messages)" for name in ("one.jsonl", "two.jsonl")
    ]


def test_how_pairs_are_rendered_is_reported(tmp_path: Path) -> None:
    """Whether prompt and completion go through the chat template is told with what was recognised."""
    path = file_of(tmp_path, {"prompt": "a", "completion": "b"})
    for style, words in (("auto", "through the chat template"), ("plain", "as plain text")):
        _, report = load_examples([path], renderer_of(prompt_style=style))
        assert len(report.notices) == 2 and report.notices[1].endswith(words)


def test_all_bad_rows_are_told_at_once(tmp_path: Path) -> None:
    """Rows that cannot be read, that the template refuses, or that teach nothing: one error with every place."""
    rows = [
        chat("a", "b"),
        chat("a", "b", weight=0),
        chat("a"),
        {"messages": 5},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
    ]
    with pytest.raises(DataError) as caught:
        load_examples([file_of(tmp_path, *rows)], renderer_of())
    text = str(caught.value)
    assert text.startswith("4 problems in 5 rows:")
    assert "rows.jsonl:2: messages: nothing to learn: every message of the assistant has weight 0" in text
    assert "rows.jsonl:3: messages: nothing to learn: no message has the role assistant; the roles are user" in text
    assert "rows.jsonl:4: messages: expected a list of messages" in text and "the roles are system, user" in text
    examples, report = load_examples([file_of(tmp_path, *rows)], renderer_of(), skip_bad=True)
    assert len(examples) == 1 and report.problems == 4


def test_a_long_list_of_bad_rows_is_cut_and_counted(tmp_path: Path) -> None:
    """The error shows the first bad rows of a kind and counts all."""
    with pytest.raises(DataError, match="100 problems in 101 rows") as caught:
        load_examples([file_of(tmp_path, chat("a", "b"), *[{"messages": 5}] * 100)], renderer_of())
    assert str(caught.value).count("\n") == 3 and str(caught.value).endswith("(and 97 more rows like it)")
    unlike = [{"messages": [{"role": f"bot{i}", "content": "x"}]} for i in range(100)]
    with pytest.raises(DataError, match="100 problems in 100 rows") as caught:
        load_examples([file_of(tmp_path, *unlike)], renderer_of())
    assert str(caught.value).count("\n") == 21 and str(caught.value).endswith("and 80 more")


def test_rows_beyond_the_maximum_length(tmp_path: Path) -> None:
    """Too long a row is an error, or left out, or cut; the last two are counted with the trained tokens they cost."""
    path = file_of(tmp_path, chat("a", "b"), chat("a", "b " * 100))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: \d+ tokens, but the maximum length is 60"):
        load_examples([path], renderer_of(max_length=60))
    examples, report = load_examples([path], renderer_of(max_length=60), truncate="drop")
    assert len(examples) == 1 and report.dropped == 1 and report.lost > 100
    examples, report = load_examples([path], renderer_of(max_length=60), truncate="end")
    assert examples.lengths[1] == 60 and report.cut == 1
    assert report.lost + examples[1].trained == load_examples([path], renderer_of())[0][1].trained
    with pytest.raises(ConfigError, match="truncate: expected error, drop or end"):
        load_examples([path], renderer_of(), truncate="start")  # type: ignore[arg-type]


def test_a_row_whose_answer_lies_behind_the_cut_is_refused(tmp_path: Path) -> None:
    """Cut to its prompt, a row has nothing to learn and says so."""
    with pytest.raises(DataError, match="nothing to learn within 10 tokens"):
        load_examples([file_of(tmp_path, chat("a " * 50, "b"))], renderer_of(max_length=10), truncate="end")


def test_examples_larger_than_memory_go_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a bound the columns are spilled to a temporary file, and examples read the same."""
    monkeypatch.setattr(dataset, "_SPILL", 400)
    rng = np.random.default_rng(0)
    made = []
    for k in range(200):
        n = int(rng.integers(1, 30))
        weights = (0.0, *(float(w) for w in rng.integers(0, 2, n - 1)))
        made.append(Example(tuple(int(i) for i in rng.integers(0, 50_000, n)), weights, f"r:{k}"))
    examples = Examples()
    for k, example in enumerate(made):
        examples.append(example)
        assert examples[k] == example and examples[k // 2] == made[k // 2]
    assert list(examples) == made and examples[-1] == made[-1] and examples[3:6] == made[3:6]
    assert examples.lengths == [len(example) for example in made]
    with pytest.raises(IndexError):
        examples[200]


# --- hashes -----------------------------------------------------------------------------------------------------------


def test_selected_examples_are_those_of_the_whole(tmp_path: Path) -> None:
    """A part of the examples by their numbers: the same examples and lengths, one by one and in slices."""
    examples = Examples([Example((1,) * n, (0.0, *(1.0,) * (n - 1)), f"a:{n}") for n in range(1, 7)])
    part = Subset(examples, (4, 0, 5))
    assert [len(part), part.lengths] == [3, [5, 1, 6]]
    assert part[1] == examples[0] and part[-1] == examples[5] and part[1:] == [examples[0], examples[5]]
    with pytest.raises(IndexError):
        part[3]


def test_the_data_s_hash_is_of_what_is_learnt(tmp_path: Path) -> None:
    """The same rows in another container hash alike; another order, token or mask does not."""
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    as_table = tmp_path / "rows.csv"
    as_table.write_text("prompt,completion\na,b\nc,d\n", encoding="utf-8")

    def of(path: Path, **options: Any) -> str:
        return data_hash(load_examples([path], renderer_of(**options))[0])

    first = of(file_of(tmp_path, *rows))
    assert first == of(as_table) and len(first) == 64
    assert (
        len({first, of(file_of(tmp_path, *rows[::-1])), of(as_table, train_on="all"), of(file_of(tmp_path, rows[0]))})
        == 4
    )
    assert data_hash([]) == data_hash(iter([]))


def test_the_template_s_hash_is_of_tokenizer_and_template() -> None:
    """Another template or vocabulary is another hash; truncation and padding settings are not."""
    tokenizer = tokenizer_of("chatml")
    first = template_hash(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(7)
    assert template_hash(tokenizer) == first
    tokenizer.backend_tokenizer.no_truncation()
    assert len({first, template_hash(tokenizer, "{{ 1 }}"), template_hash(tokenizer_of("smollm"))}) == 3


# --- checks -----------------------------------------------------------------------------------------------------------


def check(folder: Path, *rows: Any, valid: Any = (), name: str = "chatml", **options: Any) -> CheckReport:
    held = [file_of(folder, *valid, name="valid.jsonl")] if valid else []
    return check_files([file_of(folder, *rows)], renderer_of(name, **options), valid=held)


def found(report: CheckReport) -> dict[str, list[str]]:
    return {name: [place.split(" ")[0] for place in finding.sources] for name, finding in report.findings.items()}


def test_a_clean_file_has_no_findings(tmp_path: Path) -> None:
    """Nothing is remarkable about rows that are as they should be."""
    report = check(tmp_path, chat("a", "b"), chat("c", "d", "e", "f"), valid=[chat("x", "y")])
    assert report.usable and report.findings == {} and not report.load.notes
    assert report_lines(report)[-1] == "All rows can be trained."


def test_rows_that_are_too_long_need_a_choice(tmp_path: Path) -> None:
    """Training refuses them by default, so the check does not promise that all can be trained."""
    report = check(tmp_path, chat("a", "b"), chat("c", "word " * 40), max_length=24)
    assert report.usable and report_lines(report)[-1] == (
        "All rows can be trained if long ones are cut (--truncate end) or left out (--truncate drop): 1."
    )


def test_the_check_finds_what_is_remarkable(tmp_path: Path) -> None:
    """Each kind of finding is told with its places."""
    report = check(
        tmp_path,
        chat("a", "b"),
        chat("a", "b"),
        chat("c", "long " * 60),
        chat("say <|im_end|>", "no"),
        chat("e\u202ef", "g"),
        valid=[chat("a", "b"), chat("c", "other"), chat("new", "row"), chat("new", "row")],
        max_length=60,
    )
    assert found(report) == {
        "duplicate": ["rows.jsonl:2"],
        "truncated": ["rows.jsonl:3"],
        "control": ["rows.jsonl:4"],
        "invisible": ["rows.jsonl:5"],
        "overlap": ["valid.jsonl:1"],
        "overlap_prompt": ["valid.jsonl:2"],
        "duplicate_valid": ["valid.jsonl:4"],
    }
    assert report.control_strings == {"<|im_end|>": 1} and report.load.lost > 0 and report.usable


def test_rows_beyond_what_is_remembered_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing takes memory for each row, so it ends at some number, and those behind it are counted."""
    monkeypatch.setattr("veneer.data.check._COMPARED", 2)
    report = check(tmp_path, *({"text": f"row {i % 4}"} for i in range(6)))
    assert report.findings["not_compared"].count == 2 and report.findings["duplicate"].count == 2


def test_the_check_finds_what_a_template_changes(tmp_path: Path) -> None:
    """Trimmed space, dropped reasoning and changed words are told apart."""
    assert found(check(tmp_path, chat("a", " b "), name="llama3")) == {"space_changed": ["rows.jsonl:1"]}
    thought = chat("a", "<think>hm</think>b")
    assert found(check(tmp_path, thought, name="deepseek")) == {"thinking_dropped": ["rows.jsonl:1"]}
    assert found(check(tmp_path, chat("a", "b", reasoning_content="hm"))) == {"thinking_dropped": ["rows.jsonl:1"]}
    assert found(check(tmp_path, thought, name="qwen3")) == {"space_changed": ["rows.jsonl:1"]}
    shout = tokenizer_of("chatml").chat_template.replace("m['content']", "m['content'] | upper")
    assert found(check(tmp_path, chat("A", "b"), chat_template=shout)) == {"words_changed": ["rows.jsonl:1"]}


def test_the_check_finds_missing_ends_and_doubled_begins(tmp_path: Path) -> None:
    """A template that ends no turn, and text that brings a second begin token."""
    endless = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    endless += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    assert found(check(tmp_path, chat("a", "b"), chat_template=endless)) == {"no_end": ["rows.jsonl:1"]}
    rows = [{"text": "<s><s>a"}, {"text": "<s>b"}]
    assert found(check(tmp_path, *rows, name="mistral", parse_specials=True)) == {"double_bos": ["rows.jsonl:1"]}


def test_unusable_rows_make_a_file_unusable(tmp_path: Path) -> None:
    """BadRow rows, rows with nothing to learn and rows cut to their prompt are unusable, each with its place."""
    report = check(tmp_path, chat("a", "b"), {"messages": 5}, chat("c"), chat("d " * 99, "e"), max_length=20)
    assert not report.usable and [bad.source for bad in report.load.bad] == [f"rows.jsonl:{n}" for n in (2, 3, 4)]
    assert report_lines(report)[-1] == "3 rows cannot be trained."


def test_the_report_is_json_and_text(tmp_path: Path) -> None:
    """Both forms hold the same counts, and every finding has words."""
    report = check(tmp_path, *[chat("a", "b")] * 30, chat("c", "d " * 200), {"messages": 5})
    as_json = json.loads(json.dumps(report.as_dict()))
    assert as_json["rows"] == 32 and as_json["examples"] == 31 and not as_json["usable"]
    assert as_json["findings"]["duplicate"]["rows"] == 29 and len(as_json["findings"]["duplicate"]["first"]) == 10
    assert sum(bucket["examples"] for bucket in as_json["lengths"]) == 31
    assert as_json["lengths"][0]["from"] <= min(report.lengths) <= as_json["lengths"][0]["to"]
    assert as_json["tokens"] == sum(report.lengths) and as_json["bad_rows"]["first"][0]["place"] == "rows.jsonl:32"
    text = "\n".join(report_lines(report))
    assert "32 rows, 31 examples" in text and FINDINGS["duplicate"] in text and "and 19 more" in text


def test_every_note_has_words(tmp_path: Path) -> None:
    """What the renderer remarks is told in the check's text."""
    rows = [chat("a", "b", "c", "\n\n\nd")]
    for name, notes in (("qwen3", {"split"}), ("deepseek", {"opening_differs"}), ("chatml", {"boundary_cut"})):
        report = check(tmp_path, *rows, name=name)
        assert notes <= set(report.load.notes) <= set(NOTES)
        assert all(NOTES[note] in "\n".join(report_lines(report)) for note in notes)


# --- previews ---------------------------------------------------------------------------------------------------------


def shown(*said: str, **options: Any) -> tuple[Any, list[Any]]:
    renderer = renderer_of(**options)
    (piece,) = renderer.render(Row.chat("rows.jsonl:1", chat(*said)["messages"]))
    return piece, shown_tokens(piece, renderer.encoder)


def test_the_text_view_marks_what_is_trained() -> None:
    """Without colour, trained stretches stand between brackets, control tokens are visible, nothing is lost."""
    piece, tokens = shown("one \u4e2d\U0001f44d", "two")
    expected = "<|im_start|>user\none \u4e2d\U0001f44d<|im_end|>\n<|im_start|>assistant\n[[two<|im_end|>]]\n"
    assert plain_text(tokens) == expected
    assert summary(piece) == f"rows.jsonl:1: trained {piece.trained} of {len(piece.ids)} tokens"
    assert rich_text(tokens).plain == expected.replace("[[", "").replace("]]", "")
    assert sum(token.control for token in tokens) == 4


def test_the_id_view_has_a_line_a_token() -> None:
    """Number, id, mark and characters of each token."""
    piece, tokens = shown("one", "two")
    lines = id_lines(tokens)
    assert len(lines) == len(piece.ids) and sum(" + " in line for line in lines) == piece.trained
    assert lines[0].split() == ["0", str(piece.ids[0]), "'<|im_start|>'"]


def test_characters_that_move_the_cursor_are_named() -> None:
    """Escapes, bells and reading-direction marks are shown by their numbers, not obeyed."""
    _, tokens = shown("a\x1b[31m\u202eb\x07", "two")
    text = plain_text(tokens)
    assert "\x1b" not in text and "\u202e" not in text and "\\u001b[31m\\u202eb\\u0007" in text


def test_a_cut_row_says_what_it_lost() -> None:
    """Truncation is part of the summary, and the text ends where the tokens end."""
    piece, tokens = shown("one", "two three four", max_length=20)
    assert len(tokens) == 20 and f"cut from {piece.length}, {piece.lost} trained tokens lost" in summary(piece)
    assert piece.text.startswith("".join(token.text for token in tokens))


def test_added_tokens_are_shown() -> None:
    """An end token that stands nowhere in a plain row's text is shown all the same."""
    renderer = renderer_of()
    (piece,) = renderer.render(Row("text", "rows.jsonl:1", text="one two"))
    text = plain_text(shown_tokens(piece, renderer.encoder))
    assert text.replace("[[", "") == "one two<|endoftext|>]]"


class Page(HTMLParser):
    """The tags of a page and the text of its rows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows = ""
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = self._inside or tag == "pre"
        assert not {"src", "href"} & {name for name, _ in attrs} and not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "pre"

    def handle_data(self, data: str) -> None:
        self.rows += data if self._inside else ""


def test_the_page_runs_nothing_and_shows_the_rows() -> None:
    """Text from rows is text in the page, and the page loads and runs nothing."""
    piece, tokens = shown("<script>alert(1)</script> & \"'", "<b>two</b>")
    page = html_page([(piece, tokens)], "<title>", ["a < b"])
    parsed = Page(page)
    assert set(parsed.tags) <= {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "pre", "span"}
    assert parsed.rows == piece.text.replace("\n", "\u21b5\n")
    assert parsed.tags.count("span") == len(tokens) + 3 and "default-src 'none'" in page
