"""Checkpoints of a run's state between two rounds, and adapter folders.

If the disk is full, the run continues and its last good checkpoint stays; an adapter that could not be written is written when the same
command runs again. A job that failed keeps the state of its last good checkpoint in all later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer._files import sync
from veneer.adapters import Bank
from veneer.checkpoints.commit import candidates, commit, verified
from veneer.checkpoints.run_state import job_tensors, read_state, restore_job, write_state
from veneer.errors import CheckpointError, VeneerError
from veneer.training.loop.job import Job, JobState, Progress
from veneer.training.run.run_folder import RunFolder

_STORED_NAMES = {"evaluations_without_gain": "looks_without_gain"}
"""Fields of `Progress` that have another name in ``state.json``."""


class Saver:
    """Saves and restores the jobs of one run."""

    def __init__(
        self, folder: RunFolder, bank: Bank, receipt: Callable[[Job], dict[str, Any]], *, base_name: str
    ) -> None:
        """``receipt`` makes the provenance that is stored with a job's adapter."""
        self.folder = folder
        self.bank = bank
        self.receipt = receipt
        self.base_name = base_name
        self.unsaved: dict[str, str] = {}
        """Finished jobs whose adapter could not be written -> the reason."""
        self.lost: set[str] = set()
        """Jobs that failed before a good state of theirs was saved."""
        self.damaged: list[str] = []
        """Checkpoints newer than the restored one that do not match their manifests."""

    def checkpoint(self, jobs: list[Job], rounds: int) -> None:
        """Save the state of all jobs after ``rounds`` rounds.

        Raises OSError or CheckpointError if it cannot be saved. Earlier checkpoints are unchanged then.
        """
        tensors: dict[str, Tensor] = {}
        for job in jobs:
            if job.name not in self.lost:
                tensors |= job_tensors(job.name, self.bank[job.name], job.optimizer)
        names = [job.name for job in jobs]
        for path in self.folder.growing(names).values():
            if path.exists():
                sync(path)
        state = {"round": rounds, "jobs": {job.name: self._state_of(job) for job in jobs}}
        state["lengths"] = self.folder.lengths(names)
        commit(self.folder.checkpoints, f"step-{rounds:08d}", lambda folder: write_state(folder, tensors, state))

    def _state_of(self, job: Job) -> dict[str, Any]:
        return {
            "progress": {_STORED_NAMES.get(key, key): value for key, value in asdict(job.progress).items()},
            "draws": self.bank[job.name].draws,
            "expert_tokens": {stack: n.tolist() for stack, n in self.bank[job.name].expert_tokens.items()},
            "state": job.state.value,
            "code": job.code,
            "reason": job.reason,
            "saved": job.name not in self.unsaved,
            "kept": job.name not in self.lost,
        }

    def restore(self, jobs: list[Job], resume_from: str | None, *, writes: bool = True) -> int | None:
        """Restore jobs from the named checkpoint, or from the newest one that verifies. Newer ones and lines written since are removed
        if it ``writes``.

        Returns:
            The checkpoint's round; None if there is no checkpoint. Jobs that the checkpoint does not hold stay at their beginning.

        Raises:
            CheckpointError: the named checkpoint is missing or damaged, or all checkpoints are damaged.
        """
        folders = candidates(self.folder.checkpoints)
        if resume_from is not None:
            have = ", ".join(folder.name for folder in folders) or "none"
            folders = [folder for folder in folders if folder.name == resume_from]
            if not folders:
                raise CheckpointError(f"{self.folder.out} has no checkpoint {resume_from}; it has: {have}")
        folder = next((found for found in folders if verified(found)), None)
        names = [job.name for job in jobs]
        if folder is None:
            if folders:
                many = f"all {len(folders)} checkpoints are damaged"
                raise CheckpointError(
                    f"{self.folder.out} cannot be resumed: {many if folders[1:] else f'{folders[0]} is damaged'} and does not match its "
                    "manifest; restore it from a copy, or start over with --fresh"
                )
            if writes:
                self.folder.cut({}, names)
            return None
        self.damaged = [newer.name for newer in folders[: folders.index(folder)]]
        tensors, state = read_state(folder)
        for job in jobs:
            if job.name in state["jobs"]:
                self._restore(job, tensors, state["jobs"][job.name])
        if not writes:
            return int(state["round"])
        self.folder.cut(state["lengths"], names)
        if resume_from is not None:
            self.folder.forget_after(folder)
        return int(state["round"])

    def _restore(self, job: Job, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
        job.state, job.code, job.reason = JobState(saved["state"]), saved["code"], saved["reason"]
        if not saved["saved"]:
            self.unsaved[job.name] = "the disk was full"
        if saved["kept"]:
            self._restore_tensors(job, tensors, saved)
        else:
            self.lost.add(job.name)

    def _restore_tensors(self, job: Job, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
        restore_job(job.name, tensors, self.bank[job.name], job.optimizer)
        progress = dict(saved["progress"])
        for name, stored in _STORED_NAMES.items():
            progress[name] = progress.pop(stored)
        for key in ("evaluations", "general"):
            progress[key] = [(int(step), float(loss)) for step, loss in progress.get(key, [])]
        progress["figures"] = [(int(step), dict(figures)) for step, figures in progress.get("figures", [])]
        job.progress = Progress(**progress)
        tokens = {stack: torch.tensor(counts) for stack, counts in saved.get("expert_tokens", {}).items()}
        self.bank[job.name].counters = saved["draws"], self.bank[job.name].expert_tokens | tokens

    def roll_back(self, job: Job) -> None:
        """Put a failed job back to its last good checkpoint, if there is one."""
        with suppress(OSError, CheckpointError):
            for folder in candidates(self.folder.checkpoints):
                if verified(folder):
                    tensors, state = read_state(folder)
                    saved = state["jobs"].get(job.name)
                    if saved is not None and saved["kept"]:
                        self._restore_tensors(job, tensors, saved)
                        return
        self.lost.add(job.name)

    def kept(self, job: Job) -> str:
        """A clause that says which state of a failed job is kept."""
        if job.name in self.lost:
            return "no state of it was saved yet"
        return f"its state of step {job.progress.step} is kept in checkpoints/"

    def write_adapter(self, job: Job, path: Path) -> None:
        """Write a job's present adapter as a folder. Raises OSError or CheckpointError if it cannot be written."""
        self.bank.save(job.name, path, base_name=self.base_name, receipt=self.receipt(job), template=job.template)

    def save_adapter(self, job: Job, *, best: bool) -> str | None:
        """Write a job's adapter folder; returns the problem if there is one."""
        path = self.folder.best(job.name) if best else self.folder.adapter(job.name)
        try:
            self.write_adapter(job, path)
        except (OSError, VeneerError) as error:
            if not best:
                self.unsaved[job.name] = str(error)
            return str(error)
        if not best:
            self.unsaved.pop(job.name, None)
        return None
