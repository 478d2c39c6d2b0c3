"""Decides if the processes of a run hold the base in parts (``models/divided/sharding.py``), before it is loaded.

Such a run is set up on a divided base, in step: every process runs the same passes and reads the same weights in the same order. Numbers
of weights that are needed later are kept: ||W||^2 of each row for DoRA, and the records of receipts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

from veneer.checkpoints.base_view import base_view
from veneer.checkpoints.receipt import weight_records
from veneer.config import TrainOptions
from veneer.errors import ConfigError
from veneer.models.devices import resolve_device
from veneer.models.divided.sharding import Shards
from veneer.models.load import dtype_for, folder_of
from veneer.models.quantized.size import size_in_memory
from veneer.training.device_memory import memory_of
from veneer.training.parallel.processes import Processes
from veneer.training.process_memory import return_large_blocks
from veneer.training.run.setup import Setup
from veneer.training.samples import asks_for_samples
from veneer.training.tasks import Task


def shards_of_run(
    options: TrainOptions, jobs: Mapping[str, TrainOptions], processes: Processes, *, loads: bool
) -> Shards | None:
    """What divides the base among the processes, if the option ``shard`` says so, or if it is "auto" and the base would take more than
    half of the memory of one of them; None if each keeps the whole base. ``loads``: the run loads it itself."""
    if processes.alone or not _wanted(options, jobs, processes, loads=loads):
        return None
    processes.lockstep = True
    return_large_blocks()
    return Shards(processes.share, first=processes.first)


def keep_numbers(setup: Setup, shards: Shards) -> None:
    """Keep the numbers of the weights that the run needs later."""
    with shards.in_step():
        for job in setup.jobs:
            adapter = setup.bank[job.name]
            for name in adapter.tensors:
                if adapter.method.norms != "none":
                    setup.bank.survey.site(name).squared_norms()
            weight_records(base_view(setup.bank), adapter.tensors)


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


def _wanted(options: TrainOptions, jobs: Mapping[str, TrainOptions], processes: Processes, *, loads: bool) -> bool:
    if options.shard != "auto":
        return options.shard == "full"
    if not loads or any(asks_for_samples(job) or job.task != Task.name for job in jobs.values()):
        return False
    device = resolve_device(options.device)
    size = processes.together(
        lambda: size_in_memory(
            folder_of(options.base, options.revision), dtype_for(options.dtype, device), options.quantize
        )
    )
    free = memory_of(device).free()
    return any(processes.gather(free is not None and free < 2 * size))
