"""From options to a run: examples rendered and checked, adapters added, jobs made.

Everything that can be refused is refused here, before the first step: rows that cannot be used, rows with nothing to learn, rows longer
than the base's context, targets that match nothing, a base that cannot be run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.adapters import METHODS, Bank, Method
from veneer.config import DataOptions, LowRankOptions, TrainOptions, default_learning_rate
from veneer.data.dataset import Examples, LoadReport, load_examples
from veneer.data.example import Example
from veneer.data.hashing import data_hash, template_hash
from veneer.data.render import Renderer, RenderOptions
from veneer.errors import BaseModelError, DataError
from veneer.evaluate.general import general_text, pieces
from veneer.models.load import Base
from veneer.train.job import Job


@dataclass(frozen=True)
class Material:
    """The examples of one job, and where they come from."""

    train: Examples | list[Example]
    held_out: list[Example]
    report: LoadReport
    data_hash: str
    template_hash: str
    general: list[Example] = field(default_factory=list)


def method_of(options: TrainOptions) -> Method:
    """The adapter's method with its options, from those of the run."""
    chosen = METHODS[options.method]
    return chosen(**{name: getattr(options, name) for name in LowRankOptions.model_fields})


def gather(options: TrainOptions, base: Base, limit: int) -> Material:
    """Read, render and prove a job's rows. limit: most tokens of an example that the base and a pass can take.

    Raises DataError with every row that cannot be used.
    """
    if base.tokenizer is None:
        raise BaseModelError(
            f"{base.name} has no tokenizer, so text cannot be turned into tokens; add its files to the folder"
        )
    length = min(limit, options.max_length or limit)
    renderer = Renderer(base.tokenizer, RenderOptions(train_on=options.train_on, max_length=length))
    shared: dict[str, Any] = {"format": options.format, "columns": options.columns, "truncate": options.truncate}
    train, report = load_examples([Path(path) for path in options.data], renderer, **shared)
    held_out: list[Example] = []
    learn: Examples | list[Example] = train
    if options.valid:
        found, _ = load_examples([Path(path) for path in options.valid], renderer, **shared)
        held_out = found[:]
    elif options.valid_fraction:
        held_out, learn = _split(train, options.valid_fraction)
    general = pieces(general_text(), base.tokenizer, length=min(256, limit), count=16) if options.watch_general else []
    return Material(learn, held_out, report, data_hash(learn), template_hash(base.tokenizer), general)


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


def _split(examples: Examples, fraction: float) -> tuple[list[Example], list[Example]]:
    """Hold out every k-th example, whatever the seed, so that runs of one file are judged on the same rows."""
    every = max(2, round(1 / fraction))
    held_out = examples[:][every - 1 :: every]
    learn = [example for i, example in enumerate(examples[:]) if i % every != every - 1]
    if not held_out or not learn:
        raise DataError(
            f"{len(examples)} examples are too few to hold out a fraction of {fraction:g}; give a file with valid"
        )
    return held_out, learn


def make_job(name: str, options: TrainOptions, base: Base, bank: Bank, material: Material) -> Job:
    """Add the job's adapter to the bank and set the job up before its first step."""
    bank.add(name, method_of(options), seed=options.seed)
    config = getattr(base.model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    peak = options.learning_rate or default_learning_rate(
        getattr(text, "hidden_size", 2000), getattr(text, "model_type", "")
    )
    per_epoch = len(material.train) / options.batch_size
    steps = options.steps or max(1, math.ceil(per_epoch * (options.epochs or 1)))
    job = Job(name, options, bank, material.train, material.held_out, peak=peak, steps=steps)
    job.general = material.general
    return job


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
