"""The jobs of a run: ``jobs`` overrides the common options for each, and lists in ``sweep`` are tried in every combination.

r: 16
jobs:
  - {name: sql, data: sql.jsonl}
  - {name: style, data: style.jsonl, method: dora, lora_dropout: 0.05}

sweep: {r: [4, 16, 64], learning_rate: [1e-4, 5e-4]}

A list in place of a single value is a sweep too: ``r: [4, 16, 64]``.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.adapters.adapter import check_name
from veneer.adapters.methods import METHODS, has_option
from veneer.config import PER_RUN_OPTIONS, TrainOptions, current_names, given, near_miss, plain, resolve
from veneer.data.example import Example
from veneer.data.rows.hub_sets import hub_set
from veneer.data.rows.readers import near_file
from veneer.errors import AdapterError, ConfigError, DataError, Problems, VeneerError, listed
from veneer.training.loop.job import Job, JobState
from veneer.training.loop.schedule import learning_rate_at
from veneer.training.run.run_folder import CONFIG

MOST_JOBS = 256

_FORMER_DEFAULTS = {"schedule": "constant"}
"""Defaults of earlier versions: a run that began with one goes on with it if the option is left out."""

_MAY_CHANGE = (
    *("out", "name", "data", "valid", "threads", "save_every", "checkpoint_minutes", "track", "jobs", "sweep"),
    *("plan", "activation_checkpointing", "steps", "epochs", "samples", "sample_prompts", "sample_tokens"),
    *("device", "processes"),
    *("shard", "sequence_parallel"),
    *("cluster", "answer_minutes"),
)
"""Options that may differ when a run resumes: they do not change its numbers, or are compared later (data, threads, device,
processes and sequence_parallel with the manifest, steps and epochs with the steps that the run had)."""


def expand(options: TrainOptions, *, files: bool = True) -> dict[str, TrainOptions]:
    """The options of each job by name; one job if neither ``jobs`` nor ``sweep`` is given.

    Args:
        options: the options of the run.
        files: check that the files of examples exist.

    Raises:
        ConfigError: lists all invalid or repeated names, options that a job cannot set, and missing files; or there are too many jobs.
    """
    common: dict[str, Any] = {key: value for key, value in given(options).items() if key not in ("jobs", "sweep")}
    problems = Problems()
    jobs: list[dict[str, Any]] = [current_names(TrainOptions, job) for job in options.jobs]
    jobs = jobs or [{}]
    count = len(jobs) * math.prod(max(1, len(values)) for values in options.sweep.values())
    if count > MOST_JOBS:
        raise ConfigError(
            f"the run asks for {count:,} jobs; at most {MOST_JOBS} can share a base, so sweep fewer values"
        )
    found: dict[str, TrainOptions] = {}
    for number, job in enumerate(jobs):
        _check_keys(job, f"jobs[{number}]", options.sweep, problems)
        for variant in _combinations(options.sweep, problems):
            # Options of the whole run are problems already.
            allowed = {key: value for key, value in job.items() if key not in PER_RUN_OPTIONS}
            values = {**common, **allowed, **variant}
            name = _name(options, job, variant, number)
            place = f"jobs[{number}]: " if options.jobs else ""
            twin = next((other for other in found if other.casefold() == name.casefold()), None)
            if twin is not None:
                why = "" if twin == name else f' ("{twin}" is the same folder where case does not count)'
                problems.add(f'{place}the name "{name}" is taken by an earlier job{why}; give each job its own name')
                continue
            try:
                check_name(name)
                found[name] = TrainOptions(**{**values, "name": name})
            except AdapterError as error:
                problems.add(f"{place}name: {error}")
            except VeneerError as error:
                _add_once(problems, f"{place}{str(error).removeprefix('invalid TrainOptions: ')}")
    if files:
        _check_files(found, problems)
    problems.raise_if_any(ConfigError, "invalid jobs" if len(jobs) > 1 else "invalid run")
    return found


def with_former_defaults(out: Path, options: TrainOptions) -> TrainOptions:
    """``options`` for the run in a folder: those that were left out, and had another default when it began, as it began."""
    stored, _ = resolve(TrainOptions, out / CONFIG)
    kept = {
        key: value
        for key, value in _FORMER_DEFAULTS.items()
        if key not in options.model_fields_set and getattr(stored, key) == value
    }
    return TrainOptions(**{**given(options), **kept}) if kept else options


def match_stored_run(
    out: Path, jobs: dict[str, TrainOptions]
) -> tuple[dict[str, TrainOptions], dict[str, TrainOptions]]:
    """The jobs and the stored ones, if a folder holds a run with the same options, or with several jobs of which it has some already.

    Raises ConfigError with the differences if the folder holds another run.
    """
    stored, _ = resolve(TrainOptions, out / CONFIG)
    before = expand(stored, files=False)
    if len(before) == len(jobs) == 1:
        jobs = dict(zip(before, jobs.values(), strict=True))  # a job keeps its name if its folder is moved
    differences: dict[str, None] = {}
    for name, options in before.items():
        if name not in jobs:
            differences[f'job "{name}" is only in the folder'] = None
            continue
        there, here = plain(options), plain(jobs[name])
        fixed = {*there, *here} - {*_MAY_CHANGE} | ({"steps", "epochs"} if stored.halving else set())
        for key in sorted(key for key in fixed if there.get(key) != here.get(key)):
            differences[f"{key}: {there.get(key)!r} in the folder, {here.get(key)!r} now"] = None
    added = [name for name in jobs if name not in before]
    if added and (len(before) == 1 or stored.halving):
        differences[f'job "{added[0]}" is not in the folder'] = None
    if differences:
        raise ConfigError(
            f"{out} holds a run with other options ({', '.join(differences)}); choose another folder with --out, or start over with "
            "--fresh"
        )
    return jobs, before


def number_of_steps(options: TrainOptions, examples: int) -> int:
    """The optimizer steps of a job with so many training examples."""
    return options.steps or max(1, math.ceil(examples / options.batch_size * (options.epochs or 1)))


def check_steps(out: Path, stored: Mapping[str, TrainOptions], jobs: Iterable[Job]) -> dict[str, int]:
    """Compare the steps of jobs with those that they had when their run last started.

    Returns:
        {job: the number of steps that it had} for each job that has more now.

    Raises:
        ConfigError: a job has fewer than before.
    """
    before = {job.name: number_of_steps(stored[job.name], len(job.examples)) for job in jobs if job.name in stored}
    for job in jobs:
        had = before.get(job.name, 0)
        if job.steps < had:
            raise ConfigError(
                f"{out} holds a run of {had:,} steps, and this command asks for {job.steps:,}; ask for {had:,} or more, choose another "
                "folder with --out, or start over with --fresh"
            )
    return {job.name: before[job.name] for job in jobs if job.steps > before.get(job.name, job.steps)}


def go_on(job: Job, had: int, out: Path) -> str:
    """Let a finished job take the steps that it has beyond the ``had`` ones; returns what that does to its learning rate."""
    if job.state is JobState.FINISHED and not job.code:
        job.state = JobState.RUNNING
    first = f"{job.name}: {had:,} steps become {job.steps:,}"
    schedule, warmup = job.options.schedule, job.options.warmup_steps
    if schedule == "constant":
        return f"{first}; the learning rate goes on at {job.peak:.2e}"
    step = min(job.progress.step, had - 1)
    rate = learning_rate_at(step, peak=job.peak, schedule=schedule, warmup=warmup, steps=had)
    now, before = f"{job.learning_rate():.2e}", f"{rate:.2e}"
    changed = "" if now == before else f" in place of {before}"
    return (
        f"{first}; the {schedule} schedule now decays to the new end, so the learning rate "
        f"goes on at {now}{changed}; for a warm-up and a decay of their own, train with --init-from {out} and another --out"
    )


def _add_once(problems: Problems, text: str) -> None:
    """Add a problem that several variants of a sweep may have."""
    if text not in list(problems):
        problems.add(text)


def _check_keys(job: Iterable[str], place: str, sweep: Mapping[str, Any], problems: Problems) -> None:
    known = [name for name in TrainOptions.model_fields if name not in PER_RUN_OPTIONS]
    for key in job:
        if key in PER_RUN_OPTIONS:
            problems.add(f"{place}: {key} is an option of the whole run; move it out of jobs")
        elif key not in known:
            problems.add(f"{place}: unknown option {key!r}{near_miss(key, known)}")
        elif key in sweep:
            problems.add(f"{place}: {key} is also swept; give only one of them")


def _combinations(sweep: Mapping[str, Any], problems: Problems) -> list[dict[str, Any]]:
    for key, values in sweep.items():
        if key in (*PER_RUN_OPTIONS, "name") or key not in TrainOptions.model_fields or not values:
            _add_once(problems, f"sweep: {key} cannot be swept; give options of a job, each with a list of values")
    found: list[dict[str, Any]] = []
    for values in itertools.product(*sweep.values()):
        variant = dict(zip(sweep, values, strict=True))
        if variant.get("method") in METHODS:  # without options that it lacks, such as a rank, it is tried once
            variant = {key: value for key, value in variant.items() if has_option(variant["method"], key)}
        if variant not in found:
            found.append(variant)
    return found


def _name(options: TrainOptions, job: Mapping[str, Any], variant: Mapping[str, Any], number: int) -> str:
    if job.get("name") is not None:
        stem = str(job["name"])
    elif options.jobs:
        stem = f"job-{number + 1}"
    else:
        stem = options.name or (options.out.name if options.out is not None else "adapter")
    return "-".join([stem, *(f"{key}_{_word(value)}" for key, value in variant.items())])


def _word(value: Any) -> str:
    """A swept value as part of a name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "none"


def _check_files(jobs: Mapping[str, TrainOptions], problems: Problems) -> None:
    """Report all missing files of examples, before a base is loaded."""
    missing: dict[Path, str] = {}
    for name, options in jobs.items():
        for key in ("data", "valid"):
            for path in getattr(options, key):
                if not path.is_file() and not path.is_dir() and hub_set(path) is None:
                    missing.setdefault(path, f'job "{name}": {key}' if len(jobs) > 1 else key)
    for path, place in missing.items():
        problems.add(f"{place}: there is no file {path}{near_file(path)}")


def check_tokens(tokens: Sequence[int], examples: Sequence[Example], tokenizer: Any) -> None:
    """Raise DataError for trainable tokens that no example contains, whose rows would be saved without training."""
    missing = set(tokens)
    for example in examples if missing else ():
        missing.difference_update(example.ids)
        if not missing:
            return
    if missing:
        shown = listed(f"{token} ({tokenizer.convert_ids_to_tokens(token)!r})" for token in sorted(missing))
        raise DataError(
            f"trainable_token_indices: no example contains the token{'s' if len(missing) > 1 else ''} {shown}"
            f", so their rows cannot be learnt; leave them out, or see how "
            "the rows are encoded (veneer data show FILE --ids): control tokens typed in a conversation stay text"
        )
