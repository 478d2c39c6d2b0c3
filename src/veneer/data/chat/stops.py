"""Stop tokens: the tokens after which the generation of an answer ends.

They are the tokens that training taught as ends of turns, and the base's own. An adapter's receipt records the taught ones
(``Rendered.stops``); for an adapter without that record, and for a base alone, the chat template's end of a turn stands in.
Templates often end turns with another token than the tokenizer's end-of-text token, and a program that waits for the latter
generates past the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from veneer.data.chat.render import Renderer

__all__ = ["other_ends", "stop_ids", "taught_stops"]


def stop_ids(
    renderer: Renderer, own: Sequence[int] = (), recorded: Iterable[Mapping[str, int]] = ()
) -> tuple[int, ...]:
    """The ids of all tokens that end an answer: first those of the adapters, then the base's own.

    Args:
        renderer: a renderer with the tokenizer and the chat template in use.
        own: the base's end tokens, from its generation config.
        recorded: for each adapter that acts, the stop tokens in its receipt ({text: id}); empty where it has no record.
    """
    records = [
        [token for text, token in record.items() if _same(renderer.tokenizer, text, token)] for record in recorded
    ]
    found = [token for record in records for token in record]
    if not records or not all(records):
        found += renderer.stops
    return tuple(dict.fromkeys([*found, *_own(renderer.tokenizer, own)]))


def taught_stops(renderer: Renderer, counts: Mapping[int, int]) -> dict[str, int]:
    """The stop tokens for a receipt, {text: id}, the most frequent first.

    Args:
        renderer: the renderer of the rows.
        counts: the number of turns by the token that ends them; where it is empty, the template's end of a turn is taken.
    """
    ids = sorted(counts, key=lambda token: -counts[token]) or renderer.stops
    return {str(renderer.tokenizer.convert_ids_to_tokens(token)): token for token in ids}


def other_ends(tokenizer: Any, taught: Mapping[str, int], own: Sequence[int]) -> str | None:
    """A sentence about turns that end with tokens at which the base does not stop by itself; None if there are none."""
    ends = _own(tokenizer, own)
    other = {text: token for text, token in taught.items() if token not in ends}
    if not other:
        return None
    base = ", ".join(str(tokenizer.convert_ids_to_tokens(token)) for token in ends) or "none"
    return (
        f"turns end with {' or '.join(f'{text} (token {token})' for text, token in other.items())}, which is not an end token of the base "
        f"({base}); generate and chat stop at it, and merge and export pass it on"
    )


def _own(tokenizer: Any, own: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(token for token in (tokenizer.eos_token_id, *own) if token is not None))


def _same(tokenizer: Any, text: str, token: int) -> bool:
    """The token still means what it meant where the adapter was trained."""
    return bool(0 <= token < len(tokenizer) and tokenizer.convert_ids_to_tokens(token) == text)
