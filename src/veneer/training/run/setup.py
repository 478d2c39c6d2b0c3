"""Set up a run in memory: load the base, read and check the data, add the adapters, make the jobs.

Everything that can be refused before the first step is refused here: rows that cannot be used, have nothing to learn or are longer than
the context, targets that match nothing, a base that cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from veneer._terminal import counted
from veneer._version import __version__
from veneer.adapters import METHODS, Bank, Method
from veneer.adapters.methods import OPTIONS, LowRankMethod
from veneer.checkpoints import attach
from veneer.checkpoints.peft.portable import remarks
from veneer.checkpoints.receipt import trained_tokens
from veneer.config import DataOptions, TrainOptions, default_learning_rate
from veneer.data.chat.render import Renderer, RenderOptions
from veneer.data.chat.stops import other_ends, taught_stops
from veneer.data.chat.template import read_template
from veneer.data.check import CheckReport, RowChecks, warning_lines
from veneer.data.dataset import Examples, LoadReport, Subset, load_examples
from veneer.data.example import Example
from veneer.data.hashing import data_hash, template_hash
from veneer.data.labelled import LABELLED_TASKS, LabelledRenderer
from veneer.data.labels import Classes, label_names
from veneer.data.rows.readers import splits
from veneer.data.rows.shapes import RowReader
from veneer.errors import BaseModelError, ConfigError, DataError
from veneer.evaluate.general import general_text, pieces
from veneer.models.classifiers.heads import HEADS, check_trainable
from veneer.models.devices import resolve_device
from veneer.models.divided.embedding_output import EmbeddingOutput
from veneer.models.divided.sharding import Shards
from veneer.models.fast_modules import fast_modules
from veneer.models.flat import FlatRunner
from veneer.models.load import Base, Divide, load_base, own_ends
from veneer.models.quantized.scheme import calibration_of
from veneer.models.quantized.size import parameter_count
from veneer.models.sources import read_config
from veneer.training.activation_checkpointing import layers_of
from veneer.training.cpp_kernels import cpp_kernels
from veneer.training.eva import explained
from veneer.training.loop.job import Job
from veneer.training.loop.step import Stepper
from veneer.training.loop.trainer import vocabulary_size
from veneer.training.run.jobs import check_tokens, number_of_steps
from veneer.training.run.parent_adapters import load_parents, seed_of, start_from_adapter
from veneer.training.shared_base import SharedBase
from veneer.training.tasks import TASKS, Task


@dataclass(frozen=True)
class JobData:
    """The examples of a job. ``remarks``: notes about the rows. ``template``: a chat template in place of the base's. ``stops``: the
    tokens that end the trained turns. ``classes``: those of the labels, none for numbers; None for rows without labels."""

    train: Examples | Subset
    held_out: list[Example]
    report: LoadReport
    data_hash: str
    template_hash: str
    general: list[Example] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    template: str | None = None
    stops: dict[str, int] = field(default_factory=dict)
    classes: Classes | None = None

    @property
    def outputs(self) -> int | None:
        """Number of outputs of the head that learns these examples; None without a head."""
        if self.classes is None:
            return None
        return len(self.classes) or 1


@dataclass(frozen=True)
class Setup:
    """A run in memory before its first step. ``data``: by job."""

    options: TrainOptions
    base: Base
    bank: Bank
    data: dict[str, JobData]
    jobs: list[Job]
    stepper: Stepper
    loads: bool = False
    """The run has loaded the base, and nothing else holds it."""
    shards: Shards | None = None
    """The base's weights, where several processes hold parts of them."""

    @property
    def device(self) -> torch.device:
        """The base's device."""
        return next(self.base.model.parameters()).device

    @property
    def calibration(self) -> dict[str, Any] | None:
        """The record of the examples that the base was calibrated on; None for any other base."""
        path = self.base.path
        return calibration_of(read_config(path)) if path is not None and (path / "config.json").is_file() else None

    def choices(self, job: Job) -> int | None:
        """The number of tokens or classes that a job's predictions choose from; None for numbers and preferences."""
        classes = self.data[job.name].classes
        if classes is not None:
            return len(classes) or None
        return getattr(getattr(self.base.model, "config", None), "vocab_size", None) if type(job.task) is Task else None

    def receipt_of(self, job: Job) -> dict[str, Any]:
        """The provenance stored in a job's adapter file."""
        data, evaluations = self.data[job.name], job.progress.evaluations
        return {
            "veneer_version": __version__,
            "data_sha256": data.data_hash,
            "template_sha256": data.template_hash,
            "stop_tokens": data.stops,
            **({} if data.classes is None else {"task": job.options.task, "labels": list(data.classes.names)}),
            "seed": job.options.seed,
            **({} if self.calibration is None else {"calibration": self.calibration}),
            **job.built_on,
            "steps": job.progress.step,
            **({"expert_tokens": tokens} if (tokens := trained_tokens(self.bank[job.name])) else {}),
            "held_out_loss": evaluations[-1][1] if evaluations else None,
        }


@contextmanager
def set_up(
    options: TrainOptions,
    jobs: Mapping[str, TrainOptions],
    base: Base | SharedBase | None,
    say: Callable[[str], None],
    shards: Shards | None = None,
) -> Iterator[Setup]:
    """Set up a run inside this context; afterwards the base is as it was.

    Args:
        options: the options of the run.
        jobs: the options of each job.
        base: a base in memory, in place of the one that the options name.
        say: prints a line.
        shards: divides the base that is loaded; then all processes set the run up in step.
    """
    if isinstance(base, SharedBase):
        with _on_shared_base(options, jobs, base, say) as setup:
            yield setup
        return
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loads = base is None
    divide = None if shards is None else partial(shards.divide, layers_of, resolve_device(options.device))
    base = base or load_base_of(options, common_task(jobs), divide)
    check_trainable(base.name, base.model, common_task(jobs))
    with cpp_kernels(options.compile, next(base.model.parameters()).device, say):
        data = load_all(jobs, base, context_of(base))
        bank = attach(base.model)
        # Outermost: an adapter on a norm keeps the norm's faster form and puts it back.
        with fast_modules(base.model, None if shards is None else shards.whole):
            try:
                setup = _with_adapters(options, jobs, base, bank, data, say, nullcontext, shards)
                setup = replace(setup, loads=loads, shards=shards)
                with closing(setup.stepper):
                    yield setup
            finally:
                bank.detach()


def load_base_of(options: TrainOptions, task: str, divide: Divide | None = None) -> Base:
    """Load the base that the options of a run name, as they describe it."""
    return load_base(
        options.base,
        dtype=options.dtype,
        revision=options.revision,
        device=options.device,
        quantize=options.quantize,
        task=task,
        divide=divide,
    )


def common_task(jobs: Mapping[str, TrainOptions]) -> str:
    """The task that the base of a run is loaded for.

    Raises ConfigError for jobs whose tasks need different heads.
    """
    tasks = {name: options.task for name, options in jobs.items()}
    first, *others = dict.fromkeys(tasks.values())
    if others and (first in HEADS or others[0] in HEADS):
        raise ConfigError(
            f"the jobs of a run share one base with one kind of head, and their tasks differ: {first} and {others[0]}; train them in "
            "separate runs"
        )
    return first


@contextmanager
def _on_shared_base(
    options: TrainOptions, jobs: Mapping[str, TrainOptions], shared: SharedBase, say: Callable[[str], None]
) -> Iterator[Setup]:
    """Set up a run on a base that others use; afterwards its adapters are out of the bank again."""
    base, bank = shared.base, shared.bank
    data = load_all(jobs, base, context_of(base))
    own: list[str] = []
    try:
        with shared.turn():
            before = set(bank)
            try:
                setup = _with_adapters(options, jobs, base, bank, data, say, shared.turn)
            finally:
                own = [name for name in bank if name not in before]
        yield setup
    finally:
        with shared.turn():
            for name in own:
                bank.remove(name)


def _with_adapters(
    options: TrainOptions,
    jobs: Mapping[str, TrainOptions],
    base: Base,
    bank: Bank,
    data: dict[str, JobData],
    say: Callable[[str], None],
    turn: Callable[[], AbstractContextManager[None]],
    shards: Shards | None = None,
) -> Setup:
    """Add the adapters of the jobs and their parents to the bank, and make what runs them."""
    runner = FlatRunner(base.model)
    if shards is not None:
        shards.free()
        for site in bank.survey.every():
            site.lender = shards.whole
    made = [make_job(name, own, base, bank, data[name], runner) for name, own in jobs.items()]
    load_parents(made, bank)
    if runner.kind != "flat":
        say(f"rows are padded: {runner.reason}")
    stepper = Stepper(
        runner,
        bank,
        {job.name: job.route for job in made if job.route},
        tasks={job.name: job.task for job in made},
        references={job.name: job.reference for job in made if job.reference},
        turn=turn,
    )
    if shards is not None:
        shards.free()
        stepper.shards, stepper.bottom = shards, EmbeddingOutput(base.model)
    return Setup(options, base, bank, data, made, stepper)


# Data


def load_all(jobs: Mapping[str, TrainOptions], base: Base, limit: int) -> dict[str, JobData]:
    """The data of each job. Jobs with equal data options share it, so that a sweep reads and renders its rows once."""
    known: dict[str, JobData] = {}
    found: dict[str, JobData] = {}
    for name, options in jobs.items():
        key = repr([getattr(options, field) for field in DataOptions.model_fields])
        if key not in known:
            known[key] = load_data(options, base, limit)
        found[name] = known[key]
    return found


def load_data(options: TrainOptions, base: Base, limit: int) -> JobData:
    """Read, render and check the rows of a job; ``limit`` is the context length of the base.

    Raises DataError with all rows that cannot be used.
    """
    if base.tokenizer is None:
        raise BaseModelError(f"{base.name} has no tokenizer to encode text; add the tokenizer's files to the folder")
    length = min(limit, options.max_length or limit)
    if options.task in HEADS:
        return load_labelled(options, base, length)
    template = read_template(options.chat_template, base.tokenizer) if options.chat_template is not None else None
    rendering = RenderOptions(
        train_on=options.train_on,
        max_length=length,
        chat_template=template,
        parse_specials=options.parse_specials,
        vocab_size=vocabulary_size(base.model),
    )
    renderer = Renderer(base.tokenizer, rendering)
    shared: dict[str, Any] = {key: getattr(options, key) for key in ("format", "columns", "roles", "truncate")}
    shared["format"] = TASKS[options.task].rows_format or options.format
    checked = CheckReport(max_length=length)
    remarks = RowChecks(checked, renderer)
    files, valid = files_of(options)
    train, report = load_examples(files, renderer, **shared, on_row=remarks.add)
    found = load_examples(valid, renderer, **shared, on_row=partial(remarks.add, held_out=True)) if valid else None
    learn, held_out = _held_out(options, train, report, found)
    general = pieces(general_text(), base.tokenizer, length=min(256, limit), count=16) if options.watch_general else []
    stops = taught_stops(renderer, report.stops)
    ends = other_ends(base.tokenizer, stops, own_ends(base.model))
    return JobData(
        train=learn,
        held_out=held_out,
        report=report,
        data_hash=data_hash(learn),
        template_hash=template_hash(base.tokenizer, template),
        general=general,
        remarks=[*_truncation_remarks(report, length), *warning_lines(checked), *([ends] if ends else [])],
        template=template,
        stops=stops,
    )


def training_classes(options: TrainOptions) -> Classes:
    """The classes of the labels in a job's training files; none for numbers to predict."""
    if options.task == "regression":
        return Classes(())
    files, _ = files_of(options)
    rows = (row for path in files for row in RowReader(path, format="labelled", columns=options.columns))
    return Classes(label_names(rows, ", ".join(path.name for path in files)))


def load_labelled(options: TrainOptions, base: Base, length: int, classes: Classes | None = None) -> JobData:
    """Read, render and check the labelled rows of a job.

    length: maximum tokens of an example. classes: those of the labels, if they are not the rows' own.
    """
    files, valid = files_of(options)
    task = options.task
    assert task in LABELLED_TASKS
    classes = training_classes(options) if classes is None else classes
    rendering = RenderOptions(max_length=length, vocab_size=vocabulary_size(base.model))
    renderer = LabelledRenderer(base.tokenizer, task, classes, rendering)
    load = partial(
        load_examples, renderer=renderer, format="labelled", columns=options.columns, truncate=options.truncate
    )
    train, report = load(files)
    learn, held_out = _held_out(options, train, report, load(valid) if valid else None)
    return JobData(
        train=learn,
        held_out=held_out,
        report=report,
        data_hash=data_hash(learn),
        template_hash=template_hash(base.tokenizer),
        remarks=_truncation_remarks(report, length),
        classes=classes,
    )


def _held_out(
    options: TrainOptions, train: Examples, report: LoadReport, valid: tuple[Examples, LoadReport] | None
) -> tuple[Examples | Subset, list[Example]]:
    """(training, held-out) examples. What was cut or dropped of the held-out files is added to the report."""
    if valid is not None:
        found, more = valid
        report.cut, report.dropped, report.lost = (
            report.cut + more.cut,
            report.dropped + more.dropped,
            report.lost + more.lost,
        )
        return train, found[:]
    return _split(train, options.valid_fraction) if options.valid_fraction else (train, [])


def files_of(options: DataOptions) -> tuple[list[Path], list[Path]]:
    """(training files, held-out files). A folder means its train file, and its valid file if no other is given.

    Raises DataError for a folder without a train file.
    """
    files: list[Path] = []
    valid: list[Path] = []
    for path in options.data:
        found = splits(path)
        files.append(found["train"])
        valid += [found["valid"]] if "valid" in found else []
    if options.valid or options.valid_fraction:
        valid = [splits(path)["train"] for path in options.valid]
    return files, valid


def _truncation_remarks(report: LoadReport, length: int) -> list[str]:
    """The numbers of rows that were cut or dropped for their length."""
    if report.cut:
        return [f"rows cut at {length:,} tokens: {report.cut:,}, which lost {report.lost:,} trained tokens"]
    if report.dropped:
        return [
            f"rows dropped for having more than {length:,} tokens: {report.dropped:,}, with {report.lost:,} trained tokens"
        ]
    return []


def _split(examples: Examples, fraction: float) -> tuple[Subset, list[Example]]:
    """Hold out every k-th example, whatever the seed, so that all runs on one file are evaluated on the same rows."""
    every = max(2, round(1 / fraction))
    held_out = examples[every - 1 :: every]
    learn = Subset(examples, (i for i in range(len(examples)) if i % every != every - 1))
    if not held_out or not learn:
        raise DataError(f"valid_fraction {fraction:g} cannot divide {counted(len(examples), 'example')}; give valid")
    return learn, held_out


# Jobs


def make_job(name: str, options: TrainOptions, base: Base, bank: Bank, data: JobData, runner: FlatRunner) -> Job:
    """Add the job's adapter to the bank and make the job."""
    method = method_of(options)
    if options.init_from is None:
        found = None
        if isinstance(method, LowRankMethod) and method.needs_rows and not next(base.model.parameters()).is_meta:
            found = explained(method, bank, runner, data.train, seed_of(options))
        bank.add(name, method if found is None else found.method, seed=seed_of(options), outputs=data.outputs)
        if found is not None:
            found.fill(bank, name)
    else:
        options = start_from_adapter(name, options, method, bank)
    check_tokens(options.trainable_token_indices, data.train, base.tokenizer)
    peak = options.learning_rate or default_rate(base, options.method, options.task)
    steps = number_of_steps(options, len(data.train))
    job = Job(name, options, bank, data.train, data.held_out, peak=peak, steps=steps)
    job.general = data.general
    job.template = data.template
    job.task.longest = min(context_of(base), options.max_length or context_of(base))
    return job


def default_rate(base: Base, method: str, task: str) -> float:
    """The learning rate of a method on a base: by the size of the base, times the factors of the method and of the task."""
    text = _text_config(base)
    usual = default_learning_rate(getattr(text, "hidden_size", 2000), getattr(text, "model_type", ""))
    return usual * METHODS[method].learning_rate_factor * TASKS[task].rate


def method_of(options: TrainOptions) -> Method:
    """The adapter method with those of its options that were given."""
    chosen = METHODS[options.method]
    known = chosen.model_fields.keys() & options.model_fields_set
    return chosen(**{name: getattr(options, name) for name in known})


def context_of(base: Base) -> int:
    """The context length of the base in tokens; a very large number if its config has none."""
    text = _text_config(base)
    found = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(found) if isinstance(found, int) and found > 0 else 1 << 20


def _text_config(base: Base) -> Any:
    config = getattr(base.model, "config", None)
    return config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config


# Description


def describe(setup: Setup, *, restored: bool) -> list[str]:
    """Lines that tell what the run has read, once for jobs that share their data, and what each job trains."""
    total = parameter_count(setup.base.model)
    by_data: dict[int, list[Job]] = {}
    for job in setup.jobs:
        by_data.setdefault(id(setup.data[job.name]), []).append(job)
    lines: list[str] = []
    for jobs in by_data.values():
        data = setup.data[jobs[0].name]
        prefix = "" if len(by_data) == 1 else f"{', '.join(job.name for job in jobs)}: "
        lines += [f"{prefix}{line}" for line in data.report.notices]
        listed = f"{len(data.train):,} example{'' if len(data.train) == 1 else 's'}"
        trained = f"{data.report.trained:,} of {data.report.tokens:,} tokens trained"
        if data.classes is not None:
            trained = f"{data.report.tokens:,} tokens; " + (
                f"classes: {data.classes}" if len(data.classes) else "numbers to predict"
            )
        lines.append(f"{prefix}{listed} ({trained}), {len(data.held_out):,} held out")
        lines += [f"{prefix}note: {line}" for line in data.remarks]
    for job in setup.jobs:
        adapter, report = setup.bank[job.name], setup.data[job.name].report
        count = adapter.num_parameters()
        tokens = round(job.steps * job.options.batch_size * report.tokens / max(1, report.examples))
        passes = job.steps * job.options.batch_size / max(1, len(setup.data[job.name].train))
        method, sites = adapter.method, len(adapter.tensors) or len(adapter.overrides)
        what = f"{method.name} {method.size} at {sites} sites" if method.size else f"{method.label} of {sites} layers"
        lines.append(
            f"{job.name}: {what}, {count:,} trainable parameters ({100 * count / total:.2f} % of the base), learning rate "
            f"{job.peak:.2e}; {counted(job.steps, 'step')} of {counted(job.options.batch_size, 'example')} ({passes:.3g} epochs), "
            f"about {tokens:,} tokens"
        )
        lines += [f"{job.name}: note: {line}" for line in remarks(setup.bank, adapter)]
        idle = sorted(OPTIONS & job.options.model_fields_set - type(method).model_fields.keys())
        lines += [f"{job.name}: note: {method.label} has no option {', '.join(idle)}; ignored"] if idle else []
        if restored:
            at = f"at step {job.progress.step} of {job.steps}"
            reason = f": {job.reason}" if job.reason else ""
            lines.append(f"{job.name}: {f'already {job.state.value} {at}{reason}' if job.over else f'resuming {at}'}")
    return lines
