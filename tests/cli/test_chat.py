"""``veneer chat``: commands, answers that are empty, and commands of other programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from veneer.cli.chat import Chat
from veneer.errors import DataError
from veneer.evaluate.generation import Sampling


class Parrot:
    """Answers with the last message, nothing for "silence", and an error for "fail"."""

    def stream(self, messages: list[dict[str, Any]], *_: object) -> Iterator[str]:
        self.roles = [message["role"] for message in messages]
        said = messages[-1]["content"]
        if said == "fail":
            raise DataError("no such words")
        yield from said.split() if said != "silence" else ()


@pytest.fixture
def chat() -> Chat:
    return Chat(Parrot(), ["a"], Sampling(), None)  # type: ignore[arg-type]


def test_roles_take_turns(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty answer is told and kept; a message that failed is not."""
    for line in ("hello", "silence", "fail", "hello"):
        chat.take(line)
    assert (
        capsys.readouterr().out
        == "hello\n(the answer is empty)\nno such words; /reset starts a new conversation\nhello\n"
    )
    assert chat.generator.roles == ["user", "assistant", "user", "assistant", "user"]  # type: ignore[attr-defined]
    assert [message["content"] for message in chat.messages] == ["hello", "hello", "silence", "", "hello", "hello"]


@pytest.mark.parametrize(
    ("line", "says", "open_after"),
    [
        ("exit", "commands begin with a slash: /exit", True),
        ("Q", "commands begin with a slash: /exit", True),
        ("clear", "commands begin with a slash: /reset", True),
        ("/bye", "", False),
        ("/clear", "started a new conversation", True),
        ("/adaptor a", "unknown command /adaptor", True),
        ("/adapter b", "b is not loaded; available: a, base", True),
        ("/adapter base", "switched to the base", True),
        ("/save", "/save needs a file name", True),
    ],
)
def test_commands(chat: Chat, capsys: pytest.CaptureFixture[str], line: str, says: str, open_after: bool) -> None:
    """No command, nor one of another program, is taken for a message."""
    chat.take(line)
    assert says in capsys.readouterr().out and chat.open == open_after and chat.messages == []
