"""Parent adapters: earlier adapters on which a new one builds.

    init_from        its weights are the start of the new one, which has its method, rank and modules
    on_top_of        frozen, active in the job's route during training and evaluation: {new: 1, old: 1, ...}
    orthogonal_to    only their A factors are used (``orthogonal.py``)

A task with a reference (DPO) compares the new adapter with its start: the base, with the adapters of ``init_from`` and ``on_top_of``.

The new adapter's receipt names its parents with their hashes, and a resumed run refuses parents that have changed, except the one that
it started from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from veneer.adapters import Adapter, Bank, Method
from veneer.adapters.adapter import stream_seed
from veneer.adapters.targets import by_pattern
from veneer.checkpoints.locate import CONFIG, WEIGHTS, find_adapter, looks_like_hub_id
from veneer.checkpoints.peft.folders import PeftFolders
from veneer.config import LowRankOptions, TrainOptions, flag_name, given
from veneer.errors import ConfigError, Problems
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
        if options.init_from is not None:
            job.built_on["init_from"] = {"name": find_adapter(options.init_from)[0], **_origin(options.init_from)}
        _set_reference(job, bank, active)
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


def _set_reference(job: Job, bank: Bank, active: dict[Path, str]) -> None:
    """Set the model that a task with a reference compares the job with: the one that its training starts from."""
    options = job.options
    paths = [*([options.init_from] if options.init_from is not None else []), *options.on_top_of]
    if not job.task.reference or not paths:
        return
    job.reference = {_activate(path, bank, active): 1.0 for path in paths}
    job.built_on["reference"] = [_origin(path) for path in paths]


_OF_TRAINING = ("lora_dropout", "loraplus_lr_ratio")
"""Options of a method that concern training alone, so that they may differ from those of the adapter that a job starts from."""

OF_THE_ADAPTER = ("method", *(name for name in LowRankOptions.model_fields if name not in _OF_TRAINING))
"""Options that the adapter determines that a job starts from (``init_from``)."""

_MODULES = ("target_modules", "exclude_modules", "layers_to_transform")
_RANKS, _ALPHAS = ("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")


def start_from_adapter(name: str, options: TrainOptions, asked: Method, bank: Bank) -> TrainOptions:
    """Put a copy of the adapter that a job starts from into the bank.

    Args:
        name: the job.
        options: its options.
        asked: the method that they describe.
        bank: the bank.

    Returns:
        The options with the method, rank and modules of the adapter.

    Raises:
        ConfigError: options were given that the adapter does not have.
        CheckpointError: there is no adapter, or it cannot be read onto this base.
    """
    assert options.init_from is not None
    adapter = PeftFolders().read(find_adapter(options.init_from)[1], name, bank)
    problems = _conflicts(options, asked, adapter, bank)
    problems.raise_if_any(ConfigError, f"{options.init_from} cannot be the start of {name}")
    own = [key for key in _OF_TRAINING if key in type(adapter.method).model_fields]
    method = adapter.method.model_copy(update={key: getattr(options, key) for key in own})
    adapter.method, adapter.seed, adapter.meta = method, seed_of(options), {}
    adapter.requires_grad_(True)
    bank.insert(adapter)
    return options.model_copy(update={**dict(method), "method": method.name})


def _conflicts(options: TrainOptions, asked: Method, adapter: Adapter, bank: Bank) -> Problems:
    """Options that were given and say something else than the adapter, each with what it has."""
    problems, method = Problems(), adapter.method
    here, there = dict(asked), dict(method)
    typed = [key for key in OF_THE_ADAPTER if key in given(options) and (key == "method" or key in here)]

    def add(keys: Sequence[str], here: object, there: object) -> None:
        key = next(key for key in keys if key in typed)
        problems.add(f"{key} is {here}, and the adapter has {there}; leave out {flag_name(key)}")

    if "method" in typed and type(asked) is not type(method):
        add(["method"], options.method, method.name)
    if {*_MODULES} & {*typed}:
        chosen = {*asked.choose(bank.survey)}
        there_too = {*adapter.tensors} or {*adapter.overrides}
        if chosen - ({*adapter.overrides} - there_too) != there_too:
            add(
                _MODULES,
                f"a choice of {len(chosen)} modules",
                f"a choice of {len(there_too)}, not all of them the same",
            )
    for keys, value_at in ((_RANKS, adapter.rank), (_ALPHAS, adapter.alpha)):
        own, pattern = (here.get(key, there.get(key)) for key in keys)
        wanted = {site: by_pattern(pattern, site, own) for site in adapter.tensors} if pattern is not None else {}
        other = next((site for site, value in wanted.items() if value != value_at(site)), None)
        if {*keys} & {*typed} and other is not None:
            add(keys, f"{wanted[other]:g} at {other}", f"{value_at(other):g}")
    if "init_lora_weights" in typed:
        problems.add(
            "init_lora_weights has no effect, since the weights come from the adapter; leave out --init-lora-weights"
        )
    for key in typed:
        simple = key not in ("method", "init_lora_weights", *_MODULES, *_RANKS, *_ALPHAS)
        if simple and here.get(key) != there.get(key):
            add([key], here[key], there[key])
    return problems


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
        # Its dropout stream is in no checkpoint, and jobs that share the parent would move it for each other.
        if bank[free].method.dropout:
            bank[free].method = bank[free].method.model_copy(update={"lora_dropout": 0.0})
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
    named = path if looks_like_hub_id(path) else folder  # a receipt does not name a folder of a private cache
    return {"folder": str(named), "sha256": digest.hexdigest()}
