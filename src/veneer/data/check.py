"""``veneer data check``: everything that is wrong or remarkable about files of rows, before a run is paid for.

Unusable (exit code 1): rows that cannot be read or understood, that the template refuses, that have nothing to learn or
lose all of it to the maximum length. Remarkable (told, with places): rows that occur twice, rows cut and the trained
tokens that costs, two begin tokens, no end token, what the template changed in the assistant's words, control strings and
invisible characters in the text, rows that are held out and trained on.

Boundary: a report is data; ``check_text.py`` writes it out.
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.data.chat.render import Rendered, Renderer
from veneer.data.dataset import LoadReport, pieces_of
from veneer.data.rows.row import Bad, Row
from veneer.data.rows.shapes import Rows

__all__ = ["CheckReport", "Finding", "Remarks", "check_files"]

_PLACES = 10
_COMPARED = 5_000_000  # rows of which the text is remembered, about 200 bytes each
_INVISIBLE = re.compile("[\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\ufffd\u0080-\u009f]")
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


@dataclass(slots=True)
class Finding:
    """How many rows something is true of, and the places of the first ones."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.places) < _PLACES:
            self.places.append(place)


@dataclass(slots=True)
class CheckReport:
    """What a check found.

    Attributes:
        load: rows, bad rows, notes and what was recognised, as in training.
        max_length: the length that truncation was judged by, None for no bound.
        lengths: tokens of each piece before truncation.
        findings: by name (see ``check_text.FINDINGS``).
        control_strings: which were typed, and in how many rows.
    """

    load: LoadReport = field(default_factory=LoadReport)
    max_length: int | None = None
    lengths: array[int] = field(default_factory=lambda: array("l"))
    findings: dict[str, Finding] = field(default_factory=dict)
    control_strings: Counter[str] = field(default_factory=Counter)

    @property
    def usable(self) -> bool:
        """Whether every row can be trained."""
        return self.load.bad_count == 0

    def note(self, name: str, place: str) -> None:
        """Count a row under a finding."""
        self.findings.setdefault(name, Finding()).add(place)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        load = self.load
        return {
            "usable": self.usable,
            "stated": load.stated,
            "rows": load.rows,
            "examples": len(self.lengths),
            "tokens": sum(self.lengths),
            "trained_tokens": load.trained,
            "bad_rows": {
                "count": load.bad_count,
                "first": [{"place": bad.source, "key": bad.key, "reason": bad.reason} for bad in load.bad],
            },
            "max_length": self.max_length,
            "truncated_rows": load.cut,
            "lost_trained_tokens": load.lost,
            "lengths": [{"from": a, "to": b, "examples": n} for a, b, n in self.histogram()],
            "findings": {name: {"rows": f.count, "first": f.places} for name, f in self.findings.items()},
            "notes": dict(load.notes),
            "control_strings": dict(self.control_strings.most_common()),
        }

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, to, examples) with bounds at powers of two, from the shortest to the longest."""
        counts = Counter(max(0, length - 1).bit_length() for length in self.lengths)
        if not counts:
            return []
        return [((1 << k - 1) + 1 if k else 1, 1 << k, counts[k]) for k in range(min(counts), max(counts) + 1)]


def check_files(
    files: Sequence[str | os.PathLike[str]],
    renderer: Renderer,
    *,
    valid: Sequence[str | os.PathLike[str]] = (),
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
) -> CheckReport:
    """Check files of rows, and that none of the held-out rows in ``valid`` is among them.

    Raises:
        DataError: a file as a whole cannot be read; what is wrong with rows is in the report instead.
    """
    report = CheckReport(max_length=renderer.options.max_length)
    remarks = Remarks(report, renderer)
    for held_out, paths in ((False, files), (True, valid)):
        for path in paths:
            rows = Rows(path, format=format, columns=columns, roles=roles)
            for result in renderer.render_many(rows):
                report.load.rows += 1
                pieces = pieces_of(result, report.load)
                if pieces and result[0] is not None:
                    _lengths(report, pieces, result[0])
                    remarks.see(result[0], pieces, held_out=held_out)
            report.load.stated += [*rows.stated(), *renderer.stated(rows.shape.format)]
    report.load.examples, report.load.tokens = len(report.lengths), sum(report.lengths)
    return report


def _lengths(report: CheckReport, pieces: list[Rendered], row: Row) -> None:
    """Count a row's tokens, and what the maximum length costs it."""
    load = report.load
    report.lengths.extend(piece.length for piece in pieces)
    load.trained += sum(piece.trained for piece in pieces)
    lost = sum(piece.lost for piece in pieces)
    if any(piece.length > len(piece.ids) for piece in pieces):
        load.cut += 1
        load.lost += lost
        report.note("truncated", f"{row.source} ({max(piece.length for piece in pieces)} tokens, {lost} trained lost)")
    if not any(piece.trained for piece in pieces):
        reason = f"nothing to learn within {report.max_length} tokens: the answer lies behind them"
        load.refuse(Bad(row.source, row.key, reason))


class Remarks:
    """Looks at one usable row after another, notes what is remarkable, and remembers what is needed to compare them."""

    def __init__(self, report: CheckReport, renderer: Renderer) -> None:
        self.report = report
        self.bos = getattr(renderer.tokenizer, "bos_token_id", None)
        self.eos = getattr(renderer.tokenizer, "eos_token_id", None)
        self.seen: dict[bytes, str] = {}
        self.prompts: set[bytes] = set()
        self.held: set[bytes] = set()

    def see(self, row: Row, pieces: list[Rendered], *, held_out: bool = False) -> None:
        """Take in a row and its pieces. Those that are held out come behind those that are trained."""
        self._same(pieces, row, held_out=held_out)
        self._tokens(pieces, row)
        self._words(pieces, row)

    def _same(self, pieces: list[Rendered], row: Row, *, held_out: bool) -> None:
        whole = _digest(*(piece.text for piece in pieces))
        first = pieces[0]
        begin = next((first.starts[i] for i, w in enumerate(first.weights) if w > 0.0), len(first.text))
        prompt = _digest(first.text[:begin]) if begin and row.kind != "text" else None
        if not held_out:
            earlier = self.seen.get(whole)
            if earlier is not None:
                self.report.note("duplicate", f"{row.source} (same as {earlier})")
            elif len(self.seen) >= _COMPARED:
                self.report.note("not_compared", row.source)
            else:
                self.seen[whole] = row.source
                if prompt is not None:
                    self.prompts.add(prompt)
        elif whole in self.seen:
            self.report.note("overlap", f"{row.source} (same as {self.seen[whole]})")
        elif prompt is not None and prompt in self.prompts:
            self.report.note("overlap_prompt", row.source)
        elif whole in self.held:
            self.report.note("duplicate_valid", row.source)
        if held_out:
            self.held.add(whole)

    def _tokens(self, pieces: list[Rendered], row: Row) -> None:
        for piece in pieces:
            if self.bos is not None and piece.ids[:2] == (self.bos, self.bos):
                self.report.note("double_bos", row.source)
                break
        for piece in pieces:
            unended = "no_end_token" in piece.notes
            if unended and piece.length == len(piece.ids):
                self.report.note("no_end", row.source)
                break

    def _words(self, pieces: list[Rendered], row: Row) -> None:
        typed = {text for piece in pieces for text in piece.typed}
        if typed:
            self.report.control_strings.update(typed)
            self.report.note("control", f"{row.source} ({', '.join(sorted(typed)[:3])})")
        if any(_INVISIBLE.search(piece.text) for piece in pieces if not piece.text.isascii()):
            self.report.note("invisible", row.source)
        changes = {
            change
            for piece in pieces
            for message, a, b in piece.turns
            if (change := _changed(row.messages[message], piece.text[a:b]))
        }
        for change in sorted(changes):
            self.report.note(change, row.source)


def _changed(message: Mapping[str, Any], turn: str) -> str:
    """What the template made of an assistant's words: "" if they stand there as they are."""
    content = message.get("content") or ""
    thought = message.get("reasoning_content") or message.get("thinking") or message.get("reasoning") or ""
    if content in turn and (not thought or thought.strip() in turn):
        return ""
    if thought and _bare(thought) not in _bare(turn):
        return "thinking_dropped"
    if _bare(content) in _bare(turn):
        return "space_changed"
    spoken = _THINK.sub("", content).rpartition("</think>")[2]
    if spoken != content and _bare(spoken) in _bare(turn):
        return "thinking_dropped"
    return "words_changed"


def _bare(text: str) -> str:
    return "".join(text.split())


def _digest(*texts: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return digest.digest()
