"""The listener of a run: writes metrics and events to files, shows progress on the console, and saves checkpoints by steps and time."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import Any

from veneer.errors import CheckpointError, TrainingError
from veneer.training.device_memory import DeviceMemory
from veneer.training.loop.halving import Halving
from veneer.training.loop.job import Job, JobState
from veneer.training.loop.trainer import Listener, Request
from veneer.training.run.console import Console, duration
from veneer.training.run.control import Control, stop_signals
from veneer.training.run.run_folder import RunFolder, append_line, now
from veneer.training.run.sanity_checks import SanityChecks
from veneer.training.run.saver import Saver
from veneer.training.run.trackers import ExperimentTracker
from veneer.training.samples import Sampler, wants_samples
from veneer.training.shared_base import Watcher

_LATEST = 20
"""Steps over which the speed is averaged."""


class Recorder(Listener):
    """Records the progress of a run and saves its state. One per process."""

    def __init__(
        self,
        folder: RunFolder,
        jobs: list[Job],
        saver: Saver,
        console: Console,
        *,
        rounds: int = 0,
        checks: Mapping[str, SanityChecks] | None = None,
        halving: Halving | None = None,
        sampler: Sampler | None = None,
        memory: DeviceMemory | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        """``rounds`` is the number of rounds that the run has completed; ``checks`` are the sanity checks by job; ``memory`` is that of
        the base's device."""
        self.folder = folder
        self.jobs = list(jobs)
        self.saver = saver
        self.console = console
        self.rounds = rounds
        self.checks = checks or {}
        self.halving = halving
        self.sampler = sampler
        self.memory = memory or DeviceMemory()
        self.watcher = watcher or Watcher()
        self.tracker: ExperimentTracker | None = None
        self.stopped = False
        self.saved = True
        """The last checkpoint that was due could be written."""
        self._control = Control(folder.out)
        self._urgent = False
        self._saved_at, self._saved_time = rounds, time.monotonic()
        self._recent: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=_LATEST)

    # Events of the trainer

    def stepping(self, job: Job) -> None:
        """A job's gradient is complete, and its step not yet taken."""
        checks = self.checks.get(job.name)
        # The loss is on the base's device, and reading it makes the host wait.
        if checks is not None and not checks.done:
            checks.before_step(job.progress.step, job.loss)

    def stepped(self, job: Job, metrics: dict[str, float]) -> None:
        """A job took a step."""
        seconds, speed = self._speed(int(metrics["tokens"]))
        measured = {"tokens_per_second": round(speed, 1), "memory_gb": round(self.memory.used() / 1e9, 3)}
        self._append(job, {"step": job.progress.step, **metrics, **measured})
        if (checks := self.checks.get(job.name)) is not None:
            warning = checks.warning(job.progress.step, metrics["loss"])
            if warning is not None:
                self.event("warning", job=job.name, reason=warning)
                self.console.line(f"{self._prefix(job)}{warning}")
            checks.after_step(job.progress.step, metrics["lr"], adaptive=job.options.optimizer == "adamw")
        self._show(job, metrics, speed, seconds)

    def _speed(self, tokens: int) -> tuple[float, float]:
        """(seconds per step, tokens per second) over the latest steps. The first step includes the first evaluation, so
        it is dropped as soon as there is a second one."""
        if len(self._recent) == 2 and not self._recent[0][1]:
            self._recent.popleft()
        self._recent.append((time.monotonic(), tokens))
        (began, _), *after = self._recent
        seconds = max(1e-9, after[-1][0] - began)
        return seconds / len(after), sum(count for _, count in after) / seconds

    def evaluating(self, job: Job, done: int, total: int) -> None:
        """An evaluation is in progress."""
        if self.console.live:
            self.console.progress(f"{self._prefix(job)}step {job.progress.step}: evaluated {done} of {total} examples")

    def evaluated(self, job: Job, loss: float, *, best: bool) -> None:
        """A job was evaluated on its held-out examples."""
        line: dict[str, Any] = {"step": job.progress.step, "held_out_loss": _finite(loss), "best": best}
        text = f"held-out loss {loss:.4f}{_change(job.progress.evaluations)}"
        if job.progress.figures:
            figures = job.progress.figures[-1][1]
            line |= {f"held_out_{name}": _finite(value) for name, value in figures.items()}
            text += "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
        if job.progress.general:
            general = job.progress.general[-1][1]
            line["general_loss"] = _finite(general)
            text += f", general text {general:.4f}{_change(job.progress.general)}"
        self._append(job, line)
        self.console.line(f"{self._prefix(job)}step {job.progress.step}: {text}")
        if best and (job.progress.step or job.options.init_from is not None):
            problem = self.saver.save_adapter(job, best=True)
            if problem is not None:
                self.console.line(f"{self._prefix(job)}the best adapter was not saved: {problem}")

    def sampling(self, job: Job) -> None:
        """Generate, print and store the sample answers of a job. A failure costs the samples only."""
        if self.sampler is None or not wants_samples(job):
            return
        began = time.monotonic()
        try:
            for sample in self.sampler.samples(job, partial(self._show_sampling, job)):
                line = {"step": job.progress.step, **asdict(sample), "time": now()}
                self.folder.samples(job.name).parent.mkdir(exist_ok=True)
                append_line(self.folder.samples(job.name), line)
                self.console.line("\n".join([f"{self._prefix(job)}step {job.progress.step}: sample", *sample.lines()]))
        except Exception as error:  # whatever the base's generation raises, the training is not to end with it
            self.console.line(
                f"{self._prefix(job)}step {job.progress.step}: no more samples, because generation failed: {error}"
            )
            self.event("samples_failed", job=job.name, reason=str(error))
            self.sampler = None
        # Generation is not part of the speed of training.
        took = time.monotonic() - began
        self._recent = deque(((at + took, tokens) for at, tokens in self._recent), maxlen=_LATEST)

    def _show_sampling(self, job: Job, done: int, total: int) -> None:
        if self.console.live:
            self.console.progress(f"{self._prefix(job)}step {job.progress.step}: generated {done} of {total} samples")

    def changed(self, job: Job) -> None:
        """A job was added, paused or resumed."""
        if job not in self.jobs:
            self.jobs.append(job)
        self._urgent = True
        self.event("job_changed", job=job.name, state=job.state.value, step=job.progress.step)
        self.console.line(f"{self._prefix(job)}{job.state.value} at step {job.progress.step}")

    def ended(self, job: Job) -> None:
        """A job finished, failed or was cancelled."""
        ending = {"state": job.state.value, "code": job.code, "reason": job.reason, "step": job.progress.step}
        self.event("job_ended", job=job.name, **ending)
        if job.state is JobState.FAILED:
            self.saver.roll_back(job)
            if len(self.jobs) > 1:  # the failure of a single job is an error, which the caller prints
                self.console.line(f"{self._prefix(job)}failed: {job.reason}; {self.saver.kept(job)}")
        elif job.reason:
            self.console.line(f"{self._prefix(job)}{job.state.value}: {job.reason}")
        self._urgent |= job.state is JobState.CANCELLED
        if job.state is JobState.FINISHED:
            problem = self.saver.save_adapter(job, best=False)
            if problem is not None:
                self.console.line(f"{self._prefix(job)}the adapter is not saved yet: {problem}")

    def requests(self) -> list[Request]:
        """Requests from the run's folder and from the rungs of a sweep."""
        requests = self._control.take([job.name for job in self.jobs], self.console.line)
        self._urgent |= bool(requests)
        return requests + (self.halving.losers(self.jobs) if self.halving is not None else [])

    def end_round(self) -> bool:
        """Save a checkpoint if one is due; returns whether to continue."""
        if self.checkpoint_due():
            self.checkpoint()
        return not self.stopped

    def checkpoint_due(self) -> bool:
        """Count a round; returns whether a checkpoint is due after it."""
        self.rounds += 1
        self.stopped |= self.watcher.wants_stop()
        every, minutes = self.jobs[0].options.save_every, self.jobs[0].options.checkpoint_minutes
        due = (
            self._urgent
            or self.watcher.wants_checkpoint()
            or (every is not None and self.rounds - self._saved_at >= every)
        )
        due |= minutes is not None and time.monotonic() - self._saved_time >= 60 * minutes
        return due or self.stopped or not any(job.running for job in self.jobs)

    # Saving

    def checkpoint(self) -> bool:
        """Save the run's state. If the disk is full, the console says so and training continues."""
        self._fail_non_finite_jobs()
        self.event("checkpoint", round=self.rounds)
        try:
            for job in self.jobs:
                if job.name not in self.saver.lost:
                    self.watcher.checkpoint(job, partial(self.saver.write_adapter, job))
            self.saver.checkpoint(self.jobs, self.rounds)
            self._control.forget()
            self.saved, self._urgent = True, False
        except (OSError, CheckpointError) as error:
            self.saved = False
            self.console.line(f"checkpoint at round {self.rounds} failed: {error}; the last good checkpoint is kept")
            self.event("checkpoint_failed", round=self.rounds, reason=str(error))
        finally:
            self._saved_at, self._saved_time = self.rounds, time.monotonic()
        return self.saved

    def _fail_non_finite_jobs(self) -> None:
        """A job with tensors that are not finite must not be saved, nor keep the others from being saved."""
        for job in self.jobs:
            try:
                if job.running:
                    job.check_finite()
            except TrainingError as error:
                job.end(JobState.FAILED, error.code, str(error))
                job.error = error
                self.ended(job)

    def save_requests(self) -> None:
        """Save requests that were applied to jobs that do not run."""
        if self._urgent:
            self.checkpoint()

    def save_missing_adapters(self) -> list[str]:
        """Write adapters that could not be written before; returns what is still missing."""
        for job in self.jobs:
            written = job.name not in self.saver.unsaved and self.folder.has_adapter(job.name)
            if job.state is JobState.FINISHED and not written:
                self.saver.save_adapter(job, best=False)
        return [f"the adapter of {name}: {problem}" for name, problem in self.saver.unsaved.items()]

    # Files and console

    def _show(self, job: Job, metrics: dict[str, float], speed: float, seconds: float) -> None:
        left = sum(max(0, other.steps - other.progress.step) for other in self.jobs if other.running)
        remaining = "" if self._recent[0][1] == 0 else f"  {duration(left * seconds)} left"
        self.console.advance(1 - left / max(1, left + sum(other.progress.step for other in self.jobs)))
        self.console.progress(
            f"{self._prefix(job)}step {job.progress.step}/{job.steps}  loss {metrics['loss']:.4f}{remaining}  "
            f"{speed:,.0f} tokens/s  lr {metrics['lr']:.2e}  {self._memory()}",
            important=job.progress.step in (1, job.steps),
        )

    def _memory(self) -> str:
        """Memory in use; on a GPU its peak, and what is left."""
        left = self.memory.free() if self.memory.name else None
        if left is None:
            return f"{self.memory.used() / 1e9:.2f} GB"
        return f"peak {self.memory.highest() / 1e9:.1f} GB, {left / 1e9:.1f} GB free on {self.memory.name}"

    def _prefix(self, job: Job) -> str:
        return "" if len(self.jobs) == 1 else f"[{job.name}] "

    def _append(self, job: Job, line: dict[str, Any]) -> None:
        try:
            append_line(self.folder.metrics(job.name), {**line, "time": now()})
        except OSError as error:
            self.console.line(
                f"{self._prefix(job)}metrics of step {job.progress.step} were not written: {error.strerror}"
            )
        if self.tracker is not None:
            self.tracker.log(job.name, line)
        self.watcher.line(job, line)

    def event(self, kind: str, **values: Any) -> None:
        """Append a line to the run's events."""
        try:
            append_line(self.folder.events, {"event": kind, **values, "time": now()})
        except OSError as error:
            self.console.line(f"the event {kind} was not written: {error.strerror}")

    def handle_signals(self) -> AbstractContextManager[None]:
        """Inside this context, Ctrl-C or SIGTERM saves and stops after the current round; a second one stops at once."""

        def stop() -> None:
            self.stopped = True
            self.console.line("stopping after this step and saving; press Ctrl-C again to stop at once")

        return stop_signals(stop, lambda: self.stopped)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _change(losses: list[tuple[int, float]]) -> str:
    """The change of the last loss from the first, in percent, or in words if the percentage would round to nothing."""
    first, last = losses[0][1], losses[-1][1]
    if len(losses) == 1 or not (math.isfinite(first) and math.isfinite(last) and first > 0):
        return ""
    change = 100 * (last - first) / first
    return " (unchanged)" if abs(change) < 0.05 else " (close to 0)" if change < -99.9 else f" ({change:+.1f} %)"
