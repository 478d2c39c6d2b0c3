"""The three forms of a row: as read from its file (``Record``), refused (``BadRow``), and interpreted (``Row``).

``readers.py`` makes records of files, ``shapes.py`` makes rows of records, ``chat/render.py`` makes token ids of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["BadRow", "Record", "Row", "RowKind"]

RowKind = Literal["chat", "pair", "text", "labelled"]


@dataclass(frozen=True, slots=True)
class Record:
    """One row as its file holds it, with its source ("rows.jsonl:17")."""

    source: str
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used: its source, the key at fault ("" for the whole row), and the reason."""

    source: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.key + ': ' if self.key else ''}{self.reason}"


@dataclass(frozen=True, slots=True)
class Row:
    """One interpreted and checked row.

    Attributes:
        kind: "chat" (has ``messages``), "pair" (has ``prompt`` and ``completion``, and ``messages`` as their chat form)
            "text", or "labelled" (has ``text``, and perhaps ``second`` and ``label``).
        source: "file:line", for messages to the user.
        messages: dicts with role, content and so on, as a chat template takes them; without ``weight``.
        weights: 1.0 or 0.0 per message, as the row requests; only those of assistant messages count.
        tools: JSON schemas of functions, or None.
        prompt, completion: the plain form of a pair.
        text: the text of a text row, or the first text of a labelled row.
        second: the second text of a labelled row; "" if it has one text.
        words: the words of a row with a label for each.
        label: the label of a labelled row as the file has it; None if it has none.
        desirable: in data of single answers, whether this one is to be learnt or avoided; None elsewhere.
        key: the column of the file that errors of this row name.
        rejected: in preference data, the row with the rejected answer; this row has the chosen one.
    """

    kind: RowKind
    source: str
    messages: tuple[dict[str, Any], ...] = ()
    weights: tuple[float, ...] = ()
    tools: list[dict[str, Any]] | None = None
    prompt: str = ""
    completion: str = ""
    text: str = ""
    key: str = ""
    rejected: Row | None = None
    second: str = ""
    words: tuple[str, ...] = ()
    label: Any = None
    desirable: bool | None = None

    @staticmethod
    def chat(source: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> Row:
        """Make a conversation in which all assistant messages are trained."""
        return Row("chat", source, tuple(messages), (1.0,) * len(messages), tools)
