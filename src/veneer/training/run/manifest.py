"""The manifest of a run, ``run.json``: everything besides its options on which its numbers depend.

It holds hashes of data, templates and base, versions, hardware, and the decisions made from measurements. It is written before the first
step. When the run resumes, its decisions hold; changed data, templates or base weights are refused; another machine or version is
reported, since the last bits of the numbers may then differ.
"""

from __future__ import annotations

import hashlib
import json
import platform
from contextlib import nullcontext
from typing import Any

import torch

from veneer._version import __version__
from veneer.data.hashing import data_hash
from veneer.errors import CheckpointError
from veneer.kernels import cpp_library
from veneer.models.devices import device_name
from veneer.models.fingerprint import weight_fingerprints
from veneer.training.run.run_folder import MANIFEST, RunFolder
from veneer.training.run.setup import Setup

_CONTENT = {
    "data": "the examples",
    "held_out": "the held-out examples",
    "template": "the chat template",
    "built_on": "the parent adapters",
}
_BEFORE = {"device": "cpu", "processes": 1, "sequence_parallel": 1}
"""Entries that earlier versions did not write, with what they meant."""
_DECISIONS = ("share", "sharing", "plan", "recompute", "forms")

Manifest = dict[str, Any]


def manifest_of(setup: Setup, processes: int = 1) -> Manifest:
    """The manifest of a run that begins now, without its decisions."""
    import transformers

    kernels = cpp_library.folder()
    return {
        "veneer": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": str(torch.backends.cpu.get_cpu_capability()),
        "kernels": "python" if kernels is None else f"C++ {kernels.name}",
        "processes": processes,
        "sequence_parallel": setup.options.sequence_parallel,
        "device": device_name(setup.device),
        "threads": torch.get_num_threads(),
        "dtype": str(setup.base.dtype).removeprefix("torch."),
        "base": _hash_of_base(setup),
        "data": {name: data.data_hash for name, data in setup.data.items()},
        "held_out": {name: data_hash(data.held_out) for name, data in setup.data.items() if data.held_out},
        "template": {name: data.template_hash for name, data in setup.data.items()},
        "built_on": {
            job.name: [
                parent["sha256"]
                for key in ("on_top_of", "orthogonal_to", "reference")
                for parent in job.built_on.get(key, ())
            ]
            for job in setup.jobs
            if job.built_on
        },
        "init_from": {job.name: job.built_on["init_from"] for job in setup.jobs if "init_from" in job.built_on},
    }


def compare(folder: RunFolder, manifest: Manifest, known: list[str]) -> tuple[Manifest, list[str]]:
    """Compare the manifest of now with the one that the run began with.

    Args:
        folder: the run's folder.
        manifest: from `manifest_of`.
        known: the jobs that have begun.

    Returns:
        The manifest from here on, and the changes in words.

    Raises:
        CheckpointError: the run cannot resume with these changes, or its manifest cannot be read.
    """
    try:
        before: Manifest = {**_BEFORE, **json.loads((folder.out / MANIFEST).read_text(encoding="utf-8"))}
        kept = {**before, **{key: {**manifest[key], **before.get(key, {})} for key in _CONTENT}}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder.out / MANIFEST} cannot be read ({error}); restore it from a copy, or start over with --fresh"
        ) from None
    for key, what in _CONTENT.items():
        changed = [job for job in known if kept[key].get(job) != manifest[key].get(job)]
        if changed:
            raise CheckpointError(
                f"{what} of {changed[0]} changed since {folder.out} began; put them back, or start over with --fresh"
            )
    if before.get("base") != manifest["base"]:
        raise CheckpointError(
            f"the base weights are not those with which {folder.out} began; put them back, or start over with --fresh"
        )
    changes = [
        f"{key} {before.get(key)} -> {manifest[key]}"
        for key in manifest
        if key not in (*_CONTENT, *_DECISIONS, "init_from") and before.get(key) != manifest[key]
    ]
    if before.get("compile") is True:  # written by versions that compiled elementwise operations with torch
        changes.append("compile True -> False")
    decided = {key: before[key] for key in _DECISIONS if key in before}
    started = {"init_from": {**manifest["init_from"], **before.get("init_from", {})}}
    return {**manifest, **{key: kept[key] for key in _CONTENT}, **started, **decided}, changes


def earlier_decisions(folder: RunFolder, manifest: Manifest) -> Manifest:
    """The decisions of an earlier start of this run that saved no checkpoint; {} if there are none, or on another machine."""
    try:
        before: Manifest = json.loads((folder.out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    alike = isinstance(before, dict) and all({**_BEFORE, **before}.get(key) == value for key, value in manifest.items())
    return {key: before[key] for key in _DECISIONS if key in before} if alike else {}


def _hash_of_base(setup: Setup) -> str:
    """One hash of the base weights at all sites."""
    names = list(dict.fromkeys(site.parameter for site in setup.bank.sites.values()))
    with nullcontext() if setup.shards is None else setup.shards.in_step():
        found = weight_fingerprints(setup.base, names, None if setup.shards is None else setup.shards.whole)
    return hashlib.sha256(json.dumps([found[name] for name in names]).encode()).hexdigest()
