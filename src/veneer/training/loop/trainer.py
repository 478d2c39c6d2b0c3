"""Many jobs on one base, round by round.

In a round every running job takes one optimizer step of its own. A job's examples are cut into pieces of at most ``budget`` tokens, the
same whether it has neighbours or not, since dropout is drawn for each piece; small pieces of several jobs then stand in one pass, up to
``share`` tokens, and others take turns. A job steps as soon as its last piece went through. Between rounds jobs are cancelled, paused,
taken up again and joined, and checkpoints are cut: what comes after is a function of the jobs' own states and of nothing else.

What goes wrong in one job ends that job: rows that cannot be read, a loss that is not finite, a pass that raises. A pass of several
jobs that raises is run again job by job, to find the one at fault; it has added nothing to anyone's gradient.

A single job is a round with one job in it; there is no other loop.

Boundary: the trainer knows jobs and batches. Files, the terminal and the clock are the listener's.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.errors import DataError, TrainingError
from veneer.evaluate.losses import example_losses
from veneer.training.loop.job import Job, State
from veneer.training.loop.step import Stepper
from veneer.training.process_memory import Heap

S = TypeVar("S", bound=Sized)
Verb = Literal["cancel", "pause", "resume"]


@dataclass(frozen=True)
class Request:
    """A change that is asked for: of a job, by name. code, reason: what a cancelled job says of itself."""

    job: str
    verb: Verb
    code: str = "cancelled"
    reason: str = ""


@dataclass(frozen=True)
class Piece:
    """Consecutive examples of a job's step that go through the base together."""

    job: Job
    examples: tuple[Example, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all its examples."""
        return sum(map(len, self.examples))


class Listener:
    """What is told of the run's course, and what may ask for a change of it. By itself it says and asks nothing."""

    def stepping(self, job: Job) -> None:
        """A job's gradient is whole, its step not yet taken."""

    def stepped(self, job: Job, figures: dict[str, float]) -> None:
        """A job took a step."""

    def judging(self, job: Job, done: int, total: int) -> None:
        """So many of the examples that a job is judged on are done."""

    def evaluated(self, job: Job, loss: float, *, best: bool) -> None:
        """A job was judged on its held-out examples."""

    def changed(self, job: Job) -> None:
        """A job joined, was paused, or goes on."""

    def ended(self, job: Job) -> None:
        """A job left the run: finished, failed or cancelled."""

    def requests(self) -> Iterable[Request]:
        """The changes that were asked for since the last call. Called between two rounds."""
        return ()

    def round_over(self) -> bool:
        """Every job stands between two steps; returns whether to go on."""
        return True


class Trainer:
    """Runs jobs to their ends on one base."""

    def __init__(self, stepper: Stepper, jobs: Sequence[Job], listener: Listener, *, budget: int, share: int) -> None:
        """budget: most tokens of a job in a pass. share: fill passes with pieces of several jobs up to so many tokens; 0 never does."""
        self.stepper = stepper
        self.jobs = list(jobs)
        self.listener = listener
        self.budget = budget
        self.share = share
        self._asked: deque[Request] = deque()
        self._joining: deque[Job] = deque()
        self._lock = threading.Lock()
        self._heap = Heap()
        self._vocabulary = _vocabulary(stepper)

    # What may be asked for from outside, from any thread; it takes effect between two rounds.

    def cancel(self, name: str) -> None:
        """End a job for good."""
        self._ask(name, "cancel")

    def pause(self, name: str) -> None:
        """Let a job stand where it is."""
        self._ask(name, "pause")

    def resume(self, name: str) -> None:
        """Let a paused job go on."""
        self._ask(name, "resume")

    def join(self, job: Job) -> None:
        """Add a job, whose adapter is in the bank, to those that run."""
        with self._lock:
            if job.name in {other.name for other in (*self.jobs, *self._joining)}:
                raise TrainingError(f'the run has a job "{job.name}" already; give the new one another name')
            self._joining.append(job)

    def _ask(self, name: str, verb: Verb) -> None:
        with self._lock:
            if name not in {job.name for job in (*self.jobs, *self._joining)}:
                have = ", ".join(job.name for job in self.jobs)
                raise TrainingError(f'the run has no job "{name}"; it has: {have}')
            self._asked.append(Request(name, verb))

    # The course

    def run(self) -> None:
        """Rounds until every job has ended or the listener says stop."""
        self._settle()
        for job in self.jobs:
            self._begin(job)
        while any(job.running for job in self.jobs):
            self.round()
            self._settle()
            if not self.listener.round_over():
                return

    def round(self) -> None:
        """One optimizer step of every running job."""
        pieces = [piece for job in self.jobs if job.running for piece in self._pieces(job)]
        left = Counter(piece.job.name for piece in pieces)
        for group in passes(pieces, self.share):
            live = [piece for piece in group if piece.job.running]
            if live:
                self._pass(live, left)

    def _settle(self) -> None:
        """Between two rounds: let in who joins, and do what was asked for."""
        with self._lock:
            joining, asked = list(self._joining), list(self._asked)
            self._joining.clear()
            self._asked.clear()
        for job in joining:
            self.jobs.append(job)
            self.listener.changed(job)
            self._begin(job)
        by_name = {job.name: job for job in self.jobs}
        for request in (*asked, *self.listener.requests()):
            if request.job in by_name:
                self._apply(by_name[request.job], request)

    def _apply(self, job: Job, request: Request) -> None:
        verb = request.verb
        if verb == "cancel" and not job.over:
            job.end(State.CANCELLED, request.code, request.reason or f"cancelled at step {job.progress.step}")
            self.listener.ended(job)
        elif (verb, job.state) in (("pause", State.RUNNING), ("resume", State.PAUSED)):
            job.state = State.PAUSED if verb == "pause" else State.RUNNING
            self.listener.changed(job)

    def _begin(self, job: Job) -> None:
        if job.running and job.progress.step == 0 and not job.progress.evaluations:
            self._evaluate(job)

    def _pieces(self, job: Job) -> list[Piece]:
        """The examples of a job's next step, cut into pieces of at most ``budget`` tokens (a longer example goes alone)."""
        try:
            examples = job.next_examples()
            for example in examples:
                self._check_ids(example)
        except Exception as error:
            self._fail(job, "data", f"its examples cannot be read: {_said(error)}", error)
            return []
        return [Piece(job, tuple(piece)) for piece in cut(examples, self.budget)]

    def _check_ids(self, example: Example) -> None:
        if self._vocabulary is not None and not 0 <= min(example.ids) <= max(example.ids) < self._vocabulary:
            wrong = next(token for token in example.ids if not 0 <= token < self._vocabulary)
            raise DataError(f"{example.source}: it has token {wrong}, and the base knows 0 to {self._vocabulary - 1}")

    def _pass(self, pieces: list[Piece], left: Counter[str]) -> None:
        examples = [example for piece in pieces for example in piece.examples]
        owners = [piece.job.name for piece in pieces for _ in piece.examples]
        try:
            shares = self.stepper.forward_backward(make_batch(examples, owners), between=self._heap.at_height)
        except Exception as error:
            if len(pieces) > 1:
                for piece in pieces:
                    if piece.job.running:
                        self._pass([piece], left)
            else:
                self._fail(
                    pieces[0].job, _code(error), f"its examples cannot go through the base: {_said(error)}", error
                )
            return
        self._heap.after_pass()
        jobs = list({piece.job.name: piece.job for piece in pieces}.values())
        for job in jobs:
            job.take(shares[job.name])
        left.subtract(piece.job.name for piece in pieces)
        for job in jobs:
            if left[job.name] == 0:
                self._step(job)

    def _step(self, job: Job) -> None:
        last = job.progress.step + 1 >= job.steps
        try:
            self.listener.stepping(job)
            if not job.running:
                return
            figures = job.optim_step()
            self.listener.stepped(job, figures)
            if last:
                job.check_finite()
        except Exception as error:
            self._fail(job, getattr(error, "code", _code(error)), _said(error), error)
            return
        every = job.options.eval_every or max(1, job.steps // 10)
        if last or job.progress.step % every == 0 or job.progress.step in job.looks:
            self._evaluate(job)
        if job.running and last:
            job.end(State.FINISHED)
            self.listener.ended(job)

    def _evaluate(self, job: Job) -> None:
        if not job.held_out:
            return
        try:
            loss = self._judge(job, job.held_out)
            if job.general:
                job.progress.general.append((job.progress.step, self._judge(job, job.general)))
        except Exception as error:
            self._fail(job, _code(error), f"its held-out examples cannot be judged: {_said(error)}", error)
            return
        progress = job.progress
        progress.evaluations.append((progress.step, loss))
        better = loss == loss and (progress.best is None or loss < progress.best)
        if better:
            progress.best, progress.best_step, progress.looks_without_gain = loss, progress.step, 0
        else:
            progress.looks_without_gain += 1
        self.listener.evaluated(job, loss, best=better)
        patience = job.options.early_stop_patience
        if patience is not None and progress.looks_without_gain >= patience and job.running:
            job.end(State.FINISHED, "early_stop", f"no better held-out loss in {patience} looks")
            self.listener.ended(job)

    def _judge(self, job: Job, examples: Sequence[Example]) -> float:
        """Mean loss of some examples under the job's route."""
        route = self.stepper.routes.get(job.name, job.name)
        runner, bank = self.stepper.runner, self.stepper.bank
        self._heap.give_back()
        losses = example_losses(
            runner,
            examples,
            bank=bank,
            route=route,
            tokens_per_pass=self.budget,
            progress=lambda done: self.listener.judging(job, done, len(examples)),
        )
        self._heap.give_back()
        return losses.mean

    def _fail(self, job: Job, code: str, reason: str, error: Exception | None = None) -> None:
        who = f'job "{job.name}"'
        job.end(State.FAILED, code, reason if reason.startswith(who) else f"{who}: {reason}")
        job.error = error
        self.listener.ended(job)


def cut(examples: Iterable[S], budget: int) -> list[list[S]]:
    """Examples (or anything that has their lengths) in their order, in lists of at most ``budget`` tokens; a longer one stands alone."""
    found: list[list[S]] = []
    used = 0
    for example in examples:
        if not found or used + len(example) > budget:
            found.append([])
            used = 0
        found[-1].append(example)
        used += len(example)
    return found


def passes(pieces: Sequence[Piece], share: int) -> Iterator[list[Piece]]:
    """Pieces in their order, several jobs' together while they hold at most ``share`` tokens."""
    held: list[Piece] = []
    used = 0
    for piece in pieces:
        size = piece.tokens
        if held and (used + size > share or held[-1].job is piece.job):
            yield held
            held, used = [], 0
        held.append(piece)
        used += size
    if held:
        yield held


def _vocabulary(stepper: Stepper) -> int | None:
    """How many tokens the base's embedding knows."""
    model: Any = stepper.runner.model
    found = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(found, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _code(error: Exception) -> str:
    text = str(error).lower()
    short = isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text
    return "memory" if short else "data" if isinstance(error, DataError) else "training"
