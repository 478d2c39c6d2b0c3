"""One file of options, several jobs: ``jobs`` overrides the common options for each, lists in ``sweep`` are tried in every combination.

r: 16
jobs:
  - {name: sql, data: sql.jsonl}
  - {name: style, data: style.jsonl, method: dora, lora_dropout: 0.05}

sweep: {r: [4, 16, 64], learning_rate: [1e-4, 5e-4]}

A list where one value is expected is a sweep too: ``r: [4, 16, 64]``.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.adapters.adapter import check_name
from veneer.config import TrainOptions, near_miss, plain
from veneer.data.rows.readers import near_file
from veneer.errors import AdapterError, ConfigError, Problems, VeneerError

MOST_JOBS = 256
_LOW_RANK = ("r", "lora_alpha", "lora_dropout", "use_rslora", "loraplus_lr_ratio", "init_lora_weights")
SHARED = (
    "base",
    "revision",
    "dtype",
    "threads",
    "out",
    "tokens_per_pass",
    "share",
    "activation_checkpointing",
    "plan",
    "save_every",
    "checkpoint_minutes",
    "halving",
    "track",
    "jobs",
    "sweep",
)
"""Options of the base, the run or the machine, of which there is one."""


def expand(options: TrainOptions, *, files: bool = True) -> dict[str, TrainOptions]:
    """The jobs of a run by name: one, if neither ``jobs`` nor ``sweep`` is given. files: whether their files must be there.

    Raises ConfigError with everything that is wrong: names that are no names or stand twice, options that a job cannot have, too many
    combinations, files of examples that are not there.
    """
    common: dict[str, Any] = {key: value for key, value in plain(options).items() if key not in ("jobs", "sweep")}
    problems = Problems()
    wanted: list[dict[str, Any]] = [dict(job) for job in options.jobs] or [{}]
    count = len(wanted) * math.prod(max(1, len(values)) for values in options.sweep.values())
    if count > MOST_JOBS:
        raise ConfigError(
            f"the run asks for {count:,} jobs; at most {MOST_JOBS} share a base at once: sweep fewer values"
        )
    found: dict[str, TrainOptions] = {}
    for number, job in enumerate(wanted):
        _check_keys(job, f"jobs[{number}]", options.sweep, problems)
        for variant in _combinations(options.sweep, problems):
            values = {**common, **job, **variant}
            name = _name(options, job, variant, number)
            place = f"jobs[{number}]: " if options.jobs else ""
            twin = _twin(name, found)
            if twin is not None:
                why = "" if twin == name else f' ("{twin}" is the same folder where case does not count)'
                problems.add(f'{place}the name "{name}" is taken by an earlier job{why}; give each job its own')
                continue
            try:
                check_name(name)
                found[name] = TrainOptions(**{**values, "name": name})
            except AdapterError as error:
                problems.add(f"{place}name: {error}")
            except VeneerError as error:
                _add_once(problems, f"{place}{str(error).removeprefix('TrainOptions cannot be made: ')}")
    if files:
        _check_files(found, problems)
    problems.raise_if_any(ConfigError, "the jobs cannot be made" if len(wanted) > 1 else "the run cannot be made")
    return found


def _add_once(problems: Problems, text: str) -> None:
    """Variants of a sweep make the same mistake many times."""
    if text not in list(problems):
        problems.add(text)


def _check_keys(job: Mapping[str, Any], place: str, sweep: Mapping[str, Any], problems: Problems) -> None:
    known = [name for name in TrainOptions.model_fields if name not in SHARED]
    for key in job:
        if key in SHARED:
            problems.add(f"{place}: {key} belongs to the whole run; give it beside jobs, not inside")
        elif key not in known:
            problems.add(f"{place}: there is no option {key!r}{near_miss(key, known)}")
        elif key in sweep:
            problems.add(f"{place}: {key} is swept, so a job cannot have its own; give the one that is meant")


def _combinations(sweep: Mapping[str, Any], problems: Problems) -> list[dict[str, Any]]:
    for key, values in sweep.items():
        if key in SHARED or key == "name" or key not in TrainOptions.model_fields or not values:
            _add_once(problems, f"sweep: {key} cannot be swept; give options of a job, each with a list of values")
    found: list[dict[str, Any]] = []
    for values in itertools.product(*sweep.values()):
        variant = dict(zip(sweep, values, strict=True))
        if variant.get("method") == "full":  # which has no rank: once is enough
            variant = {key: value for key, value in variant.items() if key not in _LOW_RANK}
            if variant in found:
                continue
        found.append(variant)
    return found


def _twin(name: str, found: Mapping[str, Any]) -> str | None:
    """The job that would write to the same folder; some file systems take a and A for the same."""
    return next((other for other in found if other.casefold() == name.casefold()), None)


def _name(options: TrainOptions, job: Mapping[str, Any], variant: Mapping[str, Any], number: int) -> str:
    own = job.get("name")
    base = (
        str(own) if own is not None else (options.name or (options.out.name if options.out is not None else "adapter"))
    )
    if own is None and options.jobs:
        base = f"job-{number + 1}"
    return "-".join([base, *(f"{key}_{_word(value)}" for key, value in variant.items())])


def _word(value: Any) -> str:
    """A swept value as it can stand in a name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "none"


def _check_files(jobs: Mapping[str, TrainOptions], problems: Problems) -> None:
    """Name every file of examples that is not there, before a base is loaded for it."""
    several = len(jobs) > 1
    missing: dict[Path, str] = {}
    for name, options in jobs.items():
        for key in ("data", "valid"):
            for path in getattr(options, key):
                if not path.is_file() and not path.is_dir():
                    missing.setdefault(path, f'job "{name}": {key}' if several else key)
    for path, place in missing.items():
        problems.add(f"{place}: there is no file {path}{near_file(path)}")
