"""What a run saves: its state between two rounds, and adapters that others can load.

A disk that is full costs what it would have held and nothing else: the run goes on from the last good checkpoint, and an adapter that
could not be written is written when the same command runs again. A job that failed keeps the state of its last good checkpoint, in
every later one too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from veneer._files import sync
from veneer.adapters import Bank
from veneer.checkpoints.commit import candidates, commit, verified
from veneer.checkpoints.run_state import job_tensors, read_state, restore_job, write_state
from veneer.errors import CheckpointError, VeneerError
from veneer.training.loop.job import Job, Progress, State
from veneer.training.run.run_folder import RunFiles

Receipt = Callable[[Job], dict[str, Any]]


class Saver:
    """Saves and restores the jobs of one run."""

    def __init__(self, files: RunFiles, bank: Bank, receipt: Receipt, *, base_name: str) -> None:
        self.files = files
        self.bank = bank
        self.receipt = receipt
        self.base_name = base_name
        self.unsaved: dict[str, str] = {}
        """Finished jobs whose adapter could not be written, and why."""
        self.lost: set[str] = set()
        """Jobs that failed before there was a good state of theirs to keep."""
        self.damaged: list[str] = []
        """Checkpoints newer than the one that was restored, which no longer agree with their manifests."""

    def checkpoint(self, jobs: list[Job], rounds: int) -> None:
        """Save the state of all jobs after so many rounds.

        Raises OSError or CheckpointError where it cannot be saved; what was saved before is as it was.
        """
        tensors: dict[str, Tensor] = {}
        for job in jobs:
            if job.name not in self.lost:
                tensors |= job_tensors(job.name, self.bank[job.name], job.optimizer)
        names = [job.name for job in jobs]
        for path in self.files.growing(names).values():
            if path.exists():
                sync(path)
        state = {"round": rounds, "jobs": {job.name: self._numbers(job) for job in jobs}}
        state["lengths"] = self.files.lengths(names)
        commit(self.files.checkpoints, f"step-{rounds:08d}", lambda folder: write_state(folder, tensors, state))

    def _numbers(self, job: Job) -> dict[str, Any]:
        return {
            "progress": asdict(job.progress),
            "draws": self.bank[job.name].draws,
            "state": job.state.value,
            "code": job.code,
            "reason": job.reason,
            "saved": job.name not in self.unsaved,
            "kept": job.name not in self.lost,
        }

    def restore(self, jobs: list[Job], resume_from: str | None) -> int | None:
        """Put the newest checkpoint that verifies (or the named one) into the jobs; returns its round, None where there is none.

        Jobs that it does not know are left at their beginning. Raises CheckpointError where the named one is missing or damaged, or all
        of them are damaged.
        """
        folders = candidates(self.files.checkpoints)
        if resume_from is not None:
            have = ", ".join(folder.name for folder in folders) or "none"
            folders = [folder for folder in folders if folder.name == resume_from]
            if not folders:
                raise CheckpointError(f"{self.files.out} has no checkpoint {resume_from}; it has: {have}")
        folder = next((found for found in folders if verified(found)), None)
        names = [job.name for job in jobs]
        if folder is None:
            if folders:
                what = (
                    f"{folders[0]} is damaged" if len(folders) == 1 else f"all {len(folders)} checkpoints are damaged"
                )
                raise CheckpointError(
                    f"{self.files.out} cannot go on: {what}, not what the manifest says; bring it back from a copy, or start over "
                    "with --fresh"
                )
            self.files.cut({}, names)
            return None
        self.damaged = [newer.name for newer in folders[: folders.index(folder)]]
        tensors, state = read_state(folder)
        for job in jobs:
            if job.name in state["jobs"]:
                self._restore(job, tensors, state["jobs"][job.name])
        self.files.cut(state["lengths"], names)
        if resume_from is not None:
            self.files.forget_after(folder)
        return int(state["round"])

    def _restore(self, job: Job, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
        job.state, job.code, job.reason = State(saved["state"]), saved["code"], saved["reason"]
        if not saved["saved"]:
            self.unsaved[job.name] = "the disk was full"
        if saved["kept"]:
            self._restore_tensors(job, tensors, saved)
        else:
            self.lost.add(job.name)

    def _restore_tensors(self, job: Job, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
        restore_job(job.name, tensors, self.bank[job.name], job.optimizer)
        progress = saved["progress"]
        looks = {key: [(int(s), float(v)) for s, v in progress.get(key, [])] for key in ("evaluations", "general")}
        job.progress = Progress(**{**progress, **looks})
        self.bank[job.name].draws = saved["draws"]

    def roll_back(self, job: Job) -> int | None:
        """Put a failed job back to its last good checkpoint; returns the step that it stood at, None where there is no such checkpoint."""
        try:
            for folder in candidates(self.files.checkpoints):
                if verified(folder):
                    tensors, state = read_state(folder)
                    saved = state["jobs"].get(job.name)
                    if saved is not None and saved["kept"]:
                        self._restore_tensors(job, tensors, saved)
                        return job.progress.step
        except (OSError, CheckpointError):
            pass
        self.lost.add(job.name)
        return None

    def adapter(self, job: Job, *, best: bool) -> str | None:
        """Write a job's adapter as a folder that others can load; returns what went wrong, None where nothing did."""
        path = self.files.best(job.name) if best else self.files.adapter(job.name)
        try:
            self.bank.save(job.name, path, base_name=self.base_name, receipt=self.receipt(job), template=job.template)
        except (OSError, VeneerError) as error:
            if not best:
                self.unsaved[job.name] = str(error)
            return str(error)
        if not best:
            self.unsaved.pop(job.name, None)
        return None
