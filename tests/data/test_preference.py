"""Preference rows: the forms that TRL reads, what is compared, and one sentence for each bad row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny, tiny_tokenizer

from veneer.cli.main import main
from veneer.data.chat.render import Renderer, RenderOptions
from veneer.data.dataset import load_examples
from veneer.data.example import Example
from veneer.data.hashing import data_hash
from veneer.errors import DataError

ASK = {"role": "user", "content": "sky?"}
BLUE, GREEN = ({"role": "assistant", "content": text} for text in ("blue", "green"))


def file_of(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, limit: int = 200, **others: Any) -> list[Example]:
    renderer = Renderer(tiny_tokenizer(), RenderOptions(max_length=limit))
    return load_examples([path], renderer, format="preference", **others)[0][:]


def spans(example: Example) -> list[tuple[str, str]]:
    """(prompt, answer) of each sequence."""
    decode = tiny_tokenizer().decode
    found = []
    for one in example.sequences:
        n = one.weights.index(1.0)
        end = n + one.trained
        assert set(one.weights[n:end]) == {1.0}
        found.append((decode(one.ids[:n]), decode(one.ids[n:end])))
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "sky?", "chosen": "blue", "rejected": "green"},
        {"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": "sky?", "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": "sky?", "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
        {"prompt": [ASK], "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
        {"chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
    ],
)
def test_all_forms_of_a_row_give_the_same_pair(row: Any, tmp_path: Path) -> None:
    """Texts and messages, with the prompt apart or inside the answers: the chat template's prompt, and two answers."""
    (example,) = load(file_of(tmp_path, row))
    (prompt, chosen), (other, rejected) = spans(example)
    assert prompt == other and prompt.endswith("<|im_start|>assistant\n") and "user\nsky?" in prompt
    assert (chosen, rejected) == ("blue<|im_end|>", "green<|im_end|>") and len(example.lengths) == 2


def test_two_texts_share_a_prompt_of_whole_words(tmp_path: Path) -> None:
    """Plain texts stay plain. TRL's prompt would be "The sky is bl"; this one ends before the first word that differs."""
    row = {"chosen": "The sky is blue.", "rejected": "The sky is bloody red."}
    (example,) = load(file_of(tmp_path, row))
    assert spans(example) == [("The sky is", " blue.<|im_end|>"), ("The sky is", " bloody red.<|im_end|>")]


def test_an_implicit_conversation_is_cut_as_by_trl(tmp_path: Path) -> None:
    """Several turns in common: all of them are the prompt."""
    more = [ASK, BLUE, {"role": "user", "content": "sure?"}]
    row = {"chosen": [*more, BLUE], "rejected": [*more, GREEN]}
    (example,) = load(file_of(tmp_path, row))
    starts = [prompt.count("<|im_start|>") for prompt, _ in spans(example)]
    assert starts == [5, 5]  # the system prompt, three turns and the answer's opening
    assert [answer for _, answer in spans(example)] == ["blue<|im_end|>", "green<|im_end|>"]


def test_all_bad_rows_are_reported_at_once(tmp_path: Path) -> None:
    """One sentence each, with the line and the column at fault."""
    rows = {
        "rejected: expected another answer than chosen, found the same": {
            "prompt": "a",
            "chosen": "b",
            "rejected": "b",
        },
        "rejected: missing; the row has the columns prompt, chosen": {"prompt": "a", "chosen": "b"},
        "prompt: expected text, found an empty one": {"prompt": " ", "chosen": "b", "rejected": "c"},
        "chosen: expected text, found an empty one": {"prompt": "a", "chosen": "", "rejected": "c"},
        "rejected: expected text, found null": {"prompt": "a", "chosen": "b", "rejected": None},
        "chosen: the prompt is not among the messages that chosen and rejected begin with": {
            "prompt": "other",
            "chosen": [ASK, BLUE],
            "rejected": [ASK, GREEN],
        },
        "chosen: expected to begin with the prompt, or with the assistant's answer to it, found the role user": {
            "prompt": [{"role": "user", "content": "x"}],
            "chosen": [ASK, BLUE],
            "rejected": [ASK, GREEN],
        },
        "chosen: expected at least one message, found an empty list": {"prompt": "a", "chosen": [], "rejected": [BLUE]},
        "rejected: expected to end with the assistant's answer, found the role user": {
            "prompt": [ASK],
            "chosen": [BLUE],
            "rejected": [GREEN, ASK],
        },
    }
    with pytest.raises(DataError) as caught:
        load(file_of(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, *rows.values()))
    for number, reason in enumerate(rows, 2):
        assert f"rows.jsonl:{number}: {reason}" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "a b", "rejected": "c d"}, "chosen: expected to begin with the words of rejected"),
        ({"chosen": [BLUE], "rejected": [GREEN]}, "chosen: expected to begin with the messages of the other answer"),
        ({"chosen": "a b", "rejected": [ASK, BLUE]}, "rejected: expected the text 'a b' as in chosen"),
    ],
)
def test_rows_without_a_prompt_must_share_one(row: Any, reason: str, tmp_path: Path) -> None:
    """Nothing in common: there is no prompt to answer."""
    with pytest.raises(DataError, match=reason):
        load(file_of(tmp_path, row))


def test_answers_that_the_maximum_length_makes_equal_are_refused(tmp_path: Path) -> None:
    """What is cut off cannot be compared."""
    row = {"prompt": "a", "chosen": "the same words and more", "rejected": "the same words and less"}
    path = file_of(tmp_path, row)
    tokens = len(load(path)[0].sequences[0])
    with pytest.raises(DataError, match="the two answers are the same within"):
        load(path, tokens - 6, truncate="end")
    with pytest.raises(DataError, match="nothing to learn within 8 tokens"):
        load(path, 8, truncate="end")


def test_commands_show_both_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``data show`` marks the tokens of both; ``data check`` counts pairs; without ``--task`` the error names it."""
    tiny("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    path = file_of(tmp_path, {"prompt": "sky?", "chosen": "blue", "rejected": "green"})
    common = [str(path), "--base", str(tmp_path / "base")]
    assert main(["data", "show", *common, "--task", "dpo"]) == 0
    out = capsys.readouterr().out
    assert "rows.jsonl:1 chosen: trained" in out and "rows.jsonl:1 rejected: trained" in out
    assert "[[blue<|im_end|>]]" in out and "[[green<|im_end|>]]" in out
    assert main(["data", "check", *common, "--task", "dpo"]) == 0
    assert "1 row, 2 examples" in capsys.readouterr().out
    assert main(["data", "check", *common]) == 1
    assert "to train on preferences, pass --task dpo" in capsys.readouterr().err


def test_single_answers_have_a_label(tmp_path: Path) -> None:
    """Truth values, their words and 0 and 1; texts and messages; other labels are refused together with what else is wrong."""
    labels = [True, False, "false", "True", 0, 1]
    path = file_of(tmp_path, *({"prompt": "sky?", "completion": [BLUE], "label": label} for label in labels))
    renderer = Renderer(tiny_tokenizer(), RenderOptions())
    found = load_examples([path], renderer, format="unpaired")[0]
    assert [one.desirable for one in found] == [True, False, False, True, False, True]
    assert len({one.ids for one in found}) == 1 and data_hash(found[:2]) != data_hash([found[0], found[0]])
    rows = [{"prompt": "sky?", "completion": "", "label": "good"}, {"prompt": "a", "completion": "b", "label": 0.5}]
    with pytest.raises(DataError, match="3 problems in 2 rows") as caught:
        load_examples([file_of(tmp_path, *rows)], renderer, format="unpaired")
    assert "label: expected true or false, found" in str(caught.value)
    with pytest.raises(DataError, match="format unpaired needs the column label"):
        load_examples([file_of(tmp_path, {"prompt": "a", "completion": "b"})], renderer, format="unpaired")
