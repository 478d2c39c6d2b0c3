"""From options to a run: examples rendered and checked, adapters added, jobs made.

Everything that can be refused is refused here, before the first step: rows that cannot be used, rows with nothing to learn, rows longer
than the base's context, targets that match nothing, a base that cannot be run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from veneer.adapters import METHODS, Bank, LoRA, Method
from veneer.adapters.targets import select
from veneer.config import DataOptions, LowRankOptions, TrainOptions, default_learning_rate
from veneer.data.chat.render import Renderer, RenderOptions
from veneer.data.chat.template import read_template
from veneer.data.check import CheckReport, Remarks
from veneer.data.check_text import remark_lines
from veneer.data.dataset import Examples, LoadReport, Selected, load_examples
from veneer.data.example import Example
from veneer.data.hashing import data_hash, template_hash
from veneer.data.rows.readers import splits
from veneer.errors import BaseModelError, DataError
from veneer.evaluate.general import general_text, pieces
from veneer.models.load import Base
from veneer.training.loop.job import Job
from veneer.training.run.parent_adapters import seed_of

FULL = "full"


@dataclass(frozen=True)
class Material:
    """The examples of one job, and where they come from."""

    train: Examples | Selected
    held_out: list[Example]
    report: LoadReport
    data_hash: str
    template_hash: str
    general: list[Example] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """What is remarkable about the rows, a line each."""
    template: str | None = None
    """The chat template that was asked for in place of the base's."""


def method_of(options: TrainOptions, bank: Bank) -> Method:
    """The adapter's method with its options, from those of the run. Full fine-tuning is an adapter that has its layers' weights of its
    own, so it trains beside the others on the same base."""
    chosen = METHODS[LoRA.name if options.method == FULL else options.method]
    method = chosen(**{name: getattr(options, name) for name in LowRankOptions.model_fields})
    if options.method != FULL:
        return method
    whole = select(bank.lookout.survey, method, method.kinds)
    return method.model_copy(update={"modules_to_save": (*method.modules_to_save, *whole)})


def gather(options: TrainOptions, base: Base, limit: int) -> Material:
    """Read, render and prove a job's rows. limit: most tokens of an example that the base and a pass can take.

    Raises DataError with every row that cannot be used.
    """
    if base.tokenizer is None:
        raise BaseModelError(
            f"{base.name} has no tokenizer, so text cannot be turned into tokens; add its files to the folder"
        )
    length = min(limit, options.max_length or limit)
    template = read_template(options.chat_template) if options.chat_template is not None else None
    renderer = Renderer(
        base.tokenizer,
        RenderOptions(
            train_on=options.train_on,
            max_length=length,
            chat_template=template,
            parse_specials=options.parse_specials,
        ),
    )
    shared: dict[str, Any] = {key: getattr(options, key) for key in ("format", "columns", "roles", "truncate")}
    looked = CheckReport(max_length=length)
    remarks = Remarks(looked, renderer)
    files, valid = files_of(options)
    train, report = load_examples(files, renderer, **shared, look=remarks.see)
    held_out: list[Example] = []
    learn: Examples | Selected = train
    if valid:
        found, more = load_examples(valid, renderer, **shared, look=partial(remarks.see, held_out=True))
        held_out = found[:]
        report.cut, report.dropped = report.cut + more.cut, report.dropped + more.dropped
        report.lost += more.lost
    elif options.valid_fraction:
        held_out, learn = _split(train, options.valid_fraction)
    general = pieces(general_text(), base.tokenizer, length=min(256, limit), count=16) if options.watch_general else []
    return Material(
        learn,
        held_out,
        report,
        data_hash(learn),
        template_hash(base.tokenizer, template),
        general,
        [*_cut(report, length), *remark_lines(looked)],
        template,
    )


def files_of(options: DataOptions) -> tuple[list[Path], list[Path]]:
    """(files to train on, held-out files): a folder stands for its train file, and for its valid file where no other is given.

    Raises DataError for a folder without a train file.
    """
    files: list[Path] = []
    beside: list[Path] = []
    for path in options.data:
        found = splits(path)
        files.append(found["train"])
        beside += [found["valid"]] if "valid" in found else []
    if options.valid or options.valid_fraction:
        beside = [splits(path)["train"] for path in options.valid]
    return files, beside


def _cut(report: LoadReport, length: int) -> list[str]:
    """What the maximum length cost."""
    if report.cut:
        return [f"rows cut at {length:,} tokens: {report.cut:,}, which lost {report.lost:,} trained tokens"]
    if report.dropped:
        return [
            f"rows left out for having more than {length:,} tokens: {report.dropped:,}, with {report.lost:,} trained tokens"
        ]
    return []


def gather_all(jobs: Mapping[str, TrainOptions], base: Base, limit: int) -> dict[str, Material]:
    """The material of each job; jobs that want the same share it, so that a sweep reads and renders its rows once."""
    known: dict[str, Material] = {}
    found: dict[str, Material] = {}
    for name, options in jobs.items():
        key = repr([getattr(options, field) for field in DataOptions.model_fields])
        if key not in known:
            known[key] = gather(options, base, limit)
        found[name] = known[key]
    return found


def _split(examples: Examples, fraction: float) -> tuple[list[Example], Selected]:
    """Hold out every k-th example, whatever the seed, so that runs of one file are judged on the same rows."""
    every = max(2, round(1 / fraction))
    held_out = examples[every - 1 :: every]
    learn = Selected(examples, (i for i in range(len(examples)) if i % every != every - 1))
    if not held_out or not learn:
        raise DataError(
            f"{len(examples)} examples are too few to hold out a fraction of {fraction:g}; give a file with valid"
        )
    return held_out, learn


def make_job(name: str, options: TrainOptions, base: Base, bank: Bank, material: Material) -> Job:
    """Add the job's adapter to the bank and set the job up before its first step."""
    bank.add(name, method_of(options, bank), seed=seed_of(options))
    check_tokens(options.trainable_token_indices, material.train, base.tokenizer)
    config = getattr(base.model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    usual = default_learning_rate(getattr(text, "hidden_size", 2000), getattr(text, "model_type", ""))
    peak = options.learning_rate or (usual / 10 if options.method == FULL else usual)
    per_epoch = len(material.train) / options.batch_size
    steps = options.steps or max(1, math.ceil(per_epoch * (options.epochs or 1)))
    job = Job(name, options, bank, material.train, material.held_out, peak=peak, steps=steps)
    job.general = material.general
    job.template = material.template
    return job


def check_tokens(tokens: Sequence[int], examples: Sequence[Example], tokenizer: Any) -> None:
    """Raise DataError for trainable tokens that no example holds: their rows would be saved as if they had been learnt."""
    missing = set(tokens)
    for example in examples if missing else ():
        missing.difference_update(example.ids)
        if not missing:
            return
    if missing:
        shown = ", ".join(f"{token} ({tokenizer.convert_ids_to_tokens(token)!r})" for token in sorted(missing)[:5])
        raise DataError(
            f"trainable_token_indices: no example holds the token{'s' if len(missing) > 1 else ''} {shown}"
            f"{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}, so their rows cannot be learnt; take them out, or look at "
            "how the rows are read (veneer data show FILE --ids): control tokens that are typed in a conversation stay text"
        )


def context_of(base: Base) -> int:
    """Most tokens that the base's positions reach, or a bound that no example reaches where it does not say."""
    config = getattr(base.model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(found) if isinstance(found, int) and found > 0 else 1 << 20


def receipt_of(job: Job, material: Material, version: str) -> Mapping[str, Any]:
    """What the adapter's file says of its making."""
    return {
        "veneer_version": version,
        "data_sha256": material.data_hash,
        "template_sha256": material.template_hash,
        "seed": job.options.seed,
        **job.built_on,
        "steps": job.progress.step,
        "held_out_loss": job.progress.evaluations[-1][1] if job.progress.evaluations else None,
    }
