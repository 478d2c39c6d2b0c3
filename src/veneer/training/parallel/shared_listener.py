"""The listener of a run of several processes: the first one records and decides, the others follow.

What depends on files, signals or the clock (requests, checkpoints, stopping) is decided by the first process between two rounds and sent
to all. What depends on tensors alone (sanity checks, evaluations, the end of a job) every process finds by itself, alike.
"""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from veneer.adapters import Bank
from veneer.errors import ProcessError
from veneer.training.loop.job import Job, JobState
from veneer.training.loop.trainer import Listener, Request
from veneer.training.parallel.processes import Processes
from veneer.training.run.recorder import Recorder
from veneer.training.run.sanity_checks import SanityChecks


class SharedListener(Listener):
    """Sends the decisions of the first process's recorder to the other processes."""

    def __init__(
        self,
        processes: Processes,
        jobs: Sequence[Job],
        bank: Bank,
        checks: Mapping[str, SanityChecks],
        recorder: Recorder | None,
        lent: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """``recorder``: in the first process. ``checks``: of the other processes' jobs; the recorder has its own. ``lent``: a context in
        which the first process may read the base's weights."""
        self.processes = processes
        self.jobs = list(jobs)
        self.bank = bank
        self.recorder = recorder
        self._record = recorder or Listener()
        self.checks = dict(checks) if recorder is None else {}
        self.stopped = False
        self._lent = lent

    def stepping(self, job: Job) -> None:
        """A job's gradient is complete, and its step not yet taken."""
        self._record.stepping(job)
        checks = self.checks.get(job.name)
        if checks is not None and not checks.done:
            checks.before_step(job.progress.step, job.loss)

    def stepped(self, job: Job, metrics: dict[str, float]) -> None:
        """A job took a step."""
        self._record.stepped(job, metrics)
        checks = self.checks.get(job.name)
        if checks is not None:
            checks.after_step(job.progress.step, metrics["lr"], adaptive=job.options.optimizer == "adamw")

    def evaluating(self, job: Job, done: int, total: int) -> None:
        """An evaluation is in progress."""
        self._record.evaluating(job, done, total)

    def evaluated(self, job: Job, loss: float, *, best: bool) -> None:
        """A job was evaluated."""
        with self._lent():  # the receipt of a best adapter
            self._record.evaluated(job, loss, best=best)

    def sampling(self, job: Job) -> None:
        """Samples are due."""
        self._record.sampling(job)

    def changed(self, job: Job) -> None:
        """A job was added, paused or resumed."""
        self._record.changed(job)

    def ended(self, job: Job) -> None:
        """A job finished, failed or was cancelled."""
        with self._lent():
            self._record.ended(job)

    def requests(self) -> list[Request]:
        """The first process's requests."""
        found = self._record.requests()
        sent = self.processes.share([[one.job, one.verb, one.code, one.reason] for one in found])
        return [Request(*one) for one in sent]

    def end_round(self) -> bool:
        """Compare the adapters and save a checkpoint if one is due; returns whether to continue."""
        recorder = self.recorder
        due = self.processes.share(recorder is not None and recorder.checkpoint_due())
        if due:
            self._compare()
            if recorder is not None:
                recorder.checkpoint()
        states: dict[str, Any] = {job.name: [job.state.value, job.code, job.reason] for job in self.jobs}
        sent, self.stopped = self.processes.share([states, recorder is not None and recorder.stopped])
        for job in self.jobs:
            state, code, reason = sent[job.name]
            if job.state.value != state:  # found by the first process alone: tensors that cannot be saved
                job.end(JobState(state), code, reason)
        return not self.stopped

    def _compare(self) -> None:
        """Raise ProcessError in all processes if their adapters differ."""
        jobs = [job for job in self.jobs if job.state is not JobState.FAILED]
        hashes = self.processes.gather({job.name: self._hash(job) for job in jobs})
        for rank, found in enumerate(hashes):
            different = [name for name, digest in hashes[0].items() if found.get(name) != digest]
            if different:
                raise ProcessError(
                    f'process {rank} holds a different adapter "{different[0]}" from process 0 after the same steps, so nothing was saved; '
                    "run the same command to resume from the last checkpoint, and check the hardware if it happens again"
                )

    def _hash(self, job: Job) -> str:
        digest = hashlib.sha256()
        for parameter in self.bank[job.name].parameters():
            digest.update(parameter.detach().cpu().contiguous().flatten().numpy().tobytes())
        return digest.hexdigest()

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """The first process answers signals; the others go on until it tells them to stop."""
        if self.recorder is not None:
            with self.recorder.handle_signals():
                yield
            return
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
