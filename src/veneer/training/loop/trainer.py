"""Train many jobs on one base, in rounds.

In a round every running job takes one optimizer step. The examples of a job are cut into pieces of at most ``tokens_per_pass`` tokens,
independently of the other jobs, since dropout is drawn per piece. Several processes share the pieces
(``training/parallel/processes.py``). Small pieces of several jobs then share a pass of up to ``tokens_per_shared_pass`` tokens; larger
ones run in turn. A job steps as soon as its last piece is done. Between rounds jobs are
cancelled, paused, resumed and added, and checkpoints are saved, so the rest of a run depends only on the states of its jobs.

An error ends only the job that causes it: rows that cannot be read, a loss that is not finite, a pass that raises. If a shared pass
raises, its pieces run again one by one to find the job at fault; the failed pass has added nothing to any gradient.

A single job is a round of one job.

Boundary: the trainer knows jobs and batches. Files, the console and the clock belong to the listener.
"""

from __future__ import annotations

import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from veneer.adapters.runtime.route import MixLike
from veneer.data.batch import make_batch, packed
from veneer.data.example import Example
from veneer.errors import DataError, ProcessError, TrainingError, VeneerError
from veneer.evaluate.losses import Losses, example_losses
from veneer.kernels.waiting_threads import WaitingThreads
from veneer.models.devices import device_of
from veneer.training.device_memory import DeviceMemory, memory_of
from veneer.training.loop.job import Job, JobState
from veneer.training.loop.pieces import Piece, passes
from veneer.training.loop.step import JobLoss, Stepper
from veneer.training.parallel.evaluation import EvaluationTeam
from veneer.training.parallel.numbering import Numbering
from veneer.training.parallel.processes import ALONE, Processes, deal
from veneer.training.parallel.reduction import Fault, JobSum
from veneer.training.process_memory import Heap
from veneer.training.tasks import TaskScores

Verb = Literal["cancel", "pause", "resume"]


@dataclass(frozen=True)
class Request:
    """A requested change of a job. ``code`` and ``reason`` are recorded in a job that is cancelled."""

    job: str
    verb: Verb
    code: str = "cancelled"
    reason: str = ""


class Listener:
    """Receives the events of a run, and provides requests and new jobs. The methods of this class do nothing."""

    def stepping(self, job: Job) -> None:
        """A job's gradient is complete, and its step not yet taken."""

    def stepped(self, job: Job, metrics: dict[str, float]) -> None:
        """A job took a step."""

    def evaluating(self, job: Job, done: int, total: int) -> None:
        """``done`` of the ``total`` examples of an evaluation are finished."""

    def evaluated(self, job: Job, loss: float, *, best: bool) -> None:
        """A job was evaluated on its held-out examples."""

    def sampling(self, job: Job) -> None:
        """An evaluation is due, or over where there are held-out examples: the time for sample answers."""

    def changed(self, job: Job) -> None:
        """A job was added, paused or resumed."""

    def ended(self, job: Job) -> None:
        """A job finished, failed or was cancelled."""

    def requests(self) -> Iterable[Request]:
        """Requests since the last call. Called between rounds, on the trainer's thread."""
        return ()

    def new_jobs(self) -> Iterable[Job]:
        """Jobs to add, whose adapters are in the bank. Called between rounds, on the trainer's thread."""
        return ()

    def end_round(self) -> bool:
        """A round is over; returns whether to continue."""
        return True


class Trainer:
    """Runs jobs to their ends on one base."""

    def __init__(
        self,
        stepper: Stepper,
        jobs: Sequence[Job],
        listener: Listener,
        *,
        tokens_per_pass: int,
        tokens_per_shared_pass: int,
        processes: Processes = ALONE,
    ) -> None:
        """Create a trainer.

        Args:
            stepper: runs batches.
            jobs: the jobs to begin with.
            listener: receives events and provides requests.
            tokens_per_pass: maximum tokens of one job in a pass.
            tokens_per_shared_pass: maximum tokens of a pass that several jobs share; 0 runs them in turn.
            processes: the processes that train together; each does its share of the pieces.
        """
        self.processes = processes
        self.stepper = stepper
        self.jobs = list(jobs)
        self.listener = listener
        self.tokens_per_pass = tokens_per_pass
        self.tokens_per_shared_pass = tokens_per_shared_pass
        self._heap = Heap()
        self._threads = WaitingThreads()
        self._fitted = 0
        """Tokens of the largest pass so far."""
        self._vocabulary = vocabulary_size(stepper.runner.model)
        self._faults: dict[str, Fault] = {}
        """Jobs whose pass raised in this round."""
        self._parts: dict[str, dict[int, JobLoss]] = {}
        """The losses of each job's pieces that were computed here in this round, by number."""

    def run(self) -> None:
        """Run rounds until every job has ended or the listener stops the run."""
        self._handle_requests()
        for job in self.jobs:
            self._begin(job)
        try:
            while any(job.running for job in self.jobs):
                self.round()
                self._handle_requests()
                if not self.listener.end_round():
                    return
        finally:
            self._threads.end()

    def round(self) -> None:
        """Take one optimizer step of every running job."""
        pieces = self._begun(self._pieces())
        numbering = Numbering(self.stepper, pieces)
        waiting = deque(self._sums(pieces))
        shares = self._shares(pieces)
        mine = shares[self.processes.team]
        left = Counter(piece.job.name for share in mine for piece in share)
        for group in mine:
            live = [piece for piece in group if piece.job.running and piece.job.name not in self._faults]
            if live:
                self._pass(live, left, numbering)
            if not self.processes.lockstep:
                self._step_done(waiting, left)
        for _ in range(max(map(len, shares)) - len(mine) if self.stepper.shards is not None else 0):
            self._guarded(self.stepper.idle)
        self._step_done(waiting, left)
        if not self.processes.alone:
            numbering.end()
        self._threads.look()

    def _shares(self, pieces: Sequence[Piece[Example]]) -> list[list[list[Piece[Example]]]]:
        """The passes of each team of processes."""
        teams = self.processes.teams
        owners = deal([piece.tokens for piece in pieces], teams) if teams > 1 else [0] * len(pieces)
        dealt: list[list[Piece[Example]]] = [[] for _ in range(teams)]
        for piece, owner in zip(pieces, owners, strict=True):
            dealt[owner].append(piece)
        return [list(passes(share, self.tokens_per_shared_pass)) for share in dealt]

    def _guarded(self, work: Callable[[], object]) -> None:
        """Do work that all processes do together. Raises ProcessError if it fails here."""
        try:
            work()
        except Exception as error:
            raise self.processes.fault_of_pass(error, _message(error)) from error

    def _sums(self, pieces: Sequence[Piece[Example]]) -> list[JobSum]:
        """The sums of the jobs that have pieces, in the order in which all processes step them."""
        self._parts.clear()
        tokens: dict[str, list[int]] = {}
        for piece in pieces:
            tokens.setdefault(piece.job.name, []).append(piece.tokens)
        jobs = {piece.job.name: piece.job for piece in pieces}
        bank = self.stepper.bank
        return [JobSum(self.processes, jobs[name], sizes, bank[name].expert_tokens) for name, sizes in tokens.items()]

    def _step_done(self, waiting: deque[JobSum], left: Counter[str]) -> None:
        """Step the jobs whose pieces are done, in order."""
        while waiting and (left[waiting[0].job.name] <= 0 or waiting[0].job.name in self._faults):
            total = waiting.popleft()
            job = total.job
            fault = self._faults.pop(job.name, None)
            if not self.processes.alone:
                fault = total.exchange(self._parts.get(job.name, {}), fault)
            if fault is not None:
                self._fail(job, fault.code, fault.reason, fault.error)
            elif job.running:
                self._step(job)

    def _pieces(self) -> list[Piece[Example]]:
        """The pieces of all running jobs; a job whose examples cannot be read, in any process, fails."""
        found = [piece for job in self.jobs if job.running for piece in self.pieces_of(job)]
        while not self.processes.alone:
            failed = {job.name: [job.code, job.reason] for job in self.jobs if job.state is JobState.FAILED}
            if self.processes.agree([[(piece.job.name, piece.tokens) for piece in found], sorted(failed)]):
                break
            every = self.processes.gather(failed)
            others = {name: fault for each in every for name, fault in each.items() if name not in failed}
            if all(each.keys() == failed.keys() for each in every):
                raise ProcessError("the processes have read different examples; give all of them the same files")
            for job in self.jobs:
                if job.name in others:
                    code, reason = others[job.name]
                    self._fail(job, code, reason, TrainingError(reason, code))
            found = [piece for piece in found if piece.job.running]
        return found

    def _begun(self, pieces: list[Piece[Example]]) -> list[Piece[Example]]:
        """The pieces of the jobs that go on, after each task has taken what it needs to know of the whole step."""
        for job in dict.fromkeys(piece.job for piece in pieces):
            examples = [example for piece in pieces if piece.job is job for example in piece.examples]
            compared = job.task.compared(examples)
            if not compared:
                continue
            try:
                losses, reference = (
                    self._losses(job, compared, route, silent=True) for route in (self._route_of(job), job.reference)
                )
            except ProcessError:
                raise
            except Exception as error:
                self._fail(job, _code(error), f"its forward pass failed: {_message(error)}", error)
            else:
                job.task.begin_step(losses, reference)
        return [piece for piece in pieces if piece.job.running]

    def _handle_requests(self) -> None:
        for job in self.listener.new_jobs():
            if job.name in {other.name for other in self.jobs}:
                raise TrainingError(f'the run already has a job "{job.name}"; give the new job another name')
            self.jobs.append(job)
            self.listener.changed(job)
            self._begin(job)
        by_name = {job.name: job for job in self.jobs}
        for request in self.listener.requests():
            if request.job in by_name:
                self._apply(by_name[request.job], request)

    def _apply(self, job: Job, request: Request) -> None:
        verb = request.verb
        if verb == "cancel" and not job.over:
            job.end(JobState.CANCELLED, request.code, request.reason or f"cancelled at step {job.progress.step}")
            self.listener.ended(job)
        elif (verb, job.state) in (("pause", JobState.RUNNING), ("resume", JobState.PAUSED)):
            job.state = JobState.PAUSED if verb == "pause" else JobState.RUNNING
            self.listener.changed(job)

    def _begin(self, job: Job) -> None:
        if job.running and job.progress.step == 0 and not job.progress.evaluations:
            self._evaluate(job)

    def pieces_of(self, job: Job) -> list[Piece[Example]]:
        """The examples of a job's next step in micro-batches; none, and the job fails, if they cannot be read."""
        try:
            examples = job.next_examples()
            for example in examples:
                self._check_ids(example)
        except Exception as error:
            self._fail(job, "data", f"cannot read its examples: {_message(error)}", error)
            return []
        groups = packed(examples, self.tokens_per_pass)
        return [Piece(job, tuple(group), number) for number, group in enumerate(groups)]

    def _check_ids(self, example: Example) -> None:
        if self._vocabulary is not None and not 0 <= min(example.ids) <= max(example.ids) < self._vocabulary:
            wrong = next(token for token in example.ids if not 0 <= token < self._vocabulary)
            raise DataError(
                f"{example.source}: found token {wrong}, and the base has tokens 0 to {self._vocabulary - 1}"
            )

    def _pass(self, pieces: list[Piece[Example]], left: Counter[str], numbering: Numbering) -> None:
        examples = [example for piece in pieces for example in piece.examples]
        owners = [piece.job.name for piece in pieces for _ in piece.examples]
        if not self.processes.alone:
            numbering.set(pieces)
        try:
            losses = self.stepper.forward_backward(make_batch(examples, owners), between=self._heap.at_peak)
        except Exception as error:
            self._check_device(error)
            if self.processes.lockstep:
                raise self.processes.fault_of_pass(error, self._fault_of_pass(pieces[0], error).reason) from error
            if len(pieces) > 1:
                for piece in pieces:
                    self._pass([piece], left, numbering)
            else:
                self._faults[pieces[0].job.name] = self._fault_of_pass(pieces[0], error)
            return
        self._heap.after_pass()
        self._fitted = max(self._fitted, sum(piece.tokens for piece in pieces))
        for piece in pieces:
            job = piece.job
            job.add(losses[job.name])
            self._parts.setdefault(job.name, {})[piece.number] = losses[job.name]
        left.subtract(piece.job.name for piece in pieces)

    def _fault_of_pass(self, piece: Piece[Example], error: Exception) -> Fault:
        """The fault of a job whose pass raised. If memory was short, its tensors are freed, so that the other jobs go on."""
        code, cause = _code(error), _message(error)
        if code == "memory":
            # The traceback's frames hold the activations of the pass.
            traceback.clear_frames(error.__traceback__)
            memory = memory_of(device_of(self.stepper.runner.model))
            memory.give_back()
            cause = self._shortage(piece, memory)
        return Fault(code, f"its forward or backward pass failed: {cause}", error)

    def _shortage(self, piece: Piece[Example], memory: DeviceMemory) -> str:
        """The size that did not fit, and one that would have."""
        left, on = memory.free(), f" on {memory.name}" if memory.name else ""
        have = "" if left is None else f", where {left / 1e9:.1f} GB are free"
        longest = max(map(len, piece.examples))
        fitted = min(self._fitted, piece.tokens - 1)
        tokens = max(longest, fitted or piece.tokens // 2)
        passes = f"tokens_per_pass {tokens}" if tokens < piece.tokens else f"max_length {longest // 2}"
        known = f"a pass of {fitted} tokens fitted; " if fitted else ""
        return (
            f"a pass of {piece.tokens} tokens, the longest example {longest}, does not fit in memory{on}{have}; {known}use {passes}, or "
            "activation_checkpointing"
        )

    def _step(self, job: Job) -> None:
        last = job.progress.step + 1 >= job.steps
        try:
            self.listener.stepping(job)
            if not job.running:
                return
            with self.stepper.turn():  # its time counts where others use the model
                metrics = job.optim_step()
            self.listener.stepped(job, metrics)
            if last:
                job.check_finite()
        except Exception as error:
            self._fail(job, _code(error), _message(error), error)
            return
        if last or job.progress.step % job.eval_every == 0 or job.progress.step in job.extra_evaluations:
            self._evaluate(job)
        if job.running and last:
            job.end(JobState.FINISHED)
            self.listener.ended(job)

    def _evaluate(self, job: Job) -> None:
        if not job.held_out:
            self.listener.sampling(job)
            return
        progress = job.progress
        try:
            scores = self.scores(job)
            loss = scores.loss
            if job.general:
                progress.general.append((progress.step, self.mean_loss(job, job.general)))
        except ProcessError:
            raise
        except Exception as error:
            self._fail(job, _code(error), f"its evaluation failed: {_message(error)}", error)
            return
        progress.evaluations.append((progress.step, loss))
        if scores.metrics:
            progress.figures.append((progress.step, scores.metrics))
        better = loss == loss and (progress.best is None or loss < progress.best)
        if better:
            progress.best, progress.best_step, progress.evaluations_without_gain = loss, progress.step, 0
        else:
            progress.evaluations_without_gain += 1
        self.listener.evaluated(job, loss, best=better)
        self.listener.sampling(job)
        patience = job.options.early_stop_patience
        if patience is not None and progress.evaluations_without_gain >= patience and job.running:
            job.end(
                JobState.FINISHED, "early_stop", f"held-out loss did not improve in the last {patience} evaluations"
            )
            self.listener.ended(job)

    def scores(self, job: Job) -> TaskScores:
        """The loss of the job's held-out examples, and the other metrics of its task."""
        sequences = job.task.sequences(job.held_out)
        if job.task.reference and job.reference_losses is None:
            job.reference_losses = self._losses(job, sequences, job.reference)
        losses = self._losses(job, sequences, self._route_of(job))
        return job.task.scores(job.held_out, losses, job.reference_losses)

    def mean_loss(self, job: Job, examples: Sequence[Example]) -> float:
        """Mean loss of examples under the job's route."""
        return self._losses(job, examples, self._route_of(job)).mean

    def _route_of(self, job: Job) -> MixLike:
        return self.stepper.routes.get(job.name, job.name)

    def _losses(self, job: Job, examples: Sequence[Example], route: MixLike, *, silent: bool = False) -> Losses:
        if not silent:
            self._heap.give_back()
        losses = example_losses(
            self.stepper.runner,
            examples,
            bank=self.stepper.bank,
            route=route,
            tokens_per_pass=self.tokens_per_pass,
            turn=self.stepper.turn,
            progress=None if silent else lambda done: self.listener.evaluating(job, done, len(examples)),
            ranks=None if self.processes.alone else EvaluationTeam(self.processes, self.stepper),
        )
        if not silent:
            self._heap.give_back()
        return losses

    def _check_device(self, error: Exception) -> None:
        """Raise TrainingError if the device has failed for good: the error is no job's own, and nothing can be computed or saved."""
        memory = memory_of(device_of(self.stepper.runner.model))
        if not memory.answers():
            raise TrainingError(
                f"{memory.name} has failed: {_message(error)}; run the same command to resume from the last checkpoint",
                "device",
            ) from error

    def _fail(self, job: Job, code: str, reason: str, error: Exception) -> None:
        self._check_device(error)
        prefix = f'job "{job.name}"'
        job.end(JobState.FAILED, code, reason if reason.startswith(prefix) else f"{prefix}: {reason}")
        job.error = error
        self.listener.ended(job)


def vocabulary_size(model: Any) -> int | None:
    """The number of rows of the base's input embedding; None without one."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _message(error: Exception) -> str:
    """An error's message; of a library's, the first line: torch adds advice for its developers."""
    text = str(error) if isinstance(error, VeneerError) else str(error).partition("\n")[0]
    return text.rstrip(".") or type(error).__name__


def _code(error: Exception) -> str:
    if isinstance(error, VeneerError):
        return str(getattr(error, "code", "data" if isinstance(error, DataError) else "training"))
    text = str(error).lower()  # a CPU's allocator has no class of errors
    short = isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text
    return "memory" if short else "training"
