"""A run on a cluster, from the process that was started: it divides the jobs, gives the parts to workers and gathers the results.

Before anything starts, all workers must answer, have the same versions and the same base, and see the run's folder. A part whose worker is
lost goes to another, which goes on from its last checkpoint. Machines that join the cluster later take parts too.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from veneer._files import replace_text
from veneer.checkpoints.commit import candidates
from veneer.config import TrainOptions, plain, to_yaml
from veneer.errors import CheckpointError, ConfigError, Problems, TrainingError
from veneer.training.cluster.parts import RunPart, divide, part_of
from veneer.training.cluster.ray_workers import RayCluster, Slot, connected
from veneer.training.cluster.worker import Loaded, Outcome, TrainPart
from veneer.training.loss_plot import write_loss_plot
from veneer.training.parallel.agreement import versions
from veneer.training.run.console import Console
from veneer.training.run.control import Control, ask, stop_signals
from veneer.training.run.jobs import expand, match_stored_run
from veneer.training.run.result import JobResult, RunResult, differing_options
from veneer.training.run.run_folder import CONFIG, MANIFEST, PARTS, RunFolder, append_line, locked, now
from veneer.training.run.setup import common_task

_POLL = 0.5
_LOOK_SECONDS = 10.0
"""Seconds between looks for machines that have joined the cluster."""
_TRIES = 3
"""Workers that a part may lose without a new checkpoint before it is given up, and a place before it is no longer used."""


@dataclass
class LiveWorker:
    """A worker that is ready for parts. ``call``: the part in training."""

    slot: Slot
    actor: Any
    fits: int | None
    part: RunPart | None = None
    call: Any = None
    progress: dict[str, tuple[int, int, float]] = field(default_factory=dict)


def train_on_cluster(
    options: TrainOptions, out: Path, train_part: TrainPart, console: Console, *, fresh: bool
) -> RunResult:
    """Train the jobs of a run on the workers of a Ray cluster; the same call resumes.

    Args:
        options: the options of the run; ``cluster`` is "auto" or an address.
        out: the run's folder, on storage that all machines share.
        train_part: trains some of the jobs in this process; workers call it.
        console: prints the progress.
        fresh: forget an earlier run in the folder.

    Raises:
        ConfigError, TrainingError, CheckpointError: the run cannot start; nothing was written. Or parts of it could not end.
        KeyboardInterrupt: the run was stopped.
    """
    out = out.resolve()
    _check(options)
    jobs = expand(options)
    with ExitStack() as stack:
        stack.enter_context(locked(out))
        if not fresh and (out / CONFIG).is_file():
            if not (out / PARTS).is_dir():
                raise ConfigError(
                    f"{out} holds a run of one machine; leave --cluster out to resume it, or choose another --out"
                )
            jobs, _ = match_stored_run(out, jobs)
        common_task(jobs)  # jobs that need different heads are refused here, and not by a worker
        cluster = stack.enter_context(connected(options.cluster or "auto"))
        run = ClusterRun(options, jobs, out, cluster, train_part, console)
        run.begin(fresh=fresh)
        return run.finish()


def _check(options: TrainOptions) -> None:
    """Raise ConfigError for options that need all jobs in one process."""
    problems = Problems()
    if options.processes > 1:
        problems.add("processes: each worker of a cluster is one process; leave it out")
    if options.halving:
        problems.add(
            "halving compares jobs while they train, and the workers of a cluster do not wait for each other; leave it out"
        )
    problems.raise_if_any(ConfigError, "cluster")


class ClusterRun:
    """One run on the workers of a cluster."""

    def __init__(
        self,
        options: TrainOptions,
        jobs: Mapping[str, TrainOptions],
        out: Path,
        cluster: RayCluster,
        train_part: TrainPart,
        console: Console,
    ) -> None:
        self.options, self.jobs, self.out = options, jobs, out
        self.folder = RunFolder(out, single=False)
        self.cluster, self.console = cluster, console
        self._train_part = train_part
        self._workers: list[LiveWorker] = []
        self._alike: dict[str, Any] = {}
        self._parts: list[RunPart] = []
        self._waiting: deque[RunPart] = deque()
        self._results: dict[int, RunResult] = {}
        self._problems = Problems()
        self._lost_workers: Counter[object] = Counter()
        self._reached: dict[int, str] = {}
        """The newest checkpoint of each part when it last lost a worker."""
        self._control = Control(out)
        self._stopping = False
        self._looked = 0.0

    # Before the first step

    def begin(self, *, fresh: bool) -> None:
        """Check the workers, divide the jobs, and store what the run is."""
        slots = self.cluster.slots()
        self._workers = self._started(slots)
        if not self._workers:
            raise TrainingError(
                "cluster: no machine of the cluster has a free CPU for a worker; add one with `ray start --address`"
            )
        if fresh:
            self.folder.forget()
        stored = self._stored()
        if stored and stored.get("base") != self._alike["base"]:
            raise CheckpointError(
                f"the base weights are not those with which {self.out} began; put them back, or start over with --fresh"
            )
        groups = [tuple(names) for names in stored.get("parts", [])]
        known = {name for names in groups for name in names}
        added = [name for name in self.jobs if name not in known]
        fits = min((worker.fits for worker in self._workers if worker.fits is not None), default=len(self.jobs))
        groups += divide(added, len(self._workers), fits) if added else []
        self._parts = [part_of(self.options, self.jobs, self.out, n, names) for n, names in enumerate(groups, 1)]
        self._waiting.extend(self._parts)
        self.folder.prepare()
        (self.out / PARTS).mkdir(exist_ok=True)
        replace_text(self.out / CONFIG, to_yaml(plain(self.options)))
        self.folder.write_json(MANIFEST, {**self._alike, "parts": groups})
        self.console.line(
            f"{len(self.jobs)} jobs in {len(groups)} parts on {len(self._workers)} worker{'s' if self._workers[1:] else ''}: "
            f"{', '.join(worker.slot.name for worker in self._workers)}"
        )

    def _stored(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.out / MANIFEST).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.out / MANIFEST} cannot be read ({error}); restore it, or start over with --fresh"
            ) from None

    def _started(self, slots: Sequence[Slot]) -> list[LiveWorker]:
        """Workers in these places, after all checks.

        Raises ConfigError with everything in which they do not fit together.
        """
        self.console.progress(f"starting {len(slots)} workers")
        seconds = 60 * self.options.answer_minutes
        actors = [self.cluster.start(slot, self._train_part) for slot in slots]
        try:
            answers = self.cluster.answers([actor.versions.remote() for actor in actors], seconds)
            there = [
                (s, a) for s, a, answer in zip(slots, actors, answers, strict=True) if not isinstance(answer, Exception)
            ]
            for slot, answer in zip(slots, answers, strict=True):
                if isinstance(answer, Exception):
                    self.console.line(f"no worker on {slot.name}: {_first_line(answer)}")
            self._check_versions([slot for slot, _ in there], [a[1] for a in answers if not isinstance(a, Exception)])
            self._check_shared(there, seconds)
            return self._loaded(there, seconds)
        except BaseException:
            for actor in actors:
                self.cluster.end(actor)
            raise

    def _check_versions(self, slots: Sequence[Slot], found: Sequence[Mapping[str, str]]) -> None:
        here, problems = versions(), Problems()
        for slot, there in zip(slots, found, strict=True):
            for name in here:
                if here[name] != there.get(name):
                    problems.add(
                        f"the worker on {slot.name} has {name} {there.get(name)}, and this machine has {here[name]}"
                    )
        problems.raise_if_any(ConfigError, "cluster: install the same versions on all machines")
        self._alike |= here

    def _check_shared(self, there: Sequence[tuple[Slot, Any]], seconds: float) -> None:
        file, content = self.out / f".shared-{secrets.token_hex(4)}", secrets.token_hex(16)
        replace_text(file, content)
        try:
            seen = self.cluster.answers([actor.sees.remote(str(file), content) for _, actor in there], seconds)
        finally:
            file.unlink(missing_ok=True)
        problems = Problems()
        for (slot, _), sees in zip(there, seen, strict=True):
            if sees is not True:
                problems.add(f"the worker on {slot.name} does not see the files of {self.out}")
        problems.raise_if_any(ConfigError, "cluster: put --out on storage that all machines share, under the same path")

    def _loaded(self, there: Sequence[tuple[Slot, Any]], seconds: float) -> list[LiveWorker]:
        """Load the base in all workers, and compare it."""
        self.console.progress(f"loading {self.options.base} on {len(there)} workers")
        largest = max(self.jobs, key=lambda name: self.jobs[name].r)
        alone = part_of(self.options, self.jobs, self.out, 0, [largest]).options
        found = self.cluster.answers([actor.load.remote(alone, len(self.jobs)) for _, actor in there], seconds)
        problems, ready = Problems(), []
        expected = self._alike.get("base") or next((one.base for one in found if isinstance(one, Loaded)), None)
        for (slot, actor), one in zip(there, found, strict=True):
            if not isinstance(one, Loaded):
                problems.add(
                    f"the worker on {slot.name} cannot train: {one if isinstance(one, str) else _first_line(one)}"
                )
            elif one.base != expected:
                problems.add(
                    f"the worker on {slot.name} has other weights of {self.options.base} than the first; give all the same files"
                )
            else:
                ready.append(LiveWorker(slot, actor, one.fits))
        problems.raise_if_any(ConfigError, "cluster")
        if expected is not None:
            self._alike["base"] = expected
        return ready

    # Training

    def finish(self) -> RunResult:
        """Train all parts, and return the results of all jobs."""
        self.event("started", workers=[worker.slot.name for worker in self._workers])
        with self._signals():
            while self._waiting or any(worker.part for worker in self._workers):
                self._requests()
                self._look_for_workers()
                self._give()
                self._take()
        for worker in self._workers:
            self.cluster.end(worker.actor)
        self.console.clear()
        self.folder.prepare()
        write_loss_plot(self.out)
        if self._stopping and len(self._results) < len(self._parts):
            self.console.line("saved; run the same command to resume")
            raise KeyboardInterrupt
        self._problems.raise_if_any(
            TrainingError, f"{self.out}: parts of the run could not end; run the same command to resume"
        )
        return self._result()

    def _give(self) -> None:
        for worker in self._workers:
            if worker.part is None and self._waiting and not self._stopping:
                worker.part = self._waiting.popleft()
                worker.call = worker.actor.train.remote(worker.part, str(self.out))
                self.event("part_given", part=worker.part.number, jobs=worker.part.jobs, worker=worker.slot.name)
        if self._stopping:
            self._waiting.clear()

    def _take(self) -> None:
        """Wait a moment, take results, and give back the parts of workers that are lost."""
        busy = [worker for worker in self._workers if worker.part is not None]
        if not busy:
            time.sleep(_POLL)
            return
        ready = self.cluster.wait([worker.call for worker in busy], _POLL)
        for worker in busy:
            assert worker.part is not None
            if worker.call in ready:
                self._ended(worker, worker.part, self.cluster.answer(worker.call, 0.0))
            else:
                seen = self.cluster.answer(worker.actor.progress.remote(), _POLL)
                worker.progress = seen if isinstance(seen, dict) else worker.progress
        self._show()

    def _ended(self, worker: LiveWorker, part: RunPart, answer: Any) -> None:
        worker.part, worker.call, worker.progress = None, None, {}
        if isinstance(answer, Outcome) and answer.result is not None:
            self._results[part.number] = answer.result
            self.event("part_ended", part=part.number)
            for job in answer.result.jobs.values():
                why = f": {job.reason}" if job.reason else ""
                self.console.line(f"[{job.name}] {job.state} after {job.steps} steps on {worker.slot.name}{why}")
        elif isinstance(answer, Outcome):
            if answer.error:
                self._problems.add(f"{', '.join(part.jobs)}: {answer.error}")
        elif self.cluster.lost(answer):
            self._lost(worker, part)
        else:
            self._problems.add(f"{', '.join(part.jobs)}: {_first_line(answer)}")

    def _lost(self, worker: LiveWorker, part: RunPart) -> None:
        self._workers.remove(worker)
        newest = next((folder.name for folder in candidates(part.folder / "checkpoints")), "")
        if newest != self._reached.get(part.number, ""):  # it went on since the last loss, so neither is at fault
            del self._lost_workers[part.number], self._lost_workers[worker.slot]
        self._reached[part.number] = newest
        self._lost_workers[part.number] += 1
        self._lost_workers[worker.slot] += 1
        self.event("worker_lost", worker=worker.slot.name, part=part.number)
        if self._lost_workers[part.number] >= _TRIES:
            self._problems.add(
                f"{', '.join(part.jobs)}: {_TRIES} workers ended while they trained these jobs, and none reached a checkpoint"
            )
            return
        self.console.line(
            f"the worker on {worker.slot.name} is lost; its jobs go to another, from their last checkpoint"
        )
        self._waiting.appendleft(part)
        self._looked = 0.0

    def _look_for_workers(self) -> None:
        """Start workers in places that have none, while parts wait. Raises TrainingError if there is no worker left."""
        if not self._waiting or self._stopping or time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        taken = {worker.slot for worker in self._workers}
        for slot in self.cluster.slots():
            if slot not in taken and self._lost_workers[slot] < _TRIES:
                try:
                    self._workers += self._started([slot])
                except ConfigError as error:
                    self._lost_workers[slot] = _TRIES
                    self.console.line(str(error))
        if not self._workers:
            raise TrainingError(
                f"cluster: no worker is left; the run is saved in {self.out}, and the same command resumes it"
            )

    def _requests(self) -> None:
        """Hand requests in the run's folder on to the parts that have the jobs. A job that is resumed puts its part in line again."""
        for request in self._control.take(list(self.jobs), self.console.line):
            part = next(part for part in self._parts if request.job in part.jobs)
            part.folder.mkdir(parents=True, exist_ok=True)
            ask(part.folder, request.job, request.verb)
            if request.verb == "resume" and self._results.pop(part.number, None) is not None:
                self._waiting.append(part)
        self._control.forget()

    def _signals(self) -> AbstractContextManager[None]:
        """Inside this context, Ctrl-C or SIGTERM saves and stops all workers; a second one stops at once."""

        def stop() -> None:
            self._stopping = True
            self.console.line("stopping all workers after their round; press Ctrl-C again to stop at once")
            for worker in self._workers:
                worker.actor.stop.remote()

        return stop_signals(stop, lambda: self._stopping)

    # Records

    def event(self, kind: str, **values: Any) -> None:
        """Append a line to the run's events."""
        append_line(self.folder.events, {"event": kind, **values, "time": now()})

    def _show(self) -> None:
        ended = sum(len(result.jobs) for result in self._results.values())
        seen = [values for worker in self._workers for values in worker.progress.values()]
        step, steps = sum(values[0] for values in seen), sum(values[1] for values in seen)
        busy = sum(worker.part is not None for worker in self._workers)
        self.console.progress(f"{ended} of {len(self.jobs)} jobs ended  {busy} workers at step {step}/{steps}")

    def _result(self) -> RunResult:
        """The results of all jobs, in the order of the run."""
        found: dict[str, JobResult] = {}
        for result in self._results.values():
            found |= result.jobs
        changes = differing_options(self.jobs)
        return RunResult(self.out, {name: replace(found[name], changes=changes[name]) for name in self.jobs})


def _first_line(error: object) -> str:
    cause = getattr(error, "cause", None) or error
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__


__all__ = ["ClusterRun", "LiveWorker", "train_on_cluster"]
