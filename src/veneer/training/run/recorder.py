"""The listener of a run: figures and events into files, the course onto the screen, checkpoints by steps and by the clock."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

from veneer.errors import CheckpointError, TrainingError
from veneer.training.acceleration import Faster
from veneer.training.loop.halving import Halving
from veneer.training.loop.job import Job, State
from veneer.training.loop.trainer import Listener, Request
from veneer.training.run.checkpointing import Saver
from veneer.training.run.console import Screen, duration, resident_memory
from veneer.training.run.control import Control
from veneer.training.run.run_folder import RunFiles, append_line, now
from veneer.training.run.sanity_checks import FirstSteps
from veneer.training.run.trackers import Track

_LATEST = 20
"""So many steps tell the pace."""


class Recorder(Listener):
    """Writes down a run's course and has its state saved. One per process."""

    def __init__(self, files: RunFiles, jobs: list[Job], saver: Saver, screen: Screen, *, rounds: int = 0) -> None:
        """rounds: how many the run has behind it."""
        self.files = files
        self.jobs = list(jobs)
        self.saver = saver
        self.screen = screen
        self.stopped = False
        self.saved = True
        """Whether the last checkpoint that was due could be written."""
        self.watches: dict[str, FirstSteps] = {}
        self.halving: Halving | None = None
        self.track: Track | None = None
        self.faster: Faster | None = None
        self.rounds = rounds
        self._control = Control(files.out)
        self._urgent = False
        self._saved_at, self._saved_time = rounds, time.monotonic()
        self._taken: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=_LATEST)

    # The trainer's questions

    def stepping(self, job: Job) -> None:
        """A job's gradient is whole, its step not yet taken."""
        if job.name in self.watches:
            self.watches[job.name].before_step(job.progress.step)

    def stepped(self, job: Job, figures: dict[str, float]) -> None:
        """A job took a step."""
        seconds, pace = self._pace(int(figures["tokens"]))
        speed = {"tokens_per_second": round(pace, 1), "memory_gb": round(resident_memory(), 3)}
        self._append(job, {"step": job.progress.step, **figures, **speed})
        if (watch := self.watches.get(job.name)) is not None:
            watch.after_step(
                job.progress.step, figures["loss"], figures["lr"], adaptive=job.options.optimizer == "adamw"
            )
        self._show(job, figures, pace, seconds)

    def _pace(self, tokens: int) -> tuple[float, float]:
        """(seconds a step, tokens a second) over the latest steps. The first step also waits for compilers and the first look at the
        held-out examples, so it counts until there is another and no longer."""
        if len(self._taken) == 2 and not self._taken[0][1]:
            self._taken.popleft()
        self._taken.append((time.monotonic(), tokens))
        (began, _), *after = self._taken
        seconds = max(1e-9, after[-1][0] - began)
        return seconds / len(after), sum(count for _, count in after) / seconds

    def judging(self, job: Job, done: int, total: int) -> None:
        """A look at held-out examples goes on."""
        if self.screen.live:
            self.screen.progress(f"{self._who(job)}step {job.progress.step}: judged {done} of {total} examples")

    def evaluated(self, job: Job, loss: float, *, best: bool) -> None:
        """A job was judged on its held-out examples."""
        known = loss if math.isfinite(loss) else None
        line: dict[str, Any] = {"step": job.progress.step, "held_out_loss": known, "best": best}
        said = f"held-out loss {loss:.4f}{_since_start(job.progress.evaluations)}"
        if job.progress.general:
            general = job.progress.general[-1][1]
            line["general_loss"] = general if math.isfinite(general) else None
            said += f", general text {general:.4f}{_since_start(job.progress.general)}"
        self._append(job, line)
        self.screen.line(f"{self._who(job)}step {job.progress.step}: {said}")
        if best and job.progress.step:
            problem = self.saver.adapter(job, best=True)
            if problem is not None:
                self.screen.line(f"{self._who(job)}the best adapter is not saved: {problem}")

    def changed(self, job: Job) -> None:
        """A job joined, was paused, or goes on."""
        if job not in self.jobs:
            self.jobs.append(job)
        self._urgent = True
        self.event("job_changed", job=job.name, state=job.state.value, step=job.progress.step)
        self.screen.line(f"{self._who(job)}{job.state.value} at step {job.progress.step}")

    def ended(self, job: Job) -> None:
        """A job left the run."""
        ending = {"state": job.state.value, "code": job.code, "reason": job.reason, "step": job.progress.step}
        self.event("job_ended", job=job.name, **ending)
        said = job.reason
        if job.state is State.FAILED:
            kept = self.saver.roll_back(job)
            what = (
                "no state of it was saved yet" if kept is None else f"its state of step {kept} is kept in checkpoints/"
            )
            said = f"{job.reason}; {what}"
        if said:
            self.screen.line(f"{self._who(job)}{job.state.value}: {said}")
        self._urgent |= job.state is State.CANCELLED
        if job.state is State.FINISHED:
            problem = self.saver.adapter(job, best=False)
            if problem is not None:
                self.screen.line(f"{self._who(job)}the adapter is not saved yet: {problem}")

    def requests(self) -> list[Request]:
        """What the run's folder and the rungs of a sweep ask for."""
        try:
            asked = self._control.take([job.name for job in self.jobs])
        except (TrainingError, OSError) as error:
            self.screen.line(f"{error}; nothing was done about it")
            asked = []
        self._urgent |= bool(asked)
        return asked + (self.halving.losers(self.jobs) if self.halving is not None else [])

    def round_over(self) -> bool:
        """Every job stands between two steps; returns whether to go on."""
        self.rounds += 1
        if self.faster is not None:
            self.faster.after_round()
        every, minutes = self.jobs[0].options.save_every, self.jobs[0].options.checkpoint_minutes
        due = self._urgent or (every is not None and self.rounds - self._saved_at >= every)
        due |= minutes is not None and time.monotonic() - self._saved_time >= 60 * minutes
        if due or self.stopped or not any(job.running for job in self.jobs):
            self.checkpoint()
        return not self.stopped

    def settle(self) -> None:
        """No job runs any more: save what was asked for of jobs that stand still."""
        if self._urgent:
            self.checkpoint()

    # Saving

    def checkpoint(self) -> bool:
        """Save the run's state; a disk that is full is told, and training goes on from the last good one."""
        self._end_what_is_broken()
        self.event("checkpoint", round=self.rounds)
        try:
            self.saver.checkpoint(self.jobs, self.rounds)
            self._control.forget()
            self.saved, self._urgent = True, False
        except (OSError, CheckpointError) as error:
            self.saved = False
            self.screen.line(f"no checkpoint at round {self.rounds}: {error}; training goes on from the last good one")
            self.event("checkpoint_failed", round=self.rounds, reason=str(error))
        finally:
            self._saved_at, self._saved_time = self.rounds, time.monotonic()
        return self.saved

    def _end_what_is_broken(self) -> None:
        """A job whose tensors are not finite has no state that is worth saving, and must not keep its neighbours from saving theirs."""
        for job in self.jobs:
            try:
                if job.running:
                    job.check_finite()
            except TrainingError as error:
                job.end(State.FAILED, error.code, str(error))
                job.error = error
                self.ended(job)

    def finish(self) -> list[str]:
        """Write again what could not be written; returns what is still missing."""
        for job in self.jobs:
            if job.state is State.FINISHED and (job.name in self.saver.unsaved or not self._has_adapter(job)):
                self.saver.adapter(job, best=False)
        return [f"the adapter of {name}: {problem}" for name, problem in self.saver.unsaved.items()]

    def _has_adapter(self, job: Job) -> bool:
        return (self.files.adapter(job.name) / "adapter_config.json").is_file()

    # Telling

    def _show(self, job: Job, figures: dict[str, float], pace: float, seconds: float) -> None:
        left = sum(max(0, other.steps - other.progress.step) for other in self.jobs if other.running)
        remaining = "" if self._taken[0][1] == 0 else f"  {duration(left * seconds)} left"
        self.screen.progress(
            f"{self._who(job)}step {job.progress.step}/{job.steps}  loss {figures['loss']:.4f}  lr {figures['lr']:.2e}  "
            f"{pace:,.0f} tokens/s  {resident_memory():.2f} GB{remaining}",
            important=job.progress.step in (1, job.steps),
        )

    def _who(self, job: Job) -> str:
        return "" if len(self.jobs) == 1 else f"[{job.name}] "

    def _append(self, job: Job, line: dict[str, Any]) -> None:
        try:
            append_line(self.files.metrics(job.name), {**line, "time": now()})
        except OSError as error:
            self.screen.line(f"{self._who(job)}figures of step {job.progress.step} are not written: {error.strerror}")
        if self.track is not None:
            self.track.log(job.name, line)

    def event(self, kind: str, **values: Any) -> None:
        """Add a line to the run's events."""
        try:
            append_line(self.files.events, {"event": kind, **values, "time": now()})
        except OSError as error:
            self.screen.line(f"the event {kind} is not written: {error.strerror}")

    # Ctrl-C

    def listen(self) -> Callable[[], None]:
        """Once Ctrl-C (or SIGTERM) saves and stops, twice stops now. Returns what puts the handlers back."""
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def handle(number: int, frame: FrameType | None) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True
            self.screen.line("stopping after this round and saving; once more stops now")

        for number in before:
            signal.signal(number, handle)

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        return restore


def _since_start(looks: list[tuple[int, float]]) -> str:
    """How the last of some losses differs from the first."""
    first, last = looks[0][1], looks[-1][1]
    return "" if len(looks) == 1 else f" ({100 * (last - first) / first:+.1f} % since step 0)"
