"""Parent adapters: earlier adapters on which a new one builds.

    on_top_of        frozen, active in the job's route during training and evaluation: {new: 1, old: 1, ...}
    orthogonal_to    only their A factors are used (``orthogonal.py``)

The new adapter's receipt names its parents with their hashes, and a resumed run refuses parents that have changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from veneer.adapters import Adapter, Bank
from veneer.adapters.adapter import stream_seed
from veneer.checkpoints.locate import CONFIG, WEIGHTS, find_adapter
from veneer.checkpoints.peft.folders import PeftFolders
from veneer.config import TrainOptions
from veneer.training.loop.job import Job
from veneer.training.loop.orthogonal import Penalty, Projection


def load_parents(jobs: Sequence[Job], bank: Bank) -> None:
    """Load the parents of all jobs, each folder once, and set each job's route, orthogonality and provenance.

    Raises CheckpointError and AdapterError if a parent is missing or does not fit the base.
    """
    active: dict[Path, str] = {}
    read: dict[Path, Adapter] = {}
    for job in jobs:
        options = job.options
        names = [_activate(path, bank, active) for path in options.on_top_of]
        if names:
            job.route = {job.name: 1.0, **dict.fromkeys(names, 1.0)}
            origins = zip(names, options.on_top_of, strict=True)
            job.built_on["on_top_of"] = [{"name": name, **_origin(path)} for name, path in origins]
        old = [_read(path, bank, active, read) for path in options.orthogonal_to]
        if old:
            adapter, penalty = bank[job.name], options.orthogonal == "penalty"
            job.orthogonality = (
                Penalty(adapter, old, options.orthogonal_weight) if penalty else Projection(adapter, old)
            )
            job.built_on["orthogonal_to"] = [_origin(path) for path in options.orthogonal_to]
            job.built_on["orthogonal"] = options.orthogonal


def seed_of(options: TrainOptions) -> int:
    """The seed of a new adapter's initialization and dropout, from the job's seed and its parents.

    With the same seed for each task (the default), a new A would start where the old ones did and read the same directions: the penalty
    would work against the start, and the projection leave little of it.
    """
    parents = [_origin(path)["sha256"] for path in dict.fromkeys((*options.on_top_of, *options.orthogonal_to))]
    return stream_seed(options.seed, *parents) % (1 << 31) if parents else options.seed


def _activate(path: Path, bank: Bank, active: dict[Path, str]) -> str:
    """The name in the bank of a frozen parent, which is loaded the first time."""
    name, folder = find_adapter(path)
    if folder not in active:
        free = next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in bank)
        bank.load(folder, name=free)
        bank[free].requires_grad_(False)
        active[folder] = free
    return active[folder]


def _read(path: Path, bank: Bank, active: dict[Path, str], read: dict[Path, Adapter]) -> Adapter:
    name, folder = find_adapter(path)
    if folder in active:
        return bank[active[folder]]
    if folder not in read:
        read[folder] = PeftFolders().read(folder, name, bank)
    return read[folder]


def _origin(path: Path) -> dict[str, str]:
    folder = find_adapter(path)[1]
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with (folder / name).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return {"folder": str(folder), "sha256": digest.hexdigest()}
