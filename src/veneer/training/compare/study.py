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
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from veneer._files import replace_text
from veneer.adapters import Bank, Route
from veneer.adapters.methods import has_option
from veneer.adapters.sequence import lengthen, running
from veneer.checkpoints import attach
from veneer.checkpoints.locate import trained
from veneer.config import TrainOptions, given
from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.data.rows.readers import RecordReader
from veneer.errors import ConfigError
from veneer.evaluate.general import general_text, pieces
from veneer.evaluate.losses import example_losses, t95
from veneer.evaluate.predictions import predict
from veneer.evaluate.scores import score_values
from veneer.models.classifiers.heads import HEADS
from veneer.models.fast_modules import fast_modules
from veneer.models.flat import FlatRunner
from veneer.models.load import Base, load_base
from veneer.training.cpp_kernels import cpp_kernels
from veneer.training.loop.step import Stepper
from veneer.training.process_memory import give_back, peak_of, resident
from veneer.training.run.console import Console
from veneer.training.run.jobs import number_of_steps
from veneer.training.run.result import JobResult
from veneer.training.run.run import train
from veneer.training.run.setup import context_of, default_rate, files_of, load_data, load_labelled, training_classes

RESULT = "compare.json"
FACTORS = (0.3, 1.0, 3.0)
"""Learning rates that are tried by default, relative to the method's default."""
_WIDEN, _WIDENINGS = 3.0, 3
"""A best rate at the edge of the default ones is multiplied or divided by the first, at most so many times."""
_REPEATS = 5
_EVALUATIONS = 4
"""Evaluations of a job on the held-out rows, if ``eval_every`` does not say otherwise: each takes as long as the rows' part of an epoch."""


@dataclass(frozen=True)
class Contestant:
    """A method with its options, such as ``lora r=16``; ``options`` differ between the contestants."""

    label: str
    options: Mapping[str, Any]


@dataclass
class Score:
    """Mean over seeds with a 95 % interval (Student's t; none for one seed)."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        """The score of one value per seed."""
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean, None, None)
        half = t95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)


@dataclass
class ContestantRow:
    """The measurements of a contestant. Losses in nats per token (of heads: per text), times in milliseconds, sizes in bytes.

    Attributes:
        parameters: trainable parameters without those of a head, which are ``head_parameters``.
        rates: held-out loss by learning rate, from the search.
        best, last: loss on the test rows at the step with the lowest held-out loss, and at the last step.
        scores_best, scores_last: scores of a head on the test rows at the same steps, by metric; empty without a head.
        forgetting: increase of the loss on a general text, at the best step; None with a head.
        step_ms, step_bytes: forward and backward of one pass of test rows; memory that it adds, with optimizer state.
        latency_ms: what the adapter adds to a forward of one row when it is not merged. Merged, it adds nothing.
    """

    label: str
    method: str
    r: int | None
    parameters: int
    learning_rate: float
    rates: dict[float, float]
    seeds: list[int]
    best: Score
    last: Score
    forgetting: Score | None
    step_ms: float
    step_bytes: int
    latency_ms: float
    disk_bytes: int
    head_parameters: int = 0
    scores_best: dict[str, Score] = field(default_factory=dict)
    scores_last: dict[str, Score] = field(default_factory=dict)


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
        ConfigError: there is nothing to compare, or no held-out rows to search with.
    """
    console = console or Console()
    contestants = contestants_of(options)
    out = Path(options.out or Path("runs") / "compare")
    base = load_base(options.base, dtype=options.dtype, revision=options.revision, task=options.task)
    rates = options.sweep.get("learning_rate") or ([options.learning_rate] if options.learning_rate else None)
    console.line(f"search: {len(contestants)} contestants at {len(rates or FACTORS)} learning rates")
    searched = train(
        _run_options(options, out / "search", _search_jobs(contestants, rates, seeds[0], base)),
        base=base,
        console=console,
    ).jobs
    for number in range(0 if rates else _WIDENINGS):
        further = _further_jobs(contestants, searched, seeds[0])
        if not further:
            break
        console.line(f"search: {len(further)} contestants are best at the edge of their rates; trying the next one")
        more = train(_run_options(options, out / f"search-{number + 2}", further), base=base, console=console)
        searched = {**searched, **more.jobs}
    chosen = {one.label: _best_rate(one, searched) for one in contestants}
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
    if any({"learning_rate", "seed", "data"} & one.options.keys() for one in found):
        raise ConfigError(
            "a comparison searches the learning rate and shares seeds and data; leave them out of its jobs"
        )
    return found


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
    contestants: Sequence[Contestant], rates: Sequence[float] | None, seed: int, base: Base
) -> list[dict[str, Any]]:
    jobs = []
    for one in contestants:
        usual = default_rate(base, str(one.options.get("method", "lora")))
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
    """The job of a contestant with the lowest held-out loss."""
    tried = _tried(one, jobs)
    return min(tried, key=_lowest)


def _tried(one: Contestant, jobs: Mapping[str, JobResult]) -> list[JobResult]:
    return [job for name, job in jobs.items() if name.rpartition("-rate")[0] == _slug(one)]


def _lowest(job: JobResult) -> float:
    return min((loss for _, loss in job.losses if math.isfinite(loss)), default=math.inf)


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
            comparison = Comparison(
                out,
                base.name,
                None if heads else example_losses(runner, examples).mean,
                None if heads else example_losses(runner, general).mean,
                {"test": len(examples)},
            )
            for one in contestants:
                jobs = [results[one.label, seed] for seed in seeds]
                comparison.rows.append(
                    _row(one, jobs, seeds, _tried(one, searched), bank, runner, examples, general, comparison)
                )
        finally:
            bank.detach()
    return comparison


def _row(
    one: Contestant,
    jobs: Sequence[JobResult],
    seeds: Sequence[int],
    tried: Sequence[JobResult],
    bank: Bank,
    runner: FlatRunner,
    examples: Sequence[Example],
    general: Sequence[Example],
    base: Comparison,
) -> ContestantRow:
    best, last, forgetting = [], [], []
    scores: dict[str, list[dict[str, float]]] = {"best": [], "last": []}
    for job in jobs:
        folder = job.best if job.best.is_dir() else job.adapter
        with _loaded(bank, folder):
            found = _tested(runner, bank, examples)
            if base.base_general is not None:
                forgetting.append(example_losses(runner, general, bank=bank, route="best").mean - base.base_general)
        best.append(found[0])
        scores["best"].append(found[1])
        if trained(folder)[0] != trained(job.adapter)[0]:  # else the best step is the last one
            with _loaded(bank, job.adapter):
                found = _tested(runner, bank, examples)
        last.append(found[0])
        scores["last"].append(found[1])
    with _loaded(bank, jobs[0].adapter):
        own = [layer for layer in bank.survey.head if layer in bank["best"].overrides]
        head = sum(value.numel() for layer in own for value in bank["best"].overrides[layer].values())
        parameters = bank["best"].num_parameters() - head
        step_ms, step_bytes = _step(runner, bank, examples)
        bank["best"].requires_grad_(False)  # as it is served: what a frozen adapter needs is computed once
        latency = _added_ms(runner, bank, examples[0])
    return ContestantRow(
        label=one.label,
        method=jobs[0].method,
        r=jobs[0].r if has_option(jobs[0].method, "r") else None,
        parameters=parameters,
        learning_rate=jobs[0].learning_rate,
        rates={job.learning_rate: _lowest(job) for job in tried},
        seeds=list(seeds),
        best=Score.of(best),
        last=Score.of(last),
        forgetting=Score.of(forgetting) if forgetting else None,
        step_ms=step_ms,
        step_bytes=step_bytes + 8 * (parameters + head),
        latency_ms=latency,
        disk_bytes=sum(file.stat().st_size for file in jobs[0].adapter.iterdir() if file.is_file()),
        head_parameters=head,
        scores_best=_over_seeds(scores["best"]),
        scores_last=_over_seeds(scores["last"]),
    )


def _tested(runner: FlatRunner, bank: Bank, examples: Sequence[Example]) -> tuple[float, dict[str, float]]:
    """(mean loss on the examples, scores of the adapter's head, empty without one), of one pass over them."""
    if not examples[0].labels:
        return example_losses(runner, examples, bank=bank, route="best").mean, {}
    found = predict(runner, examples, bank=bank, route="best")
    task = "regression" if found.logits_KL.shape[1] == 1 else "classification"
    return float(found.losses_K.double().mean()), score_values(task, found.values_K.tolist(), found.targets_K.tolist())


def _over_seeds(found: Sequence[dict[str, float]]) -> dict[str, Score]:
    return {name: Score.of([values[name] for values in found]) for name in found[0]}


class _loaded:
    """An adapter in the bank, under the name "best", inside this context."""

    def __init__(self, bank: Bank, folder: Path) -> None:
        self.bank, self.folder = bank, folder

    def __enter__(self) -> None:
        self.bank.load(self.folder, "best")

    def __exit__(self, *error: object) -> None:
        self.bank.remove("best")


def _step(runner: FlatRunner, bank: Bank, examples: Sequence[Example]) -> tuple[float, int]:
    """(milliseconds, bytes) of a forward and backward pass over at most 1,024 tokens of the examples."""
    chosen: list[Example] = []
    used = 0
    for example in examples:
        if chosen and used + len(example) > 1024:
            break
        chosen.append(example)
        used += len(example)
    batch, stepper = make_batch(chosen, "best"), Stepper(runner, bank)
    times: list[float] = []
    most = 0
    for repeat in range(_REPEATS):
        for parameter in bank.parameters("best"):
            parameter.grad = None
        if not repeat:
            give_back()  # memory that earlier passes left would hide what the first one takes
        before, start = resident(), time.perf_counter()
        with peak_of() as peak:
            stepper.forward_backward(batch)
        times.append(1e3 * (time.perf_counter() - start))
        most = max(most, peak.bytes - before)
    return statistics.median(times), most


def _added_ms(runner: FlatRunner, bank: Bank, example: Example) -> float:
    """Milliseconds that the adapter adds to a forward of one example; the base and the adapter take turns."""
    batch = make_batch([example], "best")
    times: dict[str | None, list[float]] = {}
    with torch.no_grad():
        for _ in range(3 * _REPEATS):
            for route in (None, "best"):
                longer, prefix = lengthen(bank, batch, [*Route.parse(route).mixes])
                keep = torch.tensor([longer.tokens - 1])
                cells = runner.head_cells(longer, keep)
                with running(runner, prefix), bank.use(route, keep=cells, training=False):
                    start = time.perf_counter()
                    runner.logits(longer, keep)
                    times.setdefault(route, []).append(1e3 * (time.perf_counter() - start))
    base, adapter = (statistics.median(taken[2:]) for taken in times.values())  # the first two warm up
    return adapter - base
