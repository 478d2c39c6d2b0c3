"""Conversion of preference rows: a prompt with a chosen and a rejected answer, or with one answer and its label.

    prompt, chosen, rejected     texts, or lists of messages
    chosen, rejected             the prompt is what both begin with: messages, or the words of two texts
    prompt as a text, and conversations that begin with it
    prompt, completion, label    texts, or lists of messages; label is true for an answer to learn, false for one to avoid

These are the forms that TRL reads. Two texts without a prompt stay plain text; their prompt ends before the first word that differs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from veneer.data.rows.columns import CONVERTERS, ColumnValues, with_system
from veneer.data.rows.json_rows import describe
from veneer.data.rows.messages import Message, checked_messages
from veneer.data.rows.row import Row

__all__ = ["preference", "unpaired"]

_ANSWERS = ("chosen", "rejected")
_LABELS = {"true": True, "1": True, "false": False, "0": False}
_SAME = "expected another answer than chosen, found the same"


def preference(source: str, values: ColumnValues) -> Row | None:
    """The row of the chosen answer, which holds that of the rejected one; None, with errors added, if there is none."""
    answers = [values.columns.get(key) for key in _ANSWERS]
    prompt = values.columns.get("prompt")
    if isinstance(answers[0], list) and isinstance(answers[1], list):
        rows = _conversations(source, values, prompt)
    elif "prompt" in values.columns:
        rows = [_with_prompt(source, values, key) for key in _ANSWERS]
    else:
        rows = _texts(source, values)
    found = [row for row in rows if row is not None]
    if values.errors or len(found) != 2:
        return None
    chosen, rejected = found
    if (chosen.messages, chosen.prompt, chosen.completion) == (rejected.messages, rejected.prompt, rejected.completion):
        values.errors.add("rejected", _SAME)
        return None
    return replace(chosen, rejected=rejected)


def unpaired(source: str, values: ColumnValues) -> Row | None:
    """The row of an answer, with its label; None, with errors added, if there is none."""
    label = values.columns.get("label")
    word = str(label).strip().lower() if isinstance(label, (bool, int, str)) else ""
    if word not in _LABELS:
        values.errors.add("label", f"expected true or false, found {describe(label)}")
    row = CONVERTERS["prompt"](source, values)
    return None if row is None or values.errors else replace(row, desirable=_LABELS[word])


def _with_prompt(source: str, values: ColumnValues, answer: str) -> Row | None:
    """The row of one answer after the prompt of its own column."""
    columns = {key: value for key, value in values.columns.items() if key not in _ANSWERS}
    given = ColumnValues(
        {**columns, "completion": values.columns[answer]}, values.errors.renamed(completion=answer), values.tags
    )
    return CONVERTERS["prompt"](source, given)


def _conversations(source: str, values: ColumnValues, prompt: Any) -> list[Row | None]:
    """The rows of two conversations, which may begin with the prompt."""
    errors, tools = values.errors, values.tools()
    (chosen, of_chosen), (rejected, of_rejected) = (
        checked_messages(key, values.columns[key], errors) for key in _ANSWERS
    )
    if errors:
        return []
    if chosen == rejected:
        errors.add("rejected", _SAME)
        return []
    before: list[Message] = []
    if isinstance(prompt, list):
        before = checked_messages("prompt", prompt, errors)[0]
    elif prompt is not None and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        text = values.text("prompt")
        before = [{"role": "user", "content": text}]
    if errors:
        return []
    shared = _shared(chosen, rejected)
    if before and chosen[: len(before)] == rejected[: len(before)] == before:
        shared = len(before)
    elif before:
        shared = 0
    rows: list[Row | None] = []
    for key, messages, weights in ((_ANSWERS[0], chosen, of_chosen), (_ANSWERS[1], rejected, of_rejected)):
        problem = _problem(messages, shared, before, prompt)
        if problem:
            errors.add(key, problem)
        whole = before + messages if before and not shared else messages
        start = len(whole) - len(messages) + shared
        weighted = [*[0.0] * start, *weights[shared:]]
        whole, weighted = with_system(whole, weighted, values)
        rows.append(Row("chat", source, tuple(whole), tuple(weighted), tools, key=errors.name(key)))
    return rows


def _problem(messages: list[Message], shared: int, before: list[Message], prompt: Any) -> str:
    """The reason why a conversation is not an answer to the prompt; "" if it is one."""
    if not before and not shared:
        return "expected to begin with the messages of the other answer, found none in common; give a column prompt"
    if (
        isinstance(prompt, str)
        and not before
        and prompt.strip() not in [_text(message) for message in messages[:shared]]
    ):
        return "the prompt is not among the messages that chosen and rejected begin with"
    if len(messages) == shared:
        return "expected an answer after the messages that chosen and rejected share, found none"
    first, last = messages[shared], messages[-1]
    if before and first["role"] != "assistant":
        return (
            f"expected to begin with the prompt, or with the assistant's answer to it, found the role {first['role']}"
        )
    return (
        ""
        if last["role"] == "assistant"
        else f"expected to end with the assistant's answer, found the role {last['role']}"
    )


def _text(message: Message) -> str:
    return str(message.get("content") or "").strip()


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    """The number of messages that two conversations begin with in common."""
    for k, (a, b) in enumerate(zip(chosen, rejected, strict=False)):
        if a != b:
            return k
    return min(len(chosen), len(rejected))


def _texts(source: str, values: ColumnValues) -> list[Row | None]:
    """The rows of two plain texts, whose prompt is their common beginning up to the first word that differs."""
    chosen, rejected = (values.columns[key] for key in _ANSWERS)
    if isinstance(chosen, list) != isinstance(rejected, list) and chosen and rejected:
        values.errors.add("rejected", f"expected {describe(chosen)} as in chosen, found {describe(rejected)}")
        return []
    chosen, rejected = (values.text(key) for key in _ANSWERS)
    if chosen is None or rejected is None:
        return []
    end = next(
        (k for k, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    while end and not chosen[end - 1].isspace():
        end -= 1
    prompt = chosen[:end].rstrip()
    if chosen == rejected:
        values.errors.add("rejected", _SAME)
    elif not prompt:
        values.errors.add(
            "chosen", "expected to begin with the words of rejected, found none in common; give a column prompt"
        )
    end = len(prompt)
    return [
        Row("pair", source, prompt=prompt, completion=text[end:], key=values.errors.name(key))
        for key, text in zip(_ANSWERS, (chosen, rejected), strict=True)
    ]
