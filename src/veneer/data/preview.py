"""Views of a rendered row, token by token, with the trained tokens highlighted.

On a terminal trained tokens are green, the others grey, and control tokens have a background or another colour. Without
colour (a pipe, NO_COLOR) trained text is enclosed in [[ and ]]. ``--ids`` prints one token per line. The HTML page is one
file without external resources.
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

__all__ = ["ShownToken", "html_page", "id_lines", "plain_text", "rich_text", "shown_tokens", "summary"]


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token for display: its id, characters and weight, and True if it is a control token."""

    id: int
    text: str
    weight: float
    control: bool


def shown_tokens(rendered: Rendered, encoder: Encoder) -> list[ShownToken]:
    """The tokens of a rendered row. Tokens that share a character show it once, with the last of them."""
    shown = []
    controls = encoder.control_ids
    ends = (*rendered.starts[1:], len(rendered.text) if rendered.length == len(rendered.ids) else rendered.ends[-1])
    for k, (token, weight) in enumerate(zip(rendered.ids, rendered.weights, strict=True)):
        start = rendered.starts[k]
        text = rendered.text[start : max(start, ends[k])]
        control = token in controls
        if rendered.starts[k] == rendered.ends[k] and control:  # added before or after the text
            text = encoder.decode([token])
        shown.append(ShownToken(token, text, weight, control))
    return shown


def summary(rendered: Rendered) -> str:
    """One line: source, number of trained tokens, and what truncation cut off."""
    answer = f" {rendered.answer}" if rendered.answer else ""
    line = f"{rendered.source}{answer}: trained {rendered.trained} of {len(rendered.ids)} tokens"
    if rendered.length > len(rendered.ids):
        line += f"; cut from {rendered.length}, {rendered.lost} trained tokens lost"
    return line


def plain_text(shown: Iterable[ShownToken]) -> str:
    """The text, with trained text enclosed in [[ and ]]."""
    parts = []
    for trained, group in groupby(shown, key=lambda token: token.weight > 0.0):
        text = "".join(_visible(token.text) for token in group)
        parts.append(f"[[{text}]]" if trained else text)
    return "".join(parts)


def rich_text(shown: Iterable[ShownToken]) -> Text:
    """The text coloured by weight, with visible line ends in trained text."""
    from rich.text import Text

    text = Text()
    for token in shown:
        trained = token.weight > 0.0
        shown_text = _visible(token.text)
        if trained:
            shown_text = shown_text.replace("\n", "\u21b5\n")
        style = "bold green" if trained else "bright_black"
        if token.control:
            style = "bold black on green" if trained else "cyan"
        text.append(shown_text, style=style)
    return text


def id_lines(shown: Sequence[ShownToken]) -> list[str]:
    """One line per token: index, id, + if it is trained, characters."""
    return [
        f"{index:>6} {token.id:>8} {'+' if token.weight > 0.0 else ' '} {token.text!r}"
        for index, token in enumerate(shown)
    ]


def html_page(rows: Sequence[tuple[Rendered, Sequence[ShownToken]]], title: str, notices: Sequence[str] = ()) -> str:
    """A self-contained page of rows; each token shows its index, id and weight as a tooltip."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += [f"<p>{html.escape(line)}</p>" for line in notices]
    body.append(
        '<p><span class="y">trained</span> <span class="n">not trained</span> <span class="n c">control</span></p>'
    )
    for rendered, shown in rows:
        tokens = "".join(_html_token(k, token) for k, token in enumerate(shown))
        body.append(f"<h2>{html.escape(summary(rendered))}</h2>\n<pre>{tokens}</pre>")
    return _PAGE.replace("TITLE", html.escape(title)).replace("BODY", "\n".join(body))


def _html_token(index: int, token: ShownToken) -> str:
    kind = ("y" if token.weight > 0.0 else "n") + (" c" if token.control else "")
    text = html.escape(_visible(token.text)).replace("\n", "&#8629;\n")
    hint = f"token {index}, id {token.id}, weight {token.weight:g}"
    return f'<span class="{kind}" title="{hint}">{text}</span>'


def _visible(text: str) -> str:
    """Replace characters that would move the cursor or change the reading direction by their code points."""
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
