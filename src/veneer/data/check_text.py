"""A check's report for people: what was read, what is unusable, what is remarkable, and how long the rows are."""

from __future__ import annotations

from veneer.data.check import CheckReport
from veneer.data.notes import NOTES

__all__ = ["FINDINGS", "check_lines", "remark_lines"]

FINDINGS = {
    "duplicate": "rows that occurred before; the model sees them more often than the others",
    "overlap": "held-out rows that are trained on as well, so the held-out loss looks too good",
    "overlap_prompt": "held-out rows whose prompt is trained on with another answer",
    "duplicate_valid": "held-out rows that occurred before among the held-out",
    "truncated": "rows longer than the maximum length",
    "double_bos": "rows that begin with two begin-of-text tokens, of which one is typed in the text",
    "no_end": "rows with no end token behind the answer, so that the model does not learn to stop",
    "thinking_dropped": "rows with reasoning that the chat template leaves out, so that it is not trained",
    "space_changed": "rows in which the chat template changes white space of the assistant's words",
    "words_changed": "rows in which the chat template changes the assistant's words",
    "control": "rows with control strings in their text; these stay text and control nothing",
    "invisible": "rows with invisible or replacement characters",
    "not_compared": "rows that were not compared with the others, because there are so many",
}
"""What each finding counts."""

_BAR = 40
_FEW = 3


def check_lines(report: CheckReport) -> list[str]:
    """The report as lines of plain text; the last says whether the files are usable."""
    load = report.load
    lines = [*load.stated, ""]
    share = f" ({100 * load.trained / load.tokens:.0f} %)" if load.tokens else ""
    lines.append(
        f"{_many(load.rows, 'row')}, {_many(load.examples, 'example')}, {_many(load.tokens, 'token')}, "
        f"{load.trained:,} trained{share}"
    )
    lines += _bad(report)
    lines += _findings(report)
    lines += _histogram(report)
    lines.append("")
    lines.append("All rows can be trained." if report.usable else f"{_many(load.bad_count, 'row')} cannot be trained.")
    return lines


def remark_lines(report: CheckReport) -> list[str]:
    """What is remarkable, a line each with the first places, for a run that is about to begin."""
    lines = []
    for name, words in FINDINGS.items():
        finding = report.findings.get(name)
        if finding is not None:
            few = finding.places[:_FEW]
            more = f" and {finding.count - len(few):,} more" if finding.count > len(few) else ""
            lines.append(f"{words}: {finding.count:,} ({', '.join(few)}{more})")
    return lines


def _bad(report: CheckReport) -> list[str]:
    load = report.load
    if not load.bad_count:
        return []
    lines = ["", f"Unusable: {_many(load.bad_count, 'problem')}"]
    lines += [f"  {bad}" for bad in load.bad]
    if load.bad_count > len(load.bad):
        lines.append(f"  and {load.bad_count - len(load.bad):,} more")
    return lines


def _findings(report: CheckReport) -> list[str]:
    lines: list[str] = []
    for name, words in FINDINGS.items():
        finding = report.findings.get(name)
        if finding is None:
            continue
        if name == "truncated":
            words += f" of {report.max_length:,} tokens, which lose {report.load.lost:,} trained tokens if they are cut"
        lines.append(f"  {words}: {finding.count:,}")
        more = f" and {finding.count - len(finding.places):,} more" if finding.count > len(finding.places) else ""
        lines.append(f"      {', '.join(finding.places)}{more}")
    for name, count in report.load.notes.items():
        if name != "no_end_token":  # told among the findings, with places
            lines.append(f"  {NOTES[name]}: {count:,}")
    return ["", "Remarkable", *lines] if lines else []


def _histogram(report: CheckReport) -> list[str]:
    rows = report.histogram()
    if not rows:
        return []
    most = max(count for _, _, count in rows)
    ordered = sorted(report.lengths)
    middle, late = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]
    lines = ["", f"Tokens of an example: median {middle:,}, 95 % below {late + 1:,}, longest {ordered[-1]:,}"]
    for a, b, count in rows:
        bar = "#" * max(1 if count else 0, round(_BAR * count / most))
        lines.append(f"  {a:>7,} - {b:>7,}  {count:>8,}  {bar}")
    return lines


def _many(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"
