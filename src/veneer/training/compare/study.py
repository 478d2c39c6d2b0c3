"""Train contestants with searched learning rates over several seeds, and measure each on test rows that the search never reads.

    search    every contestant at every learning rate, with the first seed; the lowest held-out loss selects the rate. While the best
              rate is the highest or the lowest one tried, the next rate in that direction is tried (not if the rates were given)
    seeds     every contestant at its rate, with the other seeds
    measure   loss on the test rows at the best and the last step, forgetting, time and memory of a pass, latency, size on disk

Search and seeds are ordinary runs below ``out``, so the same call resumes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from veneer._files import replace_text
from veneer.adapters.methods import has_option
from veneer.checkpoints import attach
from veneer.config import TrainOptions, given
from veneer.data.rows.readers import RecordReader
from veneer.errors import ConfigError, Problems, TrainingError, listed
from veneer.evaluate.general import general_text, pieces
from veneer.models.classifiers.heads import HEADS
from veneer.models.fast_modules import fast_modules
from veneer.models.flat import FlatRunner
from veneer.models.load import Base
from veneer.training.compare.measure import ContestantRow, TestSet, measured
from veneer.training.cpp_kernels import cpp_kernels
from veneer.training.run.console import Console
from veneer.training.run.jobs import number_of_steps
from veneer.training.run.result import JobResult
from veneer.training.run.run import train
from veneer.training.run.setup import (
    context_of,
    default_rate,
    files_of,
    load_base_of,
    load_data,
    load_labelled,
    training_classes,
)
from veneer.training.tasks import task_of

RESULT = "compare.json"
FACTORS = (0.3, 1.0, 3.0)
"""Learning rates that are tried by default, relative to the method's default."""
_WIDEN, _WIDENINGS = 3.0, 3
"""A best rate at the edge of the default ones is multiplied or divided by the first, at most so many times."""
_EVALUATIONS = 4
"""Evaluations of a job on the held-out rows, if ``eval_every`` does not say otherwise: each takes as long as the rows' part of an epoch."""
_SHARED = {"data", "valid", "valid_fraction", "task", "chat_template"}
"""Options that all contestants share, so that the test rows are the same for each."""


@dataclass(frozen=True)
class Contestant:
    """A method with its options, such as ``lora r=16``; ``options`` differ between the contestants."""

    label: str
    options: Mapping[str, Any]


@dataclass
class Comparison:
    """The result of `compare`: one row per contestant, the lowest test loss first, and the base's own losses (None with heads)."""

    out: Path
    base: str
    base_loss: float | None
    base_general: float | None
    examples: Mapping[str, int]
    rows: list[ContestantRow] = field(default_factory=list)


def compare(options: TrainOptions, test: Path, *, seeds: Sequence[int], console: Console | None = None) -> Comparison:
    """Compare the contestants that the sweep or the jobs in ``options`` describe.

    Args:
        options: options of the runs. Its sweep's ``learning_rate`` is searched (default: ``FACTORS`` times the method's default), and
            one that is given alone is taken; every other swept option makes contestants. Without one, each of its jobs is a contestant, by
            its name.
        test: a file of rows that neither training nor the search reads.
        seeds: random seeds; the first is the search's.
        console: prints the progress.

    Raises:
        ConfigError: there is nothing to compare, no held-out rows to search with, or an option that a comparison cannot take.
        TrainingError: no job of a contestant finished its training.
    """
    console = console or Console()
    contestants = contestants_of(options)
    out = Path(options.out or Path("runs") / "compare")
    _check(options, contestants)
    base = load_base_of(options, options.task)
    rates = options.sweep.get("learning_rate") or ([options.learning_rate] if options.learning_rate else None)
    console.line(f"search: {len(contestants)} contestants at {len(rates or FACTORS)} learning rates")
    searched = train(
        _run_options(options, out / "search", _search_jobs(contestants, rates, options, seeds[0], base)),
        base=base,
        console=console,
    ).jobs
    for number in range(0 if rates else _WIDENINGS):
        further = _further_jobs(contestants, searched, seeds[0])
        if not further:
            break
        names = listed([one["name"].rpartition("-rate")[0] for one in further], 4)
        console.line(f"search: the best rate is the edge of those tried, so the next one is tried: {names}")
        more = train(_run_options(options, out / f"search-{number + 2}", further), base=base, console=console)
        searched = {**searched, **more.jobs}
    chosen = {one.label: _best_rate(one, searched) for one in contestants}
    _require_finished(chosen.values())
    results = {(one.label, seeds[0]): chosen[one.label] for one in contestants}
    if len(seeds) > 1:
        jobs = [
            {
                **one.options,
                "name": f"{_slug(one)}-seed{seed}",
                "learning_rate": chosen[one.label].learning_rate,
                "seed": seed,
            }
            for one in contestants
            for seed in seeds[1:]
        ]
        console.line(f"seeds: {len(jobs)} jobs at the rates that the search found")
        more = train(_run_options(options, out / "seeds", jobs), base=base, console=console)
        results |= {
            (one.label, seed): more.jobs[f"{_slug(one)}-seed{seed}"] for one in contestants for seed in seeds[1:]
        }
        _require_finished(results.values())
    console.line(f"measuring on {test}")
    comparison = _measure(options, base, test, contestants, searched, results, seeds, out)
    comparison.rows.sort(key=lambda row: row.best.mean)
    replace_text(out / RESULT, json.dumps(as_dict(comparison), indent=2) + "\n")
    return comparison


def contestants_of(options: TrainOptions) -> list[Contestant]:
    """The contestants: the jobs, by their names, or every combination of a sweep's options except the learning rate; full fine-tuning has
    no rank."""
    axes = {key: values for key, values in options.sweep.items() if key not in ("learning_rate", "seed")}
    if options.jobs and axes:
        raise ConfigError(f"jobs and lists of values for {', '.join(axes)} are both given; give only one of them")
    if not options.valid and not options.valid_fraction:
        raise ConfigError("the search of learning rates needs held-out rows; give --valid FILE or --valid-fraction 0.1")
    if options.jobs:
        return _named_contestants(options.jobs)
    combinations: list[dict[str, Any]] = [{}]
    for key, values in axes.items():
        combinations = [{**one, key: value} for one in combinations for value in values]
    found: dict[str, Contestant] = {}
    for one in combinations:
        method = one.get("method", options.method)
        one = {key: value for key, value in one.items() if has_option(method, key)}
        rank = f" r={one.get('r', options.r)}" if has_option(method, "r") else ""
        others = "".join(f" {key}={value}" for key, value in one.items() if key not in ("method", "r"))
        label = f"{method}{rank}{others}"
        found.setdefault(label, Contestant(label, one))
    if len(found) < 2:
        raise ConfigError(
            "one contestant cannot be compared; give lists of values, such as --method lora,dora,full or --r 4,16"
        )
    return list(found.values())


def _named_contestants(jobs: Sequence[Mapping[str, Any]]) -> list[Contestant]:
    """The jobs of a configuration as contestants."""
    found = [
        Contestant(
            str(job.get("name", f"job {number + 1}")), {key: value for key, value in job.items() if key != "name"}
        )
        for number, job in enumerate(jobs)
    ]
    if len(found) < 2 or len({_slug(one) for one in found}) < len(found):
        raise ConfigError("the jobs of a comparison need names of their own, and there must be two or more")
    if any({"learning_rate", "seed"} & one.options.keys() for one in found):
        raise ConfigError("a comparison searches the learning rate and shares seeds; leave them out of its jobs")
    return found


def _check(options: TrainOptions, contestants: Sequence[Contestant]) -> None:
    """Raise ConfigError for options that a comparison cannot take."""
    problems = Problems()
    varied = {key for one in contestants for key in one.options}
    for key in sorted(_SHARED & varied):
        problems.add(f"{key}: all contestants share it; give one value")
    if options.on_top_of or "on_top_of" in varied:
        problems.add("on_top_of: each adapter is measured alone; leave it out")
    if options.halving:
        problems.add("halving: it stops jobs before their rates can be compared; leave it out")
    if options.calibrate:
        problems.add("calibrate: write the base with veneer quantize BASE --calibrate ROWS, and compare on that folder")
    if options.processes > 1 or options.cluster is not None:
        problems.add(
            f"{'cluster' if options.cluster is not None else 'processes'}: a comparison runs in one process; leave it out"
        )
    problems.raise_if_any(ConfigError, "compare")


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """The result as plain data."""
    found = asdict(comparison)
    found["out"] = str(comparison.out)
    for row in found["rows"]:
        row["rates"] = [[rate, loss if math.isfinite(loss) else None] for rate, loss in row["rates"].items()]
    return found


# Runs


def _run_options(options: TrainOptions, out: Path, jobs: list[dict[str, Any]]) -> TrainOptions:
    common = {
        key: value
        for key, value in given(options).items()
        if key not in ("sweep", "jobs", "out", "name", "seed", "learning_rate")
    }
    if options.eval_every is None:
        common["eval_every"] = math.ceil(_steps(options) / _EVALUATIONS)
    return TrainOptions(**{**common, "out": out, "jobs": jobs})


def _steps(options: TrainOptions) -> int:
    """The optimizer steps of a job, by the number of rows in the files."""
    rows = 0 if options.steps else sum(1 for path in files_of(options)[0] for _ in RecordReader(path))
    return number_of_steps(options, round(rows * (1 - options.valid_fraction)))


def _search_jobs(
    contestants: Sequence[Contestant], rates: Sequence[float] | None, options: TrainOptions, seed: int, base: Base
) -> list[dict[str, Any]]:
    jobs = []
    for one in contestants:
        usual = default_rate(base, str(one.options.get("method", options.method)), options.task)
        for number, rate in enumerate(rates or [factor * usual for factor in FACTORS]):
            jobs.append(
                {**one.options, "name": f"{_slug(one)}-rate{number + 1}", "learning_rate": float(rate), "seed": seed}
            )
    return jobs


def _further_jobs(contestants: Sequence[Contestant], jobs: Mapping[str, JobResult], seed: int) -> list[dict[str, Any]]:
    """One job for each contestant whose best rate is the highest or the lowest one tried: at the next rate in that direction."""
    further = []
    for one in contestants:
        best, tried = _best_rate(one, jobs).learning_rate, [job.learning_rate for job in _tried(one, jobs)]
        if best in (min(tried), max(tried)):
            rate = best * _WIDEN if best == max(tried) else best / _WIDEN
            name = f"{_slug(one)}-rate{len(tried) + 1}"
            further.append({**one.options, "name": name, "learning_rate": rate, "seed": seed})
    return further


def _best_rate(one: Contestant, jobs: Mapping[str, JobResult]) -> JobResult:
    """The job of a contestant with the lowest held-out loss; one that failed only if all did."""
    return min(_tried(one, jobs), key=lambda job: (job.state != "finished", job.best_loss))


def _require_finished(jobs: Iterable[JobResult]) -> None:
    """Raise TrainingError for jobs that are to be measured and have no adapter."""
    problems = Problems()
    for job in jobs:
        if job.state != "finished":
            problems.add(f"{job.name} {job.state} at learning rate {job.learning_rate:.1e}: {job.reason}")
    problems.raise_if_any(TrainingError, "contestants cannot be measured; leave them out, or give other rates")


def _tried(one: Contestant, jobs: Mapping[str, JobResult]) -> list[JobResult]:
    return [job for name, job in jobs.items() if name.rpartition("-rate")[0] == _slug(one)]


def _slug(one: Contestant) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in one.label)


# Measurements


def _measure(
    options: TrainOptions,
    base: Base,
    test: Path,
    contestants: Sequence[Contestant],
    searched: Mapping[str, JobResult],
    results: Mapping[tuple[str, int], JobResult],
    seeds: Sequence[int],
    out: Path,
) -> Comparison:
    rows_of = options.model_copy(update={"data": (test,), "valid": (), "valid_fraction": 0.0, "watch_general": False})
    heads = options.task in HEADS
    length = min(context_of(base), options.max_length or context_of(base))
    if heads:
        examples = list(load_labelled(rows_of, base, length, training_classes(options)).train)
    else:
        examples = list(load_data(rows_of, base, context_of(base)).train)
    general = [] if heads else pieces(general_text(), base.tokenizer, count=32)
    bank = attach(base.model)
    with cpp_kernels(options.compile, next(base.model.parameters()).device, lambda _: None), fast_modules(base.model):
        try:
            runner = FlatRunner(base.model)
            task = task_of(options)
            task.longest = length
            tested = TestSet.of(runner, task, examples, general)
            comparison = Comparison(out, base.name, tested.base_loss, tested.base_general, {"test": len(examples)})
            for one in contestants:
                jobs = [results[one.label, seed] for seed in seeds]
                comparison.rows.append(measured(one.label, jobs, seeds, _tried(one, searched), bank, runner, tested))
        finally:
            bank.detach()
    return comparison
