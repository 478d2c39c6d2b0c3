"""Adapters that a new one builds on: found in folders or runs, held against the base, frozen.

    on_top_of        they act in the job's route while it trains and is judged: {new: 1, old: 1, ...}
    orthogonal_to    only their A factors are read (``orthogonal.py``)

What a job builds on is part of what its result means, so the adapter's receipt names it with its hash, and a run that goes on refuses
adapters that are not what they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.adapters import Adapter, Bank
from veneer.adapters.adapter import stream_seed
from veneer.checkpoints.locate import CONFIG, WEIGHTS, find_adapter
from veneer.checkpoints.peft.folders import PeftFolders
from veneer.config import TrainOptions
from veneer.training.loop.job import Job
from veneer.training.loop.orthogonal import Penalty, Projection


def build_on(jobs: Sequence[Job], bank: Bank) -> None:
    """Load what the jobs build on, and tell each job: its route, what bends its steps, and what its receipt says.

    Each folder is loaded once. Raises CheckpointError and AdapterError where one is missing or does not fit the base.
    """
    acting: dict[Path, str] = {}
    read: dict[Path, Adapter] = {}
    for job in jobs:
        options = job.options
        names = [_act(path, bank, acting) for path in options.on_top_of]
        if names:
            job.route = {job.name: 1.0, **dict.fromkeys(names, 1.0)}
        old = [_read(path, bank, acting, read) for path in options.orthogonal_to]
        if old and options.orthogonal == "penalty":
            job.shaper = Penalty(bank[job.name], old, options.orthogonal_weight)
        elif old:
            projection = Projection(bank[job.name], old)
            projection.begin()
            job.shaper = projection
        job.built_on = built_on(options, {path: acting[find_adapter(path)[1]] for path in options.on_top_of})


def seed_of(options: TrainOptions) -> int:
    """The seed that a new adapter starts from, and that its dropout draws from: the job's own, and what the job builds on.

    With one seed for every task, as the default is, a new A would begin as the old ones did, and so read what they read: the penalty would
    fight its own start, and the projection leave little of it.
    """
    earlier = [_origin(path)["sha256"] for path in dict.fromkeys((*options.on_top_of, *options.orthogonal_to))]
    return stream_seed(options.seed, *earlier) % (1 << 31) if earlier else options.seed


def built_on(options: TrainOptions, names: Mapping[Path, str]) -> dict[str, Any]:
    """What a receipt says of the adapters that a new one builds on; nothing where there are none."""
    found: dict[str, Any] = {}
    if options.on_top_of:
        found["on_top_of"] = [{"name": names[path], **_origin(path)} for path in options.on_top_of]
    if options.orthogonal_to:
        found["orthogonal_to"] = [_origin(path) for path in options.orthogonal_to]
        found["orthogonal"] = options.orthogonal
    return found


def _act(path: Path, bank: Bank, acting: dict[Path, str]) -> str:
    """The name under which an adapter acts in the bank, loaded when it is first asked for."""
    name, folder = find_adapter(path)
    if folder not in acting:
        free = next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in bank)
        bank.load(folder, name=free)
        bank[free].requires_grad_(False)
        acting[folder] = free
    return acting[folder]


def _read(path: Path, bank: Bank, acting: Mapping[Path, str], read: dict[Path, Adapter]) -> Adapter:
    name, folder = find_adapter(path)
    if folder in acting:
        return bank[acting[folder]]
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
