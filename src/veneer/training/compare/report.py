"""The result of a comparison as a table for the terminal and as one HTML page without scripts or external resources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from veneer._files import replace_text
from veneer._html import html_table
from veneer._version import __version__
from veneer.training.compare.measure import ContestantRow, Score
from veneer.training.compare.study import Comparison

PAGE = "compare.html"
HEADER = (
    "method",
    "parameters",
    "rate",
    "test loss (best)",
    "test loss (last)",
    "forgetting",
    "ms/pass",
    "memory",
    "latency",
    "disk",
)
LEGEND = {
    "parameters": "trainable parameters without those of a head, which are counted apart",
    "rate": "learning rate with the lowest held-out loss in the search",
    "test loss": "mean loss per token on the test rows, over seeds, with a 95 % interval; at the best and at the last step",
    "accuracy, f1, matthews, pearson, spearman": "scores of a head on the test rows, over seeds, with a 95 % interval",
    "forgetting": "increase of the loss on a general text over the base's",
    "ms/pass": "forward and backward of one pass of at most 1,024 tokens",
    "memory": "memory that a pass adds, with AdamW's state",
    "latency": "time that the adapter adds to a forward of one row while it is not merged; merged, it adds nothing",
    "disk": "size of the adapter's folder",
}
"""Column -> its meaning."""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _EDGE = 720, 400, 70, 46, 24
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
table{border-collapse:collapse;margin:1rem 0;font-size:13px;display:block;overflow-x:auto}
td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}
td{white-space:nowrap}
svg text{paint-order:stroke;stroke:#fff;stroke-width:3px}
svg{max-width:100%;height:auto}
dt{font-weight:600} dd{margin:0 0 .3rem 1.5rem;color:#555}
"""


def header(comparison: Comparison) -> tuple[str, ...]:
    """The columns of the table: with heads, their scores in place of forgetting."""
    metrics = comparison.rows[0].scores_best
    if not metrics:
        return HEADER
    scores = [f"{name} ({step})" for name in metrics for step in ("best", "last")]
    at = HEADER.index("forgetting")
    return (*HEADER[:2], "head", *HEADER[2:at], *scores, *HEADER[at + 1 :])


def cells(comparison: Comparison) -> list[list[str]]:
    """The rows of the table, the base last; a base with a head has no losses of its own."""
    rows = [_cells(row) for row in comparison.rows]
    if comparison.base_loss is None:
        return rows
    return [
        *rows,
        ["base", "0", "-", f"{comparison.base_loss:.4f}", f"{comparison.base_loss:.4f}", "-", "-", "-", "-", "-"],
    ]


def _cells(row: ContestantRow) -> list[str]:
    scores = [_score(score[name]) for name in row.scores_best for score in (row.scores_best, row.scores_last)]
    return [
        row.label,
        f"{row.parameters:,}",
        *([f"{row.head_parameters:,}"] if scores else []),
        f"{row.learning_rate:.1e}",
        _score(row.best),
        _score(row.last),
        *([_score(row.forgetting, sign="+")] if row.forgetting is not None else scores),
        f"{row.step_ms:,.0f}",
        f"{row.step_bytes / 1e6:,.0f} MB",
        f"{row.latency_ms:+.1f} ms",
        f"{row.disk_bytes / 1e6:,.2f} MB",
    ]


def _score(score: Score, sign: str = "") -> str:
    interval = "" if score.low is None or score.high is None else f" ({score.low:{sign}.3f} to {score.high:{sign}.3f})"
    return f"{score.mean:{sign}.4f}{interval}"


def notes(comparison: Comparison) -> list[str]:
    """Sentences about results that need care: a rate at the edge of the search, intervals that overlap."""
    lines = []
    for row in comparison.rows:
        rates = sorted(row.rates)
        if len(rates) > 1 and row.learning_rate in (rates[0], rates[-1]):
            side = "lower" if row.learning_rate == rates[0] else "higher"
            lines.append(f"{row.label}: the best rate is the edge of the search; try {side} ones with --learning-rate")
    first, *others = comparison.rows
    for other in others:
        if None not in (first.best.high, other.best.low) and other.best.low <= first.best.high:  # type: ignore[operator]
            lines.append(f"{first.label} and {other.label} cannot be told apart with {len(first.seeds)} seeds")
    if len(first.seeds) == 1:
        lines.append("one seed shows no spread; give --seed 0,1,2 for intervals")
    return lines


def write_html(comparison: Comparison) -> Path:
    """Write the page into the comparison's folder."""
    path = comparison.out / PAGE
    replace_text(path, html(comparison))
    return path


def html(comparison: Comparison) -> str:
    """The page as text."""
    seeds = comparison.rows[0].seeds
    legend = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in LEGEND.items())
    remarks = "".join(f"<li>{escape(line)}</li>" for line in notes(comparison))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=width=device-width>"
        f"<title>Veneer: comparison</title><style>{_STYLE}</style>"
        f"<h1>Comparison on {escape(comparison.base)}</h1>"
        f"<p>{comparison.examples['test']:,} test rows, seed{'s' if seeds[1:] else ''} {', '.join(map(str, seeds))}. "
        f"{'Higher' if comparison.rows[0].scores_best else 'Lower'} is better.</p>{plot(comparison.rows, comparison.base_loss)}"
        f"{html_table(header(comparison), cells(comparison))}"
        f"<ul>{remarks}</ul><dl>{legend}</dl><p>Veneer {__version__}</p></html>\n"
    )


def plotted(row: ContestantRow) -> tuple[str, Score]:
    """The name and the values of what the plot shows: a head's main score, or the test loss."""
    return next(iter(row.scores_best.items()), ("test loss", row.best))


def plot(rows: Sequence[ContestantRow], base_loss: float | None) -> str:
    """An SVG of the score against the number of trainable parameters, with the base as a dashed line where it has a loss."""
    name = plotted(rows[0])[0]
    points = {row.label: plotted(row)[1] for row in rows}
    edges = [] if base_loss is None else [base_loss]
    low = min([score.mean if score.low is None else score.low for score in points.values()] + edges)
    high = max([score.mean if score.high is None else score.high for score in points.values()] + edges)
    margin = 0.08 * (high - low) or 0.1
    low, high = low - margin, high + margin
    least = min((row.parameters for row in rows if row.parameters), default=1)
    counts = {row.label: row.parameters or least / 3 for row in rows}  # a head alone stands left of all others
    first, last = (math.log10(count(counts.values())) for count in (min, max))
    first, last = first - 0.2, last + 0.2

    def x(parameters: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _EDGE) * (math.log10(parameters) - first) / (last - first)

    def y(loss: float) -> float:
        return _EDGE + (_HEIGHT - _EDGE - _BOTTOM) * (high - loss) / (high - low)

    right, bottom = _WIDTH - _EDGE, _HEIGHT - _BOTTOM
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="system-ui,sans-serif" font-size="12" role="img" '
        f'aria-label="{name.capitalize()} against trainable parameters">',
        f'<path d="M{_LEFT} {_EDGE}V{bottom}H{right}" fill="none" stroke="#888"/>',
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">trainable parameters</text>',
        f'<text x="14" y="{(_EDGE + bottom) / 2}" transform="rotate(-90 14 {(_EDGE + bottom) / 2})" '
        f'text-anchor="middle">{name}</text>',
    ]
    if base_loss is not None:
        parts += [
            f'<path d="M{_LEFT} {y(base_loss):.1f}H{right}" stroke="#888" stroke-dasharray="5 4"/>',
            f'<text x="{right}" y="{y(base_loss) - 5:.1f}" text-anchor="end" fill="#666">base {base_loss:.3f}</text>',
        ]
    for count in _counts(10**first, 10**last):
        parts.append(f'<text x="{x(count):.1f}" y="{bottom + 16}" text-anchor="middle">{_count(count)}</text>')
    step = _step((high - low) / 6)
    digits = max(0, -math.floor(math.log10(step)))
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        loss = number * step
        parts.append(f'<text x="{_LEFT - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.{digits}f}</text>')
    labels = _labels(
        [(row.label, x(counts[row.label]), y(points[row.label].mean)) for row in rows], (_LEFT + right) / 2
    )
    for row in rows:
        score = points[row.label]
        at, middle = x(counts[row.label]), y(score.mean)
        if score.low is not None and score.high is not None:
            parts.append(f'<path d="M{at:.1f} {y(score.low):.1f}V{y(score.high):.1f}" stroke="#0072B2"/>')
        parts.append(f'<circle cx="{at:.1f}" cy="{middle:.1f}" r="4" fill="#0072B2"/>')
        side, label_x, label_y = labels[row.label]
        parts.append(f'<text x="{label_x:.1f}" y="{label_y:.1f}" text-anchor="{side}">{escape(row.label)}</text>')
    return "".join([*parts, "</svg>"])


def _labels(points: Sequence[tuple[str, float, float]], middle: float) -> dict[str, tuple[str, float, float]]:
    """{label: (anchor, x, y)} of labels beside their points, moved down where two would overlap."""
    found: dict[str, tuple[str, float, float]] = {}
    taken: list[tuple[float, float, float]] = []
    for label, x, y in sorted(points, key=lambda point: point[2]):
        width, side = 7.0 * len(label), "end" if x > middle else "start"
        left = x - 8 - width if side == "end" else x + 8
        top = y + 4
        while any(left < other + span and other < left + width and abs(top - at) < 14 for other, span, at in taken):
            top += 14
        taken.append((left, width, top))
        found[label] = (side, x - 8 if side == "end" else x + 8, top)
    return found


def _counts(low: float, high: float) -> list[int]:
    """The counts for the labels of a logarithmic axis: powers of ten, and their doubles and fives if those are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10**power for power in powers if power >= 0 for factor in (1, 2, 5)]
    inside = [count for count in found if low <= count <= high]
    tens = [count for count in inside if str(count).rstrip("0") == "1"]
    return tens if len(inside) > 8 else inside


def _step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is at least ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _count(number: int) -> str:
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number // size}{suffix}"
    return str(number)
