"""Profile a run before it starts: run a few of its passes, small ones first, and restore everything afterwards.

The peak memory of a pass of T tokens is very nearly  a + b T,  so two small passes predict a large one. An eighth and a half of the run's
largest pass are run, and the whole pass if it surely fits in memory and is worth its time; what is not run is extrapolated. Then up to
three whole rounds are run to measure time.

The passes include the update and everything else that a step holds in memory. Tensors, gradients, optimizer state, dropout streams and
counters are restored, so a run that was planned ends with the same bits.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch

from veneer.data.batch import make_batch, packed
from veneer.data.example import Example
from veneer.errors import TrainingError
from veneer.evaluate.losses import example_losses
from veneer.models.devices import device_of, wait_for
from veneer.training.device_memory import DeviceMemory
from veneer.training.loop.job import Job
from veneer.training.loop.step import Stepper
from veneer.training.planning.workload import (
    JobExamples,
    Pass,
    examples_of,
    largest_pass,
    planned_rounds,
    size,
    smaller,
    tokens_per_round,
)
from veneer.training.process_memory import only_new_objects

_SMALLEST = 64
"""Tokens below which a pass predicts little about larger ones."""
_WARM_UP = 16
"""Tokens of a first pass, which absorbs one-time costs."""
_ROUNDS, _ROUND_SECONDS = 3, 60.0
"""Whole rounds to measure, and the time after which no further one is begun."""
_SAFETY = 1.5
_LEAST_SECONDS, _FRACTION = 1.5, 0.02
"""Time that planning may take: this fraction of the run, and at least so many seconds."""


@dataclass(frozen=True)
class Measurement:
    """One pass: its tokens, the sum of its squared segment lengths, peak resident memory and time."""

    tokens: int
    squares: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """Measurements of a run. Bytes are memory of the device (of a CPU, resident memory of the process), less the profiler's copies.

    start: bytes before. training, evaluation: passes, the smallest first. rounds: (tokens, seconds) of whole rounds. update: seconds of
    the optimizer steps of all jobs. tokens, squares: of the run's largest pass. evaluated: tokens of the largest evaluation pass.
    rounds_peak: peak of the whole rounds, which includes memory that the C library keeps; 0 if none was run.
    """

    start: int
    training: tuple[Measurement, ...]
    evaluation: tuple[Measurement, ...]
    rounds: tuple[tuple[int, float], ...]
    update: float
    tokens: int
    squares: int
    evaluated: int
    rounds_peak: int = 0

    @property
    def training_peak(self) -> int:
        """Peak memory of the run's largest pass."""
        return max(memory_at(self.training, self.tokens, self.squares, self.start), self.rounds_peak)

    @property
    def evaluation_peak(self) -> int:
        """Peak memory of the largest evaluation pass."""
        return memory_at(self.evaluation, self.evaluated, 0, self.start)

    def seconds_of_round(self, tokens: float) -> float:
        """Expected time of a round, from whole rounds without the first, or else from the largest pass that was run."""
        if self.rounds:
            counted = self.rounds[1:] or self.rounds
            return sum(seconds for _, seconds in counted) / sum(count for count, _ in counted) * tokens
        return self.training[-1].seconds / self.training[-1].tokens * tokens + self.update


class Profiler:
    """Measures the passes of jobs that have not begun."""

    def __init__(
        self,
        stepper: Stepper,
        jobs: Sequence[Job],
        *,
        tokens_per_pass: int,
        tokens_per_shared_pass: int,
        held_out: Sequence[Example] = (),
        limit: int | None = None,
        thorough: bool = False,
        memory: DeviceMemory | None = None,
    ) -> None:
        """Plan the passes.

        Args:
            stepper: runs batches.
            jobs: the jobs of the run.
            tokens_per_pass: maximum tokens of one job in a pass.
            tokens_per_shared_pass: maximum tokens of a shared pass.
            held_out: examples of all evaluations.
            limit: bytes that the process may use.
            thorough: measure the largest pass and whole rounds whatever their time.
            memory: of the base's device (default: the process's).
        """
        self.stepper = stepper
        self.jobs = [job for job in jobs if job.running]
        self.rounds = planned_rounds(self.jobs, tokens_per_pass, tokens_per_shared_pass)
        self.largest = largest_pass(self.rounds)
        usable = sorted((example for example in held_out if example.trained), key=len)
        self.evaluated = max(packed(usable, tokens_per_pass), key=size, default=[])
        self.limit = limit
        self.thorough = thorough
        self.memory = memory or DeviceMemory()
        self._device = device_of(stepper.runner.model)
        self._spent, self._allowed = 0.0, math.inf if thorough else _LEAST_SECONDS
        self._copies = sum(map(adapter_bytes, self.jobs))
        self._start = 0

    def measure(self) -> Profile:
        """Run the passes and restore everything. Raises whatever a pass raises."""
        self.memory.give_back()
        self._start = self.memory.used()
        with only_new_objects():
            with untouched(self.stepper, self.jobs):
                rows = examples_of(self.largest)
                self._train(smaller(rows, _WARM_UP))
                update = sum(self._update(job) for job in self.jobs)
                training = self._climb(rows, self._train)
                self.memory.give_back()
                evaluation = self._climb([(self.jobs[0], example) for example in self.evaluated], self._evaluate)
                rounds, peak = self._whole_rounds(training, update)
            self.memory.give_back()
        return Profile(
            start=self._start,
            training=tuple(training),
            evaluation=tuple(evaluation),
            rounds=tuple(rounds),
            update=update,
            tokens=size(self.largest),
            squares=_squares(self.largest),
            evaluated=size(self.evaluated),
            rounds_peak=peak,
        )

    def _climb(self, rows: JobExamples, run: Callable[[JobExamples], Measurement]) -> list[Measurement]:
        """Run growing parts of a pass while they surely fit and are worth their time; without two, nothing can be extrapolated."""
        examples = [example for _, example in rows]
        total = size(examples)
        found: list[Measurement] = []
        for tokens in dict.fromkeys(total // part for part in (8, 4, 2, 1)):
            if not total or tokens < min(_SMALLEST, total):
                continue
            if tokens == total // 4 and not self.thorough and self._is_safe(found, total // 2):
                continue  # the half predicts the whole better
            if found:
                needed = 3 if _has_longer_segments(found, total, _squares(examples)) else 2
                affordable = self._is_affordable(found[-1].seconds * tokens / found[-1].tokens)
                if not self._is_safe(found, tokens) or not (affordable or len(found) < needed):
                    break
            found.append(run(smaller(rows, tokens)))
            if len(found) == 1 and run == self._train:
                run_tokens = sum(job.steps * tokens_per_round(job) for job in self.jobs)
                seconds = found[0].seconds / found[0].tokens * run_tokens
                self._allowed = max(self._allowed, _FRACTION * seconds)
        return found

    def _is_safe(self, found: Sequence[Measurement], tokens: int) -> bool:
        """True if a pass of ``tokens`` tokens surely fits in memory."""
        if not found or self.limit is None or tokens <= found[-1].tokens:
            return True
        return self._start + _SAFETY * (found[-1].bytes - self._start) * tokens / found[-1].tokens <= self.limit

    def _is_affordable(self, seconds: float) -> bool:
        return self._spent + seconds <= self._allowed

    def _train(self, rows: JobExamples) -> Measurement:
        batch = make_batch([example for _, example in rows], [job.name for job, _ in rows])
        by_name = {job.name: job for job, _ in rows}

        def step() -> None:
            for name, loss in self.stepper.forward_backward(batch).items():
                by_name[name].add(loss)

        return self._measured(rows, step)

    def _evaluate(self, rows: JobExamples) -> Measurement:
        examples = [sequence for _, example in rows for sequence in example.sequences]
        name = self.jobs[0].name
        route = self.stepper.routes.get(name, name)
        return self._measured(
            rows,
            lambda: example_losses(
                self.stepper.runner,
                examples,
                bank=self.stepper.bank,
                route=route,
                tokens_per_pass=1 << 40,
                turn=self.stepper.turn,
            ),
        )

    def _measured(self, rows: JobExamples, run: Callable[[], object]) -> Measurement:
        examples = [example for _, example in rows]
        before = time.perf_counter()
        with self.memory.peak_of() as peak:
            run()
            wait_for(self._device)
        seconds = time.perf_counter() - before
        self._spent += seconds
        return Measurement(size(examples), _squares(examples), peak.bytes - self._copies, seconds)

    def _update(self, job: Job) -> float:
        """Seconds of a job's optimizer step. A job that cannot take it reports that when the run does."""
        before = time.perf_counter()
        try:
            job.optim_step()
        except TrainingError:
            return 0.0
        wait_for(self._device)
        return time.perf_counter() - before

    def _whole_rounds(self, training: Sequence[Measurement], update: float) -> tuple[list[tuple[int, float]], int]:
        """(tokens, seconds) of the first rounds, and their peak, if they surely fit and are worth their time."""
        rounds, last = self.rounds[:_ROUNDS], training[-1]
        seconds = last.seconds / last.tokens * sum(size(one) for passes in rounds for one in passes) + _ROUNDS * update
        found: list[tuple[int, float]] = []
        peak = 0
        if not self._is_safe(training, size(self.largest)) or not self._is_affordable(seconds):
            return found, peak
        for passes in rounds:
            if sum(seconds for _, seconds in found) > _ROUND_SECONDS:
                break
            before = time.perf_counter()
            peak = max(peak, *(self._train(examples_of(one)).bytes for one in passes))
            for job in self.jobs:
                self._update(job)
            found.append((sum(map(size, passes)), time.perf_counter() - before))
        return found, peak


def memory_at(found: Sequence[Measurement], tokens: int, squares: int, start: int) -> int:
    """Peak memory of a pass, interpolated between measurements, or extrapolated from the last two.

    Attention may grow with the square of a segment's length. So if the segments are longer than in all measurements, a parabola through
    the last three replaces the line.
    """
    if not found:
        return start
    last = found[-1]
    if len(found) == 1:
        return start + round((last.bytes - start) * max(0.0, tokens / last.tokens))
    low, high = next((pair for pair in pairwise(found) if tokens <= pair[1].tokens), (found[-2], last))
    line = low.bytes + _slope(low, high) * (tokens - low.tokens)
    if tokens > last.tokens and len(found) >= 3 and _has_longer_segments(found, tokens, squares):
        first, middle = found[-3:-1]
        bend = (_slope(middle, last) - _slope(first, middle)) / (last.tokens - first.tokens)
        line += max(0.0, bend) * (tokens - middle.tokens) * (tokens - last.tokens)
    return round(line)


def _slope(low: Measurement, high: Measurement) -> float:
    return max(0.0, (high.bytes - low.bytes) / max(1, high.tokens - low.tokens))


def _has_longer_segments(found: Sequence[Measurement], tokens: int, squares: int) -> bool:
    return squares / max(1, tokens) > _SAFETY * max(one.squares / one.tokens for one in found)


def _squares(examples: Sequence[Example] | Pass) -> int:
    return sum(len(example) ** 2 for example in examples)


@contextmanager
def untouched(stepper: Stepper, jobs: Sequence[Job]) -> Iterator[None]:
    """Restore jobs that have not begun: tensors, gradients, optimizers, counters, dropout streams, tokens by expert.

    Other adapters of the bank, which may be training in another thread, are left alone.
    """
    bank = stepper.bank
    routes = [stepper.routes.get(job.name, job.name) for job in jobs]
    names = {name for route in routes for name in ([route] if isinstance(route, str) else route or ())}
    tensors = [(parameter, parameter.detach().clone()) for job in jobs for parameter in job.parameters]
    counters = {name: bank[name].counters for name in names}
    progress = [copy.deepcopy(job.progress) for job in jobs]
    rates = [[group["lr"] for group in job.optimizer.param_groups] for job in jobs]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in tensors:
                parameter.copy_(before)
        for job, numbers, job_rates in zip(jobs, progress, rates, strict=True):
            job.drop_gradients()
            job.optimizer.state.clear()
            job.progress = numbers
            for group, rate in zip(job.optimizer.param_groups, job_rates, strict=True):
                group["lr"] = rate
        for name, counted in counters.items():
            bank[name].counters = counted


def adapter_bytes(job: Job) -> int:
    """Bytes of a job's tensors."""
    return sum(parameter.numel() * parameter.element_size() for parameter in job.parameters)
