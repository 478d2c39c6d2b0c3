"""Measure before a run what it will need: a few of its own passes, small ones first, after which everything is as if nothing had run.

A pass of T tokens lifts the process to a highest mark that is very nearly  a + b T,  so two small passes tell what a large one takes.
The ladder goes on from there (an eighth of the run's largest pass, a quarter where time is not short, a half, the whole) as far as
memory is sure to suffice and the time that planning may cost allows; what was not run is extrapolated. Then come up to three whole
rounds of the run, for the time.

It is the run's own jobs that are run, with the update and everything else that a step holds in memory. Tensors, gradients, optimizer
state, dropout streams and counters are put back afterwards, so a run that was planned ends with the bits of one that was not.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from veneer.adapters import Bank
from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.errors import TrainingError
from veneer.evaluate.losses import example_losses
from veneer.training.loop.job import Job
from veneer.training.loop.step import Stepper
from veneer.training.loop.trainer import cut
from veneer.training.planning import workload as forecast
from veneer.training.planning.workload import Pass, Rows
from veneer.training.process_memory import give_back, peak_of, resident

_SMALLEST = 64
"""Tokens below which a pass says little of larger ones."""
_FIRST = 16
"""Tokens of the pass that takes what only the first one takes."""
_ROUNDS = 3
_SAFETY = 1.5
_LEAST_SECONDS, _SHARE = 1.5, 0.02
"""What planning a run may cost: so much of the time that the run will take, and this at least."""
_ROUND_SECONDS = 60.0
"""Once rounds have taken so long, no further one is measured."""


@dataclass(frozen=True)
class Rung:
    """One pass that was run: its tokens, the sum of its segments' squared lengths, the highest mark and the time."""

    tokens: int
    squares: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """What a probe found. Bytes are resident memory of the whole process, less what the probe itself held.

    start: before it. training, judging: passes from small to large. rounds: (tokens, seconds) of whole rounds. update: seconds of all
    jobs' optimizer steps. tokens, squares: of the run's largest pass. judged: tokens of the largest held-out pass. held: highest mark of
    the whole rounds, in which what the C library keeps of earlier passes shows; 0 where none was run.
    """

    start: int
    training: tuple[Rung, ...]
    judging: tuple[Rung, ...]
    rounds: tuple[tuple[int, float], ...]
    update: float
    tokens: int
    squares: int
    judged: int
    held: int = 0


class Probe:
    """Runs the ladder and the rounds of a set of jobs that have not begun."""

    def __init__(
        self,
        stepper: Stepper,
        jobs: Sequence[Job],
        *,
        budget: int,
        share: int,
        judged: Sequence[Example] = (),
        limit: int | None = None,
        thorough: bool = False,
    ) -> None:
        """budget, share: as the trainer has them. judged: all held-out examples. limit: bytes that the process may hold.
        thorough: run the largest pass and three rounds whatever they cost, where memory allows."""
        self.stepper = stepper
        self.jobs = [job for job in jobs if job.running]
        self.rounds = forecast.rounds(self.jobs, budget, share)
        self.largest = forecast.largest(self.rounds)
        held = sorted((example for example in judged if example.trained), key=len)
        self.judged = max(cut(held, budget), key=forecast.size, default=[])
        self.limit = limit
        self.thorough = thorough
        self._spent = 0.0
        self._allowed = _LEAST_SECONDS
        self._overhead = 0
        self._start = 0
        self._held = 0

    def measure(self) -> Measured:
        """Run, and put everything back.

        Raises whatever a pass of the run raises.
        """
        give_back()
        self._start = resident()
        self._overhead = sum(map(adapter_bytes, self.jobs))
        update = 0.0
        with untouched(self.stepper.bank, self.jobs):
            whole = forecast.rows(self.largest)
            self._train(forecast.smaller(whole, _FIRST))
            for job in self.jobs:
                update += self._update(job)
            training = self._climb(whole, self._train)
            give_back()
            judging = self._climb([(self.jobs[0], example) for example in self.judged], self._judge)
            rounds = self._whole_rounds(training, update)
        give_back()
        lengths = [len(slot) for slot in self.largest]
        squares = sum(length**2 for length in lengths)
        judged = forecast.size(self.judged)
        return Measured(self._start, training, judging, rounds, update, sum(lengths), squares, judged, self._held)

    # The ladder

    def _climb(self, whole: Rows, run: Callable[[Rows], Rung]) -> tuple[Rung, ...]:
        rungs: list[Rung] = []
        # What is extrapolated lies close to what was run: where time is short, the quarter is passed over.
        self._climb_on(rungs, whole, run, (8, 4, 2, 1) if self.thorough else (8, 2, 1))
        if len(rungs) == 1:  # from an eighth, a half was not sure to fit
            self._climb_on(rungs, whole, run, (4,))
        return tuple(rungs)

    def _climb_on(self, rungs: list[Rung], whole: Rows, run: Callable[[Rows], Rung], parts: tuple[int, ...]) -> None:
        total = _tokens(whole)
        for tokens in dict.fromkeys(total // part for part in parts):
            if tokens < min(_SMALLEST, total) or not total:
                continue
            rows = forecast.smaller(whole, tokens)
            if rungs and not self._may(rungs, _tokens(rows), needed=len(rungs) < _needed(rungs, whole)):
                break
            rungs.append(run(rows))
            if len(rungs) == 1 and run == self._train:
                pace = rungs[0].seconds / rungs[0].tokens
                self._allowed = max(_LEAST_SECONDS, _SHARE * pace * forecast.tokens_of_run(self.jobs))

    def _may(self, rungs: list[Rung], tokens: int, *, needed: bool) -> bool:
        """Whether a pass of so many tokens is sure to fit, and worth its time."""
        last = rungs[-1]
        if tokens <= last.tokens:
            return False
        grown = (last.bytes - self._start) * tokens / last.tokens
        if self.limit is not None and self._start + _SAFETY * grown > self.limit:
            return False
        return needed or self._affordable(last.seconds * tokens / last.tokens)

    def _affordable(self, seconds: float) -> bool:
        return self.thorough or self._spent + seconds <= self._allowed

    def _train(self, rows: Rows) -> Rung:
        batch = make_batch([example for _, example in rows], [job.name for job, _ in rows])

        def step() -> None:
            for name, share in self.stepper.forward_backward(batch).items():
                next(job for job in self.jobs if job.name == name).take(share)

        return self._rung([example for _, example in rows], step)

    def _judge(self, rows: Rows) -> Rung:
        examples = [example for _, example in rows]
        name = self.jobs[0].name
        runner, bank = self.stepper.runner, self.stepper.bank
        route = self.stepper.routes.get(name, name)
        return self._rung(
            examples,
            lambda: example_losses(runner, examples, bank=bank, route=route, tokens_per_pass=1 << 40),
        )

    def _rung(self, examples: Sequence[Example], run: Callable[[], object]) -> Rung:
        lengths = [len(example) for example in examples]
        before = time.perf_counter()
        with peak_of() as seen:
            run()
        seconds = time.perf_counter() - before
        self._spent += seconds
        return Rung(sum(lengths), sum(length**2 for length in lengths), seen.bytes - self._overhead, seconds)

    # The update, and whole rounds

    def _update(self, job: Job) -> float:
        """Take a job's optimizer step; returns its seconds. A job that cannot take it will say so when the run is at it."""
        before = time.perf_counter()
        try:
            job.optim_step()
        except TrainingError:
            return 0.0
        return time.perf_counter() - before

    def _whole_rounds(self, training: Sequence[Rung], update: float) -> tuple[tuple[int, float], ...]:
        last = training[-1]
        wanted = self.rounds[:_ROUNDS]
        tokens = sum(forecast.size(one) for passes in wanted for one in passes)
        if last.tokens < forecast.size(self.largest) and self.limit is not None:
            grown = (last.bytes - self._start) * forecast.size(self.largest) / last.tokens
            if self._start + _SAFETY * grown > self.limit:
                return ()
        if not self._affordable(last.seconds * tokens / last.tokens + _ROUNDS * update):
            return ()
        found: list[tuple[int, float]] = []
        for passes in wanted:
            found.append((sum(map(forecast.size, passes)), self._round(passes)))
            if sum(seconds for _, seconds in found) > _ROUND_SECONDS:
                break
        return tuple(found)

    def _round(self, passes: Sequence[Pass]) -> float:
        before, marks = time.perf_counter(), []
        for one in passes:
            marks.append(self._train(forecast.rows(one)).bytes)
        for job in self.jobs:
            self._update(job)
        self._held = max([self._held, *marks])
        return time.perf_counter() - before


@contextmanager
def untouched(bank: Bank, jobs: Sequence[Job]) -> Iterator[None]:
    """Put jobs that have not begun back to where they stood: tensors, gradients, optimizers, counters, dropout streams."""
    tensors = [(parameter, parameter.detach().clone()) for job in jobs for parameter in job.parameters]
    draws = {name: bank[name].draws for name in bank}
    progress = [copy.deepcopy(job.progress) for job in jobs]
    rates = [[group["lr"] for group in job.optimizer.param_groups] for job in jobs]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in tensors:
                parameter.copy_(before)
        for job, numbers, own in zip(jobs, progress, rates, strict=True):
            job.drop_gradients()
            job.optimizer.state.clear()
            job.progress = numbers
            for group, rate in zip(job.optimizer.param_groups, own, strict=True):
                group["lr"] = rate
        for name, number in draws.items():
            bank[name].draws = number


def _tokens(rows: Rows) -> int:
    return sum(len(example) for _, example in rows)


def _needed(rungs: Sequence[Rung], whole: Rows) -> int:
    """Rungs without which nothing can be said: three where segments get longer on the way up, since attention grows with their square."""
    lengths = [len(example) for _, example in whole]
    longer = sum(length**2 for length in lengths) / sum(lengths) > _SAFETY * max(r.squares / r.tokens for r in rungs)
    return 3 if longer else 2


def adapter_bytes(job: Job) -> int:
    """Bytes of a job's tensors."""
    return sum(parameter.numel() * parameter.element_size() for parameter in job.parameters)
