"""A plot of the losses of a run as SVG, drawn without a plotting library: ``loss.svg`` in the run's folder.

A line shows the training loss of each job, dots show its held-out losses. The axis of the loss is logarithmic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from veneer._files import replace_text

PLOT = "loss.svg"
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A000")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 400, 64, 16, 36, 44
_MOST_POINTS = 600

Points = list[tuple[float, float]]
"""(step, loss), by step."""


def write_loss_plot(out: Path) -> Path | None:
    """Draw the metrics of a run's folder.

    Returns:
        The file, or None if there are no losses yet.
    """
    curves = {file.stem: _losses(file) for file in sorted((out / "metrics").glob("*.jsonl"))}
    if not any(points for curve in curves.values() for points in curve):
        return None
    path = out / PLOT
    replace_text(path, draw(curves))
    return path


def _losses(file: Path) -> tuple[Points, Points]:
    """Training losses and held-out losses; lines after a resumed run replace those of the same step."""
    training: dict[float, float] = {}
    held_out: dict[float, float] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            step = float(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        for key, found in (("loss", training), ("held_out_loss", held_out)):
            value = row.get(key)
            if isinstance(value, int | float) and math.isfinite(value) and value > 0:
                found[step] = float(value)
    return sorted(training.items()), sorted(held_out.items())


def draw(curves: dict[str, tuple[Points, Points]]) -> str:
    """The SVG of (training losses, held-out losses) by job."""
    every = [point for training, held_out in curves.values() for point in (*training, *held_out)]
    last = max(1.0, max(step for step, _ in every))
    low, high = math.log10(min(loss for _, loss in every)), math.log10(max(loss for _, loss in every))
    if high - low < 0.1:
        low, high = low - 0.05, high + 0.05

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last

    def y(loss: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - math.log10(loss)) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for loss in _ticks(low, high):
        parts.append(f'<path d="M{_LEFT} {y(loss):.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.3g}</text>')
    for number in range(5):
        step = last * number / 4
        parts.append(f'<text x="{x(step):.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{step:.0f}</text>')
    parts.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">step (line: training loss, dots: held-out loss)</text>'
    )
    for number, (name, (training, held_out)) in enumerate(curves.items()):
        color = _COLORS[number % len(_COLORS)]
        if training:
            path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in _thinned(training))
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-opacity="0.7"/>')
        parts += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3.5" fill="{color}"/>' for s, v in held_out]
        if number < len(_COLORS):
            parts.append(f'<text x="{_LEFT + 84 * number}" y="20" fill="{color}">{escape(name[:12])}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ticks(low: float, high: float) -> Iterable[float]:
    """Losses 1, 2, 5 times a power of ten inside the range; the ends of the range if these are fewer than two."""
    found = [
        factor * 10.0**power
        for power in range(math.floor(low), math.ceil(high) + 1)
        for factor in (1, 2, 5)
        if low <= math.log10(factor * 10.0**power) <= high
    ]
    return found if len(found) > 1 else (10.0**low, 10.0 ** ((low + high) / 2), 10.0**high)


def _thinned(points: Sequence[tuple[float, float]]) -> Points:
    """Means over groups of neighbouring points, so that a long run stays a small file."""
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]
