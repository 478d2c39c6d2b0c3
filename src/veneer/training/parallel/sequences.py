"""Sequence parallel: teams of processes that compute a batch together, each some of its tokens (``models/divided/sequence_split.py``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch

from veneer.config import TrainOptions
from veneer.errors import BaseModelError, ConfigError
from veneer.models.divided.embedding_output import EmbeddingOutput
from veneer.models.divided.sequence_split import SequenceSplit
from veneer.models.flat import FlatRunner
from veneer.models.flat_check import relative_error
from veneer.models.layout import Flat
from veneer.models.load import Base, config_folder
from veneer.models.sources import read_config
from veneer.training.loop.job import Job
from veneer.training.parallel.processes import Processes
from veneer.training.run.setup import Setup
from veneer.training.tasks import Task

_BOUND = {torch.float64: 1e-9, torch.float32: 1e-3}
_ROUGH = 6e-2


def check_sequence(
    options: TrainOptions, jobs: Iterable[TrainOptions], processes: Processes, base: Base | None
) -> None:
    """Raise ConfigError if the processes or the heads of the base cannot be divided as ``sequence_parallel`` asks, before it is loaded."""
    degree = options.sequence_parallel
    if degree == 1:
        return
    if processes.size % degree:
        raise ConfigError(
            f"sequence_parallel: {degree} does not divide the number of processes, which is {processes.size}; start {degree} processes, or "
            "a multiple"
        )
    task = next((job.task for job in jobs if job.task != Task.name), None)
    if task is not None:
        raise ConfigError(f"sequence_parallel: the loss of the task {task} needs whole texts; leave it out")
    found: Any = read_config(config_folder(options.base, options.revision)) if base is None else _config_of(base)
    inner = found.get("text_config")
    config = {**found, **(inner if isinstance(inner, dict) else {})}
    heads = config.get("num_attention_heads") or config.get("n_head")
    groups = config.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or not isinstance(groups, int):
        raise ConfigError(
            f"sequence_parallel: the config of {options.base} does not tell its number of heads; leave it out"
        )
    if heads % degree or groups % degree:
        fits = [str(n) for n in range(2, heads + 1) if not heads % n and not groups % n]
        raise ConfigError(
            f"sequence_parallel: {degree} does not divide the {heads} attention heads and the {groups} of keys and values of "
            f"{options.base}; {f'use {_or(fits)}' if fits else 'leave it out'}"
        )


def split_sequences(setup: Setup, processes: Processes, say: Callable[[str], None]) -> None:
    """Divide the tokens of each batch among the processes of each team.

    Raises ConfigError or BaseModelError if this base or these adapters cannot be computed on a part of the tokens.
    """
    degree = setup.options.sequence_parallel
    if degree == 1:
        return
    seconds = timedelta(seconds=processes.seconds)
    teams = [list(range(first, first + degree)) for first in range(0, processes.size, degree)]
    groups = [torch.distributed.new_group(team, timeout=seconds) for team in teams]
    split = SequenceSplit(processes.seat, degree, groups[processes.team])
    runner = setup.stepper.runner

    def begin() -> None:
        for job in setup.jobs:
            _check_dropout(setup, job)
        if runner.kind != "flat":
            raise BaseModelError(
                f"sequence_parallel: the base runs on padded rows, which cannot be divided: {runner.reason}"
            )
        _check_model(runner, split)

    processes.together(begin)
    setup.stepper.bottom = setup.stepper.bottom or EmbeddingOutput(setup.base.model)
    processes.lockstep = True
    say(f"the tokens of each batch are divided among {degree} processes")


def _check_dropout(setup: Setup, job: Job) -> None:
    """A mask belongs to an input as a whole; its rows at a head or at experts are not a run of the batch's tokens."""
    if not job.options.lora_dropout:
        return
    adapter = setup.bank[job.name]
    for name in adapter.tensors:
        site = setup.bank.survey.site(name)
        if site.is_head or site.is_selected:
            raise ConfigError(
                f"sequence_parallel: lora_dropout at {name} of {job.name} would drop other inputs than in one process; set lora_dropout to "
                "0, or leave this layer out of target_modules"
            )


@torch.no_grad()
def _check_model(runner: FlatRunner, split: SequenceSplit) -> None:
    """Let the runner split its batches, if that gives the states of whole ones."""
    flat = Flat.of([list(range(3, 8)), list(range(2, 11))])
    whole = runner.hidden(flat)
    runner.split = split
    first, last = split.window(len(whole))
    expected = whole[first:last]
    error = relative_error(runner.hidden(flat)[: len(expected)], expected)
    if not error <= _BOUND.get(next(runner.model.parameters()).dtype, _ROUGH):
        raise BaseModelError(
            f"sequence_parallel: {type(runner.model).__name__} computes {error:.1g} off on a part of the tokens, since more than its "
            "attention reads neighbours; leave it out"
        )


def _config_of(base: Base) -> dict[str, Any]:
    config = getattr(base.model, "config", None)
    return config.to_dict() if config is not None else {}


def _or(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
