"""The parts of a run on a cluster: jobs that one worker trains together, as an ordinary run in a folder below the run's own.

    runs/sweep/config.yaml           the options of the whole run
    runs/sweep/run.json              {"parts": the jobs of each, and what all workers must have alike}
    runs/sweep/parts/001/            a part: its config.yaml, run.json, events.jsonl, checkpoints/
    runs/sweep/metrics, adapters/    of all jobs, written by the workers

The division is made once, before the first step, so that a run that resumes, on other workers too, finds each job's checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.config import PER_RUN_OPTIONS, TrainOptions, given, plain
from veneer.training.run.run_folder import PARTS

_EACH = 2
"""Parts for each worker, so that the jobs of a lost one are shared by the others."""


@dataclass(frozen=True)
class RunPart:
    """Jobs that a worker trains together. ``options``: those of an ordinary run of these jobs."""

    number: int
    jobs: tuple[str, ...]
    options: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The folder of its run."""
        return Path(self.options["out"])


def divide(jobs: Sequence[str], workers: int, fits: int) -> list[tuple[str, ...]]:
    """Jobs in consecutive groups of like size, at most ``fits`` in each.

    >>> divide("abcdefg", workers=2, fits=3)
    [('a', 'b'), ('c', 'd'), ('e', 'f'), ('g',)]
    """
    count = max(min(len(jobs), _EACH * workers), math.ceil(len(jobs) / max(1, fits)))
    sizes = [len(jobs) // count + (number < len(jobs) % count) for number in range(count)]
    starts = [sum(sizes[:number]) for number in range(count)]
    return [tuple(jobs[at : at + size]) for at, size in zip(starts, sizes, strict=True)]


def folder_of_part(out: Path, number: int) -> Path:
    """The folder of a part of the run in ``out``."""
    return out / PARTS / f"{number:03d}"


def part_of(
    options: TrainOptions, jobs: Mapping[str, TrainOptions], out: Path, number: int, names: Sequence[str]
) -> RunPart:
    """The part of the run in ``out`` that has these of its ``jobs``. Files are named by absolute paths: a worker has another folder."""
    common = {key: plain(options)[key] for key in given(options) if key in PER_RUN_OPTIONS}
    common = {key: value for key, value in common.items() if key not in ("jobs", "sweep", "cluster", "name")}
    if "base" in common:
        common["base"] = _absolute(common["base"])
    own = [{**_own(jobs[name]), "name": name} for name in names]
    return RunPart(number, tuple(names), {**common, "out": str(folder_of_part(out, number)), "jobs": own})


def _own(options: TrainOptions) -> dict[str, Any]:
    """The options of a job that were given, as a file of options holds them."""
    values = plain(options)
    found = {key: values[key] for key in given(options) if key not in PER_RUN_OPTIONS}
    for key in ("data", "valid", "on_top_of", "orthogonal_to"):
        if key in found:
            found[key] = [_absolute(path) for path in found[key]]
    for key in ("init_from", "chat_template"):
        if found.get(key) is not None:
            found[key] = _absolute(found[key])
    return found


def _absolute(path: str) -> str:
    """A path that is there as an absolute one; anything else, such as the name of a template, as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path
