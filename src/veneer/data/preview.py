"""What the model will see of a row, token by token, and which tokens are trained.

On a terminal trained tokens are green and the others grey, control tokens are set apart. Without colour (a pipe, NO_COLOR)
trained stretches stand between [[ and ]]. ``--ids`` shows one token a line. The HTML page is one file that loads nothing.

Boundary: this module draws; what is trained was decided, and proven, in ``render.py``.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from veneer.data.chat.render import Rendered
from veneer.data.encode import Encoder

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["Piece", "html_page", "id_lines", "pieces", "plain_text", "rich_text", "summary"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One token as it is shown: its id, its characters, its weight, and whether it is a control token."""

    id: int
    text: str
    weight: float
    control: bool


def pieces(rendered: Rendered, encoder: Encoder) -> list[Piece]:
    """The tokens of a rendered row; those that share one character show it once, with the last of them."""
    shown = []
    controls = encoder.control_ids
    ends = (*rendered.starts[1:], len(rendered.text) if rendered.length == len(rendered.ids) else rendered.ends[-1])
    for k, (token, weight) in enumerate(zip(rendered.ids, rendered.weights, strict=True)):
        start = rendered.starts[k]
        text = rendered.text[start : max(start, ends[k])]
        control = token in controls
        if rendered.starts[k] == rendered.ends[k] and control:  # added around the text, stands nowhere in it
            text = encoder.decode([token])
        shown.append(Piece(token, text, weight, control))
    return shown


def summary(rendered: Rendered) -> str:
    """One line: place, trained tokens, and what was cut."""
    line = f"{rendered.source}: trained {rendered.trained} of {len(rendered.ids)} tokens"
    if rendered.length > len(rendered.ids):
        line += f"; cut from {rendered.length}, {rendered.lost} trained tokens lost"
    return line


def plain_text(shown: Iterable[Piece]) -> str:
    """The text with trained stretches between [[ and ]]."""
    parts = []
    for trained, group in groupby(shown, key=lambda piece: piece.weight > 0.0):
        text = "".join(_visible(piece.text) for piece in group)
        parts.append(f"[[{text}]]" if trained else text)
    return "".join(parts)


def rich_text(shown: Iterable[Piece]) -> Text:
    """The text coloured by weight; trained line ends are visible."""
    from rich.text import Text

    text = Text()
    for piece in shown:
        trained = piece.weight > 0.0
        words = _visible(piece.text)
        if trained:
            words = words.replace("\n", "\u21b5\n")
        style = "bold green" if trained else "bright_black"
        if piece.control:
            style = "bold black on green" if trained else "cyan"
        text.append(words, style=style)
    return text


def id_lines(shown: Sequence[Piece]) -> list[str]:
    """One line a token: its number, its id, + where it is trained, its characters."""
    return [
        f"{number:>6} {piece.id:>8} {'+' if piece.weight > 0.0 else ' '} {piece.text!r}"
        for number, piece in enumerate(shown)
    ]


def html_page(rows: Sequence[tuple[Rendered, Sequence[Piece]]], title: str, stated: Sequence[str] = ()) -> str:
    """A page of rows that needs nothing beside itself; each token tells its number, id and weight when pointed at."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += [f"<p>{html.escape(line)}</p>" for line in stated]
    body.append(
        '<p><span class="y">trained</span> <span class="n">not trained</span> <span class="n c">control</span></p>'
    )
    for rendered, shown in rows:
        tokens = "".join(_html_token(k, piece) for k, piece in enumerate(shown))
        body.append(f"<h2>{html.escape(summary(rendered))}</h2>\n<pre>{tokens}</pre>")
    return _PAGE.replace("TITLE", html.escape(title)).replace("BODY", "\n".join(body))


def _html_token(number: int, piece: Piece) -> str:
    kind = ("y" if piece.weight > 0.0 else "n") + (" c" if piece.control else "")
    words = html.escape(_visible(piece.text)).replace("\n", "&#8629;\n")
    hint = f"token {number}, id {piece.id}, weight {piece.weight:g}"
    return f'<span class="{kind}" title="{hint}">{words}</span>'


def _visible(text: str) -> str:
    """Characters that would move the cursor or the reading direction, as their names; the rest as it is."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\u{ord(c):04x}" for c in text)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>TITLE</title><style>
:root { color-scheme: light dark; font-family: system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin-top: 2rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: 1rem; border: 1px solid #8886; border-radius: .5rem; }
.y { background: #35b36b55; border-radius: .15rem; } .n { opacity: .6; } .c { font-weight: 700; color: #2a7fd4; }
.y:hover, .n:hover { outline: 1px solid currentColor; }
</style></head><body>
BODY
</body></html>
"""
