"""Checks for ``veneer data check`` and for the beginning of a run: rows that are unusable, and rows to warn about.

Unusable (exit code 1): rows that cannot be read or interpreted, that the template refuses, and that have nothing to learn
or lose all of it to the maximum length. Warnings: see ``FINDINGS``.
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

from veneer._terminal import counted
from veneer.data.chat.render import Rendered, Renderer
from veneer.data.chat.rendered import NOTES
from veneer.data.dataset import LoadReport, cut_problem, usable_parts
from veneer.data.rows.messages import THINKING_KEYS
from veneer.data.rows.row import Row
from veneer.data.rows.shapes import RowReader

__all__ = ["FINDINGS", "CheckReport", "Finding", "RowChecks", "check_files", "report_lines", "warning_lines"]

FINDINGS = {
    "duplicate": "duplicate rows; the model sees them more often than the others",
    "overlap": "held-out rows that are also trained on, which makes the held-out loss too low",
    "overlap_prompt": "held-out rows whose prompt is trained on with another answer",
    "duplicate_valid": "duplicate held-out rows",
    "truncated": "rows longer than the maximum length",
    "double_bos": "rows that begin with two begin-of-text tokens, one of them from the row's text",
    "no_end": "rows without an end token after the answer, so the model does not learn to stop",
    "tools_left_out": NOTES["tools_left_out"],
    "names_left_out": NOTES["names_left_out"],
    "thinking_dropped": "rows with reasoning that the chat template leaves out, so it is not trained",
    "space_changed": "rows in which the chat template changes white space of the assistant's text",
    "words_changed": "rows in which the chat template changes the assistant's text",
    "control": "rows with control strings in their text; these are encoded as text",
    "invisible": "rows with invisible or replacement characters",
    "not_compared": "rows that were not compared with the others, because there are too many",
}
"""The description of each finding."""

_SOURCES = 10  # sources that a finding keeps
_SOURCES_SHORT = 3  # sources that a warning shows
_BAR = 40  # characters of the longest bar of the histogram
_COMPARED = 5_000_000  # rows whose text is remembered, about 200 bytes each
_INVISIBLE = re.compile("[\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\ufffd\u0080-\u009f]")
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


@dataclass(slots=True)
class Finding:
    """The number of rows with a finding, and the sources of the first ones."""

    count: int = 0
    sources: list[str] = field(default_factory=list)

    def add(self, source: str) -> None:
        """Count a row."""
        self.count += 1
        if len(self.sources) < _SOURCES:
            self.sources.append(source)

    def listed(self, most: int) -> str:
        """The first sources and the number of the others."""
        shown = self.sources[:most]
        return ", ".join(shown) + (f" and {self.count - len(shown):,} more" if self.count > len(shown) else "")


@dataclass(slots=True)
class CheckReport:
    """The result of a check.

    Attributes:
        load: rows, bad rows and notes, as in training.
        max_length: the limit for truncation, None for no limit.
        lengths: tokens of each example before truncation.
        findings: by name, see ``FINDINGS``.
        control_strings: control strings in the rows' text, with the number of rows.
    """

    load: LoadReport = field(default_factory=LoadReport)
    max_length: int | None = None
    lengths: array[int] = field(default_factory=lambda: array("l"))
    findings: dict[str, Finding] = field(default_factory=dict)
    control_strings: Counter[str] = field(default_factory=Counter)

    @property
    def usable(self) -> bool:
        """True if every row can be trained."""
        return not self.load.problems

    def add(self, name: str, source: str) -> None:
        """Count a row under a finding."""
        self.findings.setdefault(name, Finding()).add(source)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        load = self.load
        return {
            "usable": self.usable,
            "stated": load.notices,
            "rows": load.rows,
            "examples": len(self.lengths),
            "tokens": sum(self.lengths),
            "trained_tokens": load.trained,
            "bad_rows": {
                "count": load.bad_rows,
                "first": [{"place": bad.source, "key": bad.key, "reason": bad.reason} for bad in load.bad],
            },
            "max_length": self.max_length,
            "truncated_rows": load.cut,
            "lost_trained_tokens": load.lost,
            "lengths": [{"from": a, "to": b, "examples": n} for a, b, n in self.histogram()],
            "findings": {name: {"rows": f.count, "first": f.sources} for name, f in self.findings.items()},
            "notes": dict(load.notes),
            "control_strings": dict(self.control_strings.most_common()),
        }

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, to, number of examples) in steps of powers of two, from the shortest to the longest."""
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
    """Check files of rows; ``valid`` are held-out files, whose rows should not occur in the others.

    Raises:
        DataError: a file as a whole cannot be read. Errors of rows are in the report instead.
    """
    report = CheckReport(max_length=renderer.options.max_length)
    checks = RowChecks(report, renderer)
    for held_out, paths in ((False, files), (True, valid)):
        for path in paths:
            rows = RowReader(path, format=format, columns=columns, roles=roles)
            for result in renderer.render_many(rows):
                parts = usable_parts(result, report.load)
                if parts and result[0] is not None:
                    _add_lengths(report, parts, result[0])
                    checks.add(result[0], parts, held_out=held_out)
            report.load.notices += [*rows.notices(), *renderer.notices(rows.shape.format)]
    report.load.examples, report.load.tokens = len(report.lengths), sum(report.lengths)
    return report


def _add_lengths(report: CheckReport, parts: list[Rendered], row: Row) -> None:
    load = report.load
    report.lengths.extend(part.length for part in parts)
    load.trained += sum(part.trained for part in parts)
    if any(part.length > len(part.ids) for part in parts):
        lost = sum(part.lost for part in parts)
        load.cut += 1
        load.lost += lost
        longest = max(part.length for part in parts)
        report.add("truncated", f"{row.source} ({longest} tokens, {lost} trained lost)")
    problem = cut_problem(row, parts, report.max_length)
    if problem is not None:
        load.refuse(problem)


class RowChecks:
    """Checks usable rows one after another and adds findings to a report; remembers rows to compare them."""

    def __init__(self, report: CheckReport, renderer: Renderer) -> None:
        self.report = report
        self.bos = getattr(renderer.tokenizer, "bos_token_id", None)
        self.trained: dict[bytes, str] = {}
        self.prompts: set[bytes] = set()
        self.held_out: set[bytes] = set()

    def add(self, row: Row, parts: list[Rendered], *, held_out: bool = False) -> None:
        """Check a row and its parts. Held-out rows must come after trained rows."""
        self._compare(parts, row, held_out=held_out)
        self._check_tokens(parts, row)
        self._check_text(parts, row)

    def _compare(self, parts: list[Rendered], row: Row, *, held_out: bool) -> None:
        whole = _digest(*(part.text for part in parts))
        first = parts[0]
        begin = next((first.starts[i] for i, w in enumerate(first.weights) if w > 0.0), len(first.text))
        prompt = _digest(first.text[:begin]) if begin and row.kind != "text" else None
        if not held_out:
            if whole in self.trained:
                self.report.add("duplicate", f"{row.source} (same as {self.trained[whole]})")
            elif len(self.trained) >= _COMPARED:
                self.report.add("not_compared", row.source)
            else:
                self.trained[whole] = row.source
                if prompt is not None:
                    self.prompts.add(prompt)
        elif whole in self.trained:
            self.report.add("overlap", f"{row.source} (same as {self.trained[whole]})")
        elif prompt is not None and prompt in self.prompts:
            self.report.add("overlap_prompt", row.source)
        elif whole in self.held_out:
            self.report.add("duplicate_valid", row.source)
        if held_out:
            self.held_out.add(whole)

    def _check_tokens(self, parts: list[Rendered], row: Row) -> None:
        if self.bos is not None and any(part.ids[:2] == (self.bos, self.bos) for part in parts):
            self.report.add("double_bos", row.source)
        if any("no_end_token" in part.notes and part.length == len(part.ids) for part in parts):
            self.report.add("no_end", row.source)
        for note in sorted({note for part in parts for note in part.notes if note.endswith("_left_out")}):
            self.report.add(note, row.source)

    def _check_text(self, parts: list[Rendered], row: Row) -> None:
        typed = {text for part in parts for text in part.typed}
        if typed:
            self.report.control_strings.update(typed)
            self.report.add("control", f"{row.source} ({', '.join(sorted(typed)[:3])})")
        if any(_INVISIBLE.search(part.text) for part in parts if not part.text.isascii()):
            self.report.add("invisible", row.source)
        changes = {
            change
            for part in parts
            for message, a, b in part.turns
            if (change := _changed(_messages_of(row, part)[message], part.text, a, b))
        }
        for change in sorted(changes):
            self.report.add(change, row.source)


def _messages_of(row: Row, part: Rendered) -> tuple[dict[str, Any], ...]:
    return row.rejected.messages if row.rejected is not None and part.answer == "rejected" else row.messages


def _changed(message: Mapping[str, Any], text: str, start: int, end: int) -> str:
    """The change that the template made to an assistant's message, as a finding; "" if there is none."""
    turn, content = text[start:end], message.get("content") or ""
    if content.startswith("<think>") and text[:start].rstrip().endswith("<think>"):  # opened by the generation prompt
        content = content.removeprefix("<think>")
    thought = next((message[key] for key in THINKING_KEYS if message.get(key)), "")
    if content in turn and (not thought or thought.strip() in turn):
        return ""
    if thought and _bare(thought) not in _bare(turn):
        return "thinking_dropped"
    if _bare(content) in _bare(turn):
        return "space_changed"
    answer = _THINK.sub("", content).rpartition("</think>")[2]
    if answer != content and _bare(answer) in _bare(turn):
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


def report_lines(report: CheckReport) -> list[str]:
    """The report as lines of plain text; the last line says if the files are usable."""
    load = report.load
    share = f" ({100 * load.trained / load.tokens:.0f} %)" if load.tokens else ""
    counts = (counted(load.rows, "row"), counted(load.examples, "example"), counted(load.tokens, "token"))
    lines = [*load.notices, "", f"{', '.join(counts)}, {load.trained:,} trained{share}"]
    if load.problems:
        lines += ["", f"Unusable: {counted(load.problems, 'problem')}", *(f"  {bad}" for bad in load.bad)]
        if load.problems > len(load.bad):
            lines.append(f"  and {load.problems - len(load.bad):,} more")
    lines += [*_finding_lines(report), *_histogram_lines(report), ""]
    if not report.usable:
        lines.append(f"{counted(load.bad_rows, 'row')} cannot be trained.")
    elif load.cut:
        lines.append(
            f"All rows can be trained if long ones are cut (--truncate end) or left out (--truncate drop): {load.cut:,}."
        )
    else:
        lines.append("All rows can be trained.")
    return lines


def warning_lines(report: CheckReport) -> list[str]:
    """The findings, one line each with the first sources, for a run that is about to start."""
    found = ((words, report.findings.get(name)) for name, words in FINDINGS.items())
    return [f"{words}: {finding.count:,} ({finding.listed(_SOURCES_SHORT)})" for words, finding in found if finding]


def _finding_lines(report: CheckReport) -> list[str]:
    lines: list[str] = []
    for name, words in FINDINGS.items():
        finding = report.findings.get(name)
        if finding is None:
            continue
        if name == "truncated":
            words += f" of {report.max_length:,} tokens; truncation loses {report.load.lost:,} trained tokens"
        lines += [f"  {words}: {finding.count:,}", f"      {finding.listed(_SOURCES)}"]
    for name, count in report.load.notes.items():
        if name != "no_end_token" and name not in FINDINGS:  # those are findings, with sources
            lines.append(f"  {NOTES[name]}: {count:,}")
    return ["", "Warnings", *lines] if lines else []


def _histogram_lines(report: CheckReport) -> list[str]:
    rows = report.histogram()
    if not rows:
        return []
    most = max(count for _, _, count in rows)
    ordered = sorted(report.lengths)
    median, late = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]
    lines = ["", f"Tokens per example: median {median:,}, 95 % at most {late:,}, longest {ordered[-1]:,}"]
    for a, b, count in rows:
        bar = "#" * max(1 if count else 0, round(_BAR * count / most))
        lines.append(f"  {a:>7,} - {b:>7,}  {count:>8,}  {bar}")
    return lines
