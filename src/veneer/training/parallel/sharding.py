"""Decides if the processes of a run hold the base in parts, and divides it (``models/divided/sharding.py``).

A run is set up with the whole base in each process: adapters, their magnitudes, checks and the plan are those of one process. Then the
base is divided, and its numbers that are needed later are kept: ||W||^2 of each row for DoRA, and the records of receipts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

from veneer.checkpoints.base_view import base_view
from veneer.checkpoints.receipt import weight_records
from veneer.config import TrainOptions
from veneer.errors import ConfigError
from veneer.models.divided.embedding_output import EmbeddingOutput
from veneer.models.divided.sharding import Shards
from veneer.training.activation_checkpointing import layers_of
from veneer.training.device_memory import memory_of
from veneer.training.parallel.processes import Processes
from veneer.training.run.setup import Setup
from veneer.training.samples import asks_for_samples
from veneer.training.tasks import Task


def shard_base(setup: Setup, processes: Processes, say: Callable[[str], None]) -> Shards | None:
    """Divide the base among the processes if the option ``shard`` says so, or if it is "auto" and the base would take more than half of
    the memory of one of them; None if each keeps the whole base."""
    if processes.alone or not _wanted(setup, processes):
        return None
    model = setup.base.model
    shards = Shards(model, processes.share, first=processes.first)
    for site in setup.bank.survey.every():
        site.lender = shards.whole
    for job in setup.jobs:
        adapter = setup.bank[job.name]
        for name in adapter.tensors:
            if adapter.method.norms != "none":
                setup.bank.survey.site(name).squared_norms()
        if processes.first:
            weight_records(base_view(setup.bank), adapter.tensors)
    shards.divide(layers_of(model))
    setup.stepper.shards = shards
    setup.stepper.bottom = setup.stepper.bottom or EmbeddingOutput(model)
    processes.lockstep = True
    say(f"the base is divided among {processes.size} processes")
    return shards


def check_shard(options: TrainOptions, jobs: Iterable[TrainOptions], processes: Processes, *, loads: bool) -> None:
    """Raise ConfigError if the base is to be divided and cannot be. ``loads``: the run loads it itself."""
    if options.shard != "full":
        return
    jobs = list(jobs)
    if processes.alone:
        raise ConfigError(
            "shard: full divides the base among processes, and only one runs; start several with processes"
        )
    if not loads:
        raise ConfigError(
            "shard: full divides a base that the run loads itself; give its name, and not a base in memory"
        )
    task = next((job.task for job in jobs if job.task != Task.name), None)
    if task is not None:
        raise ConfigError(
            f"shard: a base that is divided among processes trains the task {Task.name}, and not {task}; use none"
        )
    if any(map(asks_for_samples, jobs)):
        raise ConfigError(
            "shard: a base that is divided among processes cannot generate samples; leave samples and sample_prompts out, or use none"
        )


def lent(shards: Shards | None) -> Callable[[], AbstractContextManager[None]]:
    """A context in which the first process may read weights of the base."""
    return nullcontext if shards is None else shards.lent


def _wanted(setup: Setup, processes: Processes) -> bool:
    if setup.options.shard != "auto":
        return setup.options.shard == "full"
    if not setup.loads or any(asks_for_samples(job.options) or job.options.task != Task.name for job in setup.jobs):
        return False
    size = sum(parameter.nbytes for parameter in setup.base.model.parameters())
    free = memory_of(setup.device).free()
    return any(processes.gather(free is not None and free < size))
