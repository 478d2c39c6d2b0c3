"""What came of several jobs, side by side: a table, and a picture of the final held-out loss against rank and learning rate.

A job begins at the base exactly, so the loss of its first look is the base's: a dashed line. Full fine-tuning (``method: [lora, full]``)
has no rank; the best of it is a dotted line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer._files import replace_text, replacing

if TYPE_CHECKING:
    from veneer.training.run.result import JobResult, RunResult

FULL = "full"
TABLE, PICTURE = "summary.json", "summary.svg"


def base_loss(jobs: Sequence[JobResult]) -> float | None:
    """Held-out loss of the base, where all jobs were judged on the same examples and agree on it."""
    firsts = [job.losses[0][1] for job in jobs if job.losses and job.losses[0][0] == 0]
    if len(firsts) < len(jobs) or not firsts or max(firsts) - min(firsts) > 1e-6 * abs(firsts[0]):
        return None
    return firsts[0]


def final_loss(job: JobResult) -> float:
    """The last held-out loss of a job, infinite where there is none."""
    loss = job.losses[-1][1] if job.losses else math.inf
    return loss if math.isfinite(loss) else math.inf


def ranked(result: RunResult) -> list[JobResult]:
    """Jobs, the best final held-out loss first, those that were stopped early behind those that went to their end."""
    return sorted(result.jobs.values(), key=lambda job: (job.state != "finished", final_loss(job)))


def rows(result: RunResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of the jobs."""
    jobs = ranked(result)
    keys = list(jobs[0].changes)
    header = ["job", *keys, "state", "steps", "held out", "best"]
    found = []
    for job in jobs:
        best = min((loss for _, loss in job.losses if math.isfinite(loss)), default=math.inf)
        values = [_cell(job, key) for key in keys]
        found.append([job.name, *values, job.state, str(job.steps), _loss(final_loss(job)), _loss(best)])
    base = base_loss(jobs)
    if base is not None:
        found.append(["base", *[""] * len(keys), "", "0", _loss(base), ""])
    return header, found


def write(result: RunResult) -> list[Path]:
    """Put the table as JSON, and the picture where matplotlib is there, into the run's folder; returns what was written."""
    table: list[dict[str, Any]] = [
        {
            "job": job.name,
            **job.changes,
            "method": job.method,
            "r": job.r,
            "learning_rate": job.learning_rate,
            "state": job.state,
            "reason": job.reason,
            "steps": job.steps,
            "losses": [[step, loss if math.isfinite(loss) else None] for step, loss in job.losses],
            "adapter": str(job.adapter),
        }
        for job in ranked(result)
    ]
    replace_text(result.out / TABLE, json.dumps(table, indent=2, default=str) + "\n")
    written = [result.out / TABLE]
    try:
        if draw(result, result.out / PICTURE):
            written.append(result.out / PICTURE)
    except ImportError:
        pass
    return written


def draw(result: RunResult, path: Path) -> bool:
    """Draw final held-out losses; returns whether there was anything to draw. Raises ImportError where matplotlib is not installed."""
    every = [job for job in result.jobs.values() if math.isfinite(final_loss(job))]
    jobs = [job for job in every if job.method != FULL]
    if not jobs:
        return False
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    rates = {job.learning_rate for job in jobs}
    across, lines = ("learning_rate", "r") if len(rates) > 1 else ("r", "learning_rate")
    for method in sorted({job.method for job in jobs}):
        for value in sorted({getattr(job, lines) for job in jobs if job.method == method}):
            own = sorted(
                (job for job in jobs if job.method == method and getattr(job, lines) == value),
                key=lambda job: getattr(job, across),
            )
            x, y = [getattr(job, across) for job in own], [final_loss(job) for job in own]
            label = f"{method}, {lines.replace('_', ' ')} {_shown(value)}"
            (line,) = axes.plot(x, y, marker="o", label=label)
            stopped = [(a, b) for a, b, job in zip(x, y, own, strict=True) if job.state != "finished"]
            for a, b in stopped:
                axes.plot([a], [b], marker="o", markerfacecolor="white", color=line.get_color())
    whole = min((final_loss(job) for job in every if job.method == FULL), default=None)
    if whole is not None:
        axes.axhline(whole, linestyle=":", color="black", label="full fine-tuning")
    base = base_loss(every)
    if base is not None:
        axes.axhline(base, linestyle="--", color="grey", label="base")
    if across == "r":
        axes.set_xscale("log", base=2)
    else:
        axes.set_xscale("log")
    axes.set_xlabel("rank" if across == "r" else "learning rate")
    axes.set_ylabel("held-out loss at the end (hollow: stopped before)")
    axes.legend(fontsize="small")
    with replacing(path) as beside:
        figure.savefig(beside, format="svg", metadata={"Date": None})
    return True


def _cell(job: JobResult, key: str) -> str:
    """An option of a job in the table: the rate that was found where none was given, and no rank where there is none."""
    if key == "r" and job.method == FULL:
        return "-"
    value = job.learning_rate if key == "learning_rate" else job.changes[key]
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else _shown(value)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else ("-" if value is None else str(value))


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"
