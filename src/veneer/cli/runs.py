"""``veneer runs [DIR]``: list the runs below a folder with their state, steps, losses and adapters; for one run, its latest samples too.

``veneer runs runs/both --pause sql`` requests a change of one job of a run (without a job: of all jobs). The run applies
it between two steps, or when it is resumed.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from veneer.cli._output import as_json, table
from veneer.cli._parser import add_json
from veneer.cli._run_list import JobStatus, latest_samples, list_runs
from veneer.errors import CheckpointError

_ALL = "*"
_DEFAULT = "runs"
_REQUESTS = {
    "pause": "pause a job of the run DIR (default: all jobs)",
    "resume": "resume a paused job",
    "cancel": "cancel a job for good; its state stays in the checkpoints",
}
_HEADER = ("run", "job", "state", "step", "loss", "held out", "best", "adapter")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", nargs="?", default=_DEFAULT, metavar="DIR", help="folder of runs (default: runs)")
    for request, description in _REQUESTS.items():
        parser.add_argument(f"--{request}", nargs="?", const=_ALL, metavar="JOB", help=description)
    add_json(parser, "print the list as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the list, or request a change of a job."""
    root = Path(args.folder)
    statuses = list_runs(root) if root.is_dir() or args.folder != _DEFAULT else []
    requests = {request: job for request in _REQUESTS if (job := getattr(args, request)) is not None}
    if requests:
        return _request(Path(args.folder), statuses, requests)
    samples = {
        status.job: latest_samples(Path(args.folder), status.job)
        for status in statuses
        if Path(status.run) == Path(args.folder)
    }
    if args.json:
        print(as_json([{**asdict(status), "samples": samples.get(status.job, [])} for status in statuses]))
        return 0
    if not statuses:
        print(f"{args.folder} contains no runs; start one with veneer train DATA --out {Path(args.folder) / 'NAME'}")
        return 0
    several = {path for path, count in Counter(status.run for status in statuses).items() if count > 1}
    for line in table(_HEADER, [_cells(status, several) for status in statuses]):
        print(line.rstrip())
    for status in statuses:
        if status.reason:
            print(f"{status.run} {status.job}: {status.reason}")
    for job, found in samples.items():
        if found:
            print(f"\nsamples of {job} at step {found[-1]['step']}:")
            print("\n\n".join("\n".join(sample_lines(sample)) for sample in found))
    return 0


def sample_lines(sample: Mapping[str, Any]) -> list[str]:
    """Format a sample answer for a terminal."""
    shown = [(key, " ".join(str(sample.get(key) or "").split())) for key in ("prompt", "expected", "answer")]
    return [f"  {key:<8}  {text}" for key, text in shown if text or key == "answer"]


def _request(out: Path, statuses: list[JobStatus], requests: dict[str, str]) -> int:
    """Write requests into a run's folder.

    Raises:
        CheckpointError: The folder is not a run, or has no such unfinished job.
    """
    unfinished = [s.job for s in statuses if s.run == str(out) and s.state in ("running", "interrupted", "paused")]
    if not (out / "config.yaml").is_file():
        raise CheckpointError(f"{out} is not a run; name the folder of one run, as veneer runs lists it")
    if not unfinished:
        raise CheckpointError(f"{out} has no unfinished job")
    for job in requests.values():
        if job != _ALL and job not in unfinished:
            raise CheckpointError(f'{out} has no unfinished job "{job}"; unfinished jobs: {", ".join(unfinished)}')
    from veneer.training.run.control import ask

    live = any(status.state == "running" for status in statuses if status.run == str(out))
    for request, job in requests.items():
        ask(out, job, request)  # type: ignore[arg-type]
        when = "after the current step" if live else "when the run is resumed with the same veneer train command"
        print(f"{out}: {request} {'all jobs' if job == _ALL else job}, {when}")
    return 0


def _cells(status: JobStatus, several: set[str]) -> list[str]:
    job = status.job if status.run in several or status.job != Path(status.run).name else ""
    losses = [_loss(value) for value in (status.loss, status.held_out, status.best)]
    return [status.run, job, status.state, str(status.step), *losses, status.adapter or "-"]


def _loss(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"
