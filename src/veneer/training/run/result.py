"""The result of a run: its folder, the end of each job, and for several jobs a table and a plot of the final losses.

A new adapter equals the base, so a job's evaluation before its first step is the loss of the base: a dashed line in the plot. Full
fine-tuning (``method: [lora, full]``) and other methods have no rank; the best of each is a line.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer._files import replace_text, replacing
from veneer._html import html_table
from veneer._terminal import counted
from veneer.adapters.methods import METHODS, has_option
from veneer.checkpoints.locate import better_adapter
from veneer.config import PER_RUN_OPTIONS, TrainOptions, plain
from veneer.training.loop.job import Job
from veneer.training.run.run_folder import RunFolder

TABLE, PLOT = "summary.json", "summary.svg"


@dataclass(frozen=True)
class JobResult:
    """The end of a job. ``losses``: (step, held-out loss) of each evaluation. ``changes``: options that differ between the jobs.
    ``init_from``: the adapter that it started from, if not from the base."""

    name: str
    method: str
    r: int
    learning_rate: float
    state: str
    reason: str
    steps: int
    losses: tuple[tuple[int, float], ...]
    adapter: Path
    best: Path
    changes: Mapping[str, Any]
    init_from: Path | None = None
    figures: tuple[tuple[int, dict[str, float]], ...] = ()
    """(step, further figures of the task by name) of each evaluation, such as the reward accuracy of preferences."""
    unreached: tuple[str, ...] = ()
    """Experts that the adapter acts on and that no token of the job was routed to."""

    def __fspath__(self) -> str:
        """The folder of its best adapter, so that ``bank.load(job)`` works."""
        return str(self.better)

    @property
    def lowest_loss(self) -> float:
        """The lowest held-out loss, of the adapter that it started from too; infinite if there is none."""
        return min((loss for _, loss in self.losses if math.isfinite(loss)), default=math.inf)

    @property
    def best_loss(self) -> float:
        """The lowest held-out loss that an adapter of the job had; infinite if there is none."""
        own = self.losses[self.init_from is None :] if self.losses and self.losses[0][0] == 0 else self.losses
        return min((loss for _, loss in own if math.isfinite(loss)), default=math.inf)

    @property
    def better(self) -> Path:
        """The folder of the best adapter, or of the last one if none has a lower held-out loss: what commands take."""
        return better_adapter(self.adapter, self.best)

    @property
    def final_loss(self) -> float:
        """The last held-out loss; infinite if there is none."""
        loss = self.losses[-1][1] if self.losses else math.inf
        return loss if math.isfinite(loss) else math.inf


@dataclass(frozen=True)
class RunResult:
    """The folder of a run and the results of its jobs by name."""

    out: Path
    jobs: dict[str, JobResult]

    def __fspath__(self) -> str:
        """The run's folder, so that ``bank.load(result)`` works."""
        return str(self.out)

    def __repr__(self) -> str:
        jobs = ", ".join(f"{job.name}: {job.state} after {counted(job.steps, 'step')}" for job in self.jobs.values())
        return f"RunResult({str(self.out)!r}, {jobs})"

    def _repr_html_(self) -> str:
        header, rows = table_of(self)
        return html_table(header, rows, str(self.out))

    @property
    def adapter(self) -> Path:
        """The folder of the final adapter of the first (or only) job."""
        return next(iter(self.jobs.values())).adapter

    @property
    def best(self) -> Path:
        """The folder of the best adapter of the first (or only) job: the one with the lowest held-out loss, or the final one."""
        return next(iter(self.jobs.values())).better


def differing_options(jobs: Mapping[str, TrainOptions]) -> dict[str, dict[str, Any]]:
    """The options that differ between jobs, by job."""
    options = {name: plain(own) for name, own in jobs.items()}
    first = next(iter(options.values()))
    differing = [
        key
        for key in first
        if key not in (*PER_RUN_OPTIONS, "name") and any(other[key] != first[key] for other in options.values())
    ]
    return {name: {key: own[key] for key in differing} for name, own in options.items()}


def result_of(folder: RunFolder, jobs: list[Job]) -> RunResult:
    """The result of a run from the current states of its jobs."""
    changes = differing_options({job.name: job.options for job in jobs})
    results = {
        job.name: JobResult(
            name=job.name,
            method=job.options.method,
            r=job.options.r,
            learning_rate=job.peak,
            state=job.state.value,
            reason=job.reason,
            steps=job.progress.step,
            losses=tuple(job.progress.evaluations),
            adapter=folder.adapter(job.name),
            best=folder.best(job.name),
            changes=changes[job.name],
            init_from=job.options.init_from,
            figures=tuple(job.progress.figures),
            unreached=job.unreached_experts(),
        )
        for job in jobs
    }
    return RunResult(folder.results, results)


def base_loss(jobs: Sequence[JobResult]) -> float | None:
    """Held-out loss of the base, if all jobs were evaluated on the same examples and agree on it."""
    firsts = [job.losses[0][1] for job in jobs if job.losses and job.losses[0][0] == 0 and job.init_from is None]
    if len(firsts) < len(jobs) or not firsts or max(firsts) - min(firsts) > 1e-6 * abs(firsts[0]):
        return None
    return firsts[0]


def ranked(result: RunResult) -> list[JobResult]:
    """Jobs by the held-out loss of their best adapter, the lowest first; jobs that stopped early come after those that finished."""
    return sorted(result.jobs.values(), key=lambda job: (job.state != "finished", job.best_loss, job.final_loss))


def table_of(result: RunResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of the jobs."""
    jobs = ranked(result)
    keys = list(jobs[0].changes)
    header = ["job", *keys, "state", "steps", "held out", "best"]
    rows = []
    for job in jobs:
        values = [_cell(job, key) for key in keys]
        rows.append([job.name, *values, job.state, str(job.steps), _loss(job.final_loss), _loss(job.lowest_loss)])
    base = base_loss(jobs)
    if base is not None:
        rows.append(["base", *[""] * len(keys), "", "0", _loss(base), ""])
    return header, rows


def write_summary(result: RunResult) -> list[Path]:
    """Write the table as JSON, and the plot if matplotlib is installed, into the run's folder; returns the paths."""
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
        if plot(result, result.out / PLOT):
            written.append(result.out / PLOT)
    except ImportError:
        pass
    return written


def plot(result: RunResult, path: Path) -> bool:
    """Plot final held-out losses; returns False if there are none. Raises ImportError if matplotlib is not installed."""
    evaluated = [job for job in result.jobs.values() if math.isfinite(job.final_loss)]
    jobs = [job for job in evaluated if has_option(job.method, "r")]
    if not jobs:
        return False
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    several_rates = len({job.learning_rate for job in jobs}) > 1
    across, lines = ("learning_rate", "r") if several_rates else ("r", "learning_rate")
    for method, value in sorted({(job.method, getattr(job, lines)) for job in jobs}):
        points = sorted(
            (job for job in jobs if job.method == method and getattr(job, lines) == value),
            key=lambda job: getattr(job, across),
        )
        label = f"{method}, {lines.replace('_', ' ')} {_shown(value)}"
        x = [getattr(job, across) for job in points]
        (line,) = axes.plot(x, [job.final_loss for job in points], marker="o", label=label)
        for job in points:
            if job.state != "finished":
                axes.plot(
                    [getattr(job, across)],
                    [job.final_loss],
                    marker="o",
                    markerfacecolor="white",
                    color=line.get_color(),
                )
    without_rank = sorted({job.method for job in evaluated if not has_option(job.method, "r")})
    for method, style in zip(without_rank, itertools.cycle((":", "-.", (0, (1, 3)), (0, (5, 5))))):
        best = min(job.final_loss for job in evaluated if job.method == method)
        axes.axhline(best, linestyle=style, color="black", label=METHODS[method]().label)
    base = base_loss(evaluated)
    if base is not None:
        axes.axhline(base, linestyle="--", color="grey", label="base")
    axes.set_xscale("log", base=2 if across == "r" else 10)
    axes.set_xlabel("rank" if across == "r" else "learning rate")
    axes.set_ylabel("final held-out loss (hollow: stopped early)")
    axes.legend(fontsize="small")
    with replacing(path) as beside:
        figure.savefig(beside, format="svg", metadata={"Date": None})
    return True


def _cell(job: JobResult, key: str) -> str:
    """A job's option in the table: the resolved learning rate, and nothing for an option that its method lacks."""
    if not has_option(job.method, key):
        return "-"
    value = job.learning_rate if key == "learning_rate" else job.changes[key]
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else _shown(value)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else ("-" if value is None else str(value))


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"
