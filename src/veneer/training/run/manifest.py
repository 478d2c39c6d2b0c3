"""What a run depends on besides its options: data, base, versions, hardware, and the choices that were made for it.

They stand in ``run.json`` from before the first step. When the run goes on, the choices hold; data, template or base that are not what
they were are refused; another machine or version is told, since from there on the last bits of the numbers may differ.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Any

import torch

from veneer._version import __version__
from veneer.adapters import Bank
from veneer.data.hashing import data_hash
from veneer.errors import CheckpointError
from veneer.kernels import cpp_library as native
from veneer.models.fingerprint import weight_fingerprints
from veneer.models.load import Base
from veneer.training.loop.job import Job
from veneer.training.run.run_folder import FACTS, RunFiles
from veneer.training.run.setup import Material

_CONTENT = {
    "data": "the examples",
    "held_out": "the held-out examples",
    "template": "the chat template",
    "built_on": "the earlier adapters",
}
_CHOICES = ("share", "sharing", "plan", "recompute", "compile")
"""What was decided from measurements when the run began."""

Facts = dict[str, Any]


def facts_of(jobs: list[Job], material: Mapping[str, Material], base: Base, bank: Bank) -> Facts:
    """The facts of a run that begins now."""
    import transformers

    return {
        "veneer": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "kernels": "python" if (kernels := native.folder()) is None else f"C++ {kernels.name}",
        "threads": torch.get_num_threads(),
        "dtype": str(base.dtype).removeprefix("torch."),
        "base": _weights(base, bank),
        "data": {job.name: material[job.name].data_hash for job in jobs},
        "held_out": {job.name: data_hash(material[job.name].held_out) for job in jobs if material[job.name].held_out},
        "template": {job.name: material[job.name].template_hash for job in jobs},
        "built_on": {job.name: _hashes(job) for job in jobs if job.built_on},
    }


def compare(files: RunFiles, facts: Facts, known: list[str]) -> tuple[Facts, list[str]]:
    """Hold the facts of now against those that the run began with; ``known``: the jobs that had begun.

    Returns the facts that hold from here on, and what changed in words. Raises CheckpointError where the run cannot go on with them.
    """
    try:
        before: Facts = json.loads((files.out / FACTS).read_text(encoding="utf-8"))
        kept = {**before, **{key: {**facts[key], **before.get(key, {})} for key in _CONTENT}}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{files.out / FACTS} cannot be read ({error}); bring it back from a copy, or start over with --fresh"
        ) from None
    for key, what in _CONTENT.items():
        changed = [job for job in known if kept[key].get(job) != facts[key].get(job)]
        if changed:
            raise CheckpointError(
                f"{what} of {changed[0]} changed since {files.out} began; put them back, or start over with --fresh"
            )
    if before.get("base") != facts["base"]:
        raise CheckpointError(
            f"the base's weights are not those with which {files.out} began; put them back, or start over with --fresh"
        )
    said = [
        f"{key} {before.get(key)} -> {facts[key]}"
        for key in facts
        if key not in _CONTENT and key not in _CHOICES and before.get(key) != facts[key]
    ]
    chosen = {key: before[key] for key in _CHOICES if key in before}
    return {**facts, **{key: kept[key] for key in _CONTENT}, **chosen}, said


def chosen_before(files: RunFiles, facts: Facts) -> Facts:
    """The choices of a start of this run that did not come to a checkpoint; nothing where there was none, or on another machine."""
    try:
        before: Facts = json.loads((files.out / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    alike = isinstance(before, dict) and all(before.get(key) == value for key, value in facts.items())
    return {key: before[key] for key in _CHOICES if key in before} if alike else {}


def _weights(base: Base, bank: Bank) -> str:
    """One hash over the base's weights at every site."""
    names = [f"{site}.weight" if site else "weight" for site in bank.sites]
    found = weight_fingerprints(base, names)
    return hashlib.sha256(json.dumps([found[name] for name in names]).encode()).hexdigest()


def _processor() -> str:
    return str(torch.backends.cpu.get_cpu_capability())


def _hashes(job: Job) -> list[str]:
    """The adapters that a job builds on, wherever they lie."""
    return [origin["sha256"] for key in ("on_top_of", "orthogonal_to") for origin in job.built_on.get(key, ())]
