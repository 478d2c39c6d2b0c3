"""What a row is on its way: as its file holds it, refused, or with its shape understood.

Boundary: ``readers.py`` makes records out of files, ``shapes.py`` rows out of records, ``render.py`` token ids out of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Bad", "Kind", "Record", "Row"]

Kind = Literal["chat", "pair", "text"]


@dataclass(frozen=True, slots=True)
class Record:
    """One row as its file holds it, and its place ("rows.jsonl:17")."""

    source: str
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bad:
    """A row that cannot be used: its place, the key where one is to blame, and the reason."""

    source: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.key + ': ' if self.key else ''}{self.reason}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row, checked.

    Attributes:
        kind: "chat" (``messages``), "pair" (``prompt`` and ``completion``, and ``messages`` as their chat form) or
            "text".
        source: "file:line", for messages.
        messages: role and content each, as a chat template takes them; without ``weight``.
        weights: per message 1.0 or 0.0, whether its author wants it trained; only an assistant's counts.
        tools: JSON schemas of functions, or None.
        prompt, completion: the plain form of a pair.
        text: the whole of a text row.
        key: the file's column that faults of the row are told under.
    """

    kind: Kind
    source: str
    messages: tuple[dict[str, Any], ...] = ()
    weights: tuple[float, ...] = ()
    tools: list[dict[str, Any]] | None = None
    prompt: str = ""
    completion: str = ""
    text: str = ""
    key: str = ""

    @staticmethod
    def chat(source: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> Row:
        """A conversation all of whose assistant turns are wanted."""
        return Row("chat", source, tuple(messages), (1.0,) * len(messages), tools)
