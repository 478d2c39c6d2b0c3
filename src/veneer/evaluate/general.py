"""A general text that shows forgetting: the running interpreter's own reference documentation.

It is English prose and code, is available on every machine without a download, and is rarely the target of fine-tuning. The text is cut
into pieces of a fixed number of tokens, and each is evaluated by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.data.example import Example
from veneer.errors import DataError


def general_text() -> str:
    """Python's language reference by topic, as ``help()`` shows it."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def pieces(text: str, tokenizer: Any, *, length: int = 256, count: int = 64) -> list[Example]:
    """``count`` pieces of ``length`` tokens, spread evenly over a text, every token after a piece's first weighted 1.

    Raises DataError for a text shorter than two tokens.
    """
    ids: Sequence[int] = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise DataError("the general text is shorter than two tokens; give a longer one")
    starts = range(0, max(1, len(ids) - length + 1), length)
    count = min(count, len(starts))
    found = [tuple(ids[at : at + length]) for at in (starts[i * len(starts) // count] for i in range(count))]
    return [
        Example(piece, (0.0, *[1.0] * (len(piece) - 1)), f"general text:{number + 1}")
        for number, piece in enumerate(found)
        if len(piece) > 1
    ]
