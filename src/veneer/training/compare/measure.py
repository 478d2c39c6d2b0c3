"""The measurements of one contestant of a comparison: its trained adapters on test rows, its time, memory and size."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from veneer.adapters import Bank, Route
from veneer.adapters.methods import has_option
from veneer.adapters.sequence import lengthen, running
from veneer.checkpoints.locate import trained
from veneer.data.batch import make_batch, packed
from veneer.data.example import Example
from veneer.evaluate.losses import Losses, example_losses, t95
from veneer.evaluate.predictions import predict
from veneer.evaluate.scores import score_values
from veneer.models.devices import device_of, wait_for
from veneer.models.flat import FlatRunner
from veneer.training.device_memory import memory_of
from veneer.training.loop.step import Stepper
from veneer.training.run.result import JobResult
from veneer.training.tasks import Task

_REPEATS = 5


@dataclass
class Score:
    """Mean over seeds with a 95 % interval (Student's t; none for one seed)."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        """The score of one value per seed."""
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean, None, None)
        half = t95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)


@dataclass
class ContestantRow:
    """The measurements of a contestant. Losses in nats per token (of heads: per text), times in milliseconds, sizes in bytes.

    Attributes:
        parameters: trainable parameters without those of a head, which are ``head_parameters``.
        rates: held-out loss by learning rate, from the search.
        best, last: loss on the test rows at the step with the lowest held-out loss, and at the last step.
        scores_best, scores_last: scores of a head on the test rows at the same steps, by metric; empty without a head.
        forgetting: increase of the loss on a general text, at the best step; None with a head.
        step_ms, step_bytes: forward and backward of one pass of test rows; memory that it adds, with optimizer state.
        latency_ms: what the adapter adds to a forward of one row when it is not merged. Merged, it adds nothing.
    """

    label: str
    method: str
    r: int | None
    parameters: int
    learning_rate: float
    rates: dict[float, float]
    seeds: list[int]
    best: Score
    last: Score
    forgetting: Score | None
    step_ms: float
    step_bytes: int
    latency_ms: float
    disk_bytes: int
    head_parameters: int = 0
    scores_best: dict[str, Score] = field(default_factory=dict)
    scores_last: dict[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class TestSet:
    """The rows that contestants are measured on.

    Attributes:
        task: computes the loss.
        examples: the test rows.
        general: a general text; empty for heads.
        base: losses of the task's sequences under the base alone; None for heads, whose base has none.
        base_general: mean loss of the general text under the base; None for heads.
    """

    task: Task
    examples: Sequence[Example]
    general: Sequence[Example]
    base: Losses | None
    base_general: float | None

    @classmethod
    def of(cls, runner: FlatRunner, task: Task, examples: Sequence[Example], general: Sequence[Example]) -> TestSet:
        """Measure the base, where it has losses."""
        if examples[0].labels:
            return cls(task, examples, (), None, None)
        base = example_losses(runner, task.sequences(examples))
        return cls(task, examples, general, base, example_losses(runner, general).mean)

    @property
    def base_loss(self) -> float | None:
        """The loss of the base."""
        return None if self.base is None else self.task.scores(self.examples, self.base, self.base).loss


def measured(
    label: str,
    jobs: Sequence[JobResult],
    seeds: Sequence[int],
    tried: Sequence[JobResult],
    bank: Bank,
    runner: FlatRunner,
    tested: TestSet,
) -> ContestantRow:
    """Measure a contestant.

    Args:
        label: name of the contestant.
        jobs: its jobs at the chosen learning rate, one for each seed.
        seeds: the seeds.
        tried: its jobs of the search.
        bank, runner: of the base.
        tested: the rows to measure on.
    """
    best, last, forgetting = [], [], []
    scores: dict[str, list[dict[str, float]]] = {"best": [], "last": []}
    for job in jobs:
        folder = job.best if job.best.is_dir() else job.adapter
        with _loaded(bank, folder):
            found = _scores(runner, bank, tested)
            if tested.base_general is not None:
                general = example_losses(runner, tested.general, bank=bank, route="best").mean
                forgetting.append(general - tested.base_general)
        best.append(found[0])
        scores["best"].append(found[1])
        if trained(folder)[0] != trained(job.adapter)[0]:  # else the best step is the last one
            with _loaded(bank, job.adapter):
                found = _scores(runner, bank, tested)
        last.append(found[0])
        scores["last"].append(found[1])
    with _loaded(bank, jobs[0].adapter):
        own = [layer for layer in bank.survey.head if layer in bank["best"].overrides]
        head = sum(value.numel() for layer in own for value in bank["best"].overrides[layer].values())
        parameters = bank["best"].num_parameters() - head
        step_ms, step_bytes = _step(runner, bank, tested)
        bank["best"].requires_grad_(False)  # as it is served: what a frozen adapter needs is computed once
        latency = _added_ms(runner, bank, tested.examples[0])
    return ContestantRow(
        label=label,
        method=jobs[0].method,
        r=jobs[0].r if has_option(jobs[0].method, "r") else None,
        parameters=parameters,
        learning_rate=jobs[0].learning_rate,
        rates={job.learning_rate: job.best_loss for job in tried},
        seeds=list(seeds),
        best=Score.of(best),
        last=Score.of(last),
        forgetting=Score.of(forgetting) if forgetting else None,
        step_ms=step_ms,
        step_bytes=step_bytes + 8 * (parameters + head),
        latency_ms=latency,
        disk_bytes=sum(file.stat().st_size for file in jobs[0].adapter.iterdir() if file.is_file()),
        head_parameters=head,
        scores_best=_over_seeds(scores["best"]),
        scores_last=_over_seeds(scores["last"]),
    )


def _scores(runner: FlatRunner, bank: Bank, tested: TestSet) -> tuple[float, dict[str, float]]:
    """(loss of the test rows, scores of the adapter's head, empty without one), of one pass over them."""
    if tested.base is not None:
        losses = example_losses(runner, tested.task.sequences(tested.examples), bank=bank, route="best")
        return tested.task.scores(tested.examples, losses, tested.base).loss, {}
    found = predict(runner, tested.examples, bank=bank, route="best")
    task = "regression" if found.logits_KL.shape[1] == 1 else "classification"
    return float(found.losses_K.double().mean()), score_values(task, found.values_K.tolist(), found.targets_K.tolist())


def _over_seeds(found: Sequence[dict[str, float]]) -> dict[str, Score]:
    return {name: Score.of([values[name] for values in found]) for name in found[0]}


@contextmanager
def _loaded(bank: Bank, folder: Path) -> Iterator[None]:
    """Hold an adapter in the bank, under the name "best", inside this context."""
    bank.load(folder, "best")
    try:
        yield
    finally:
        bank.remove("best")


def _step(runner: FlatRunner, bank: Bank, tested: TestSet) -> tuple[float, int]:
    """(milliseconds, bytes) of a forward and backward pass over at most 1,024 tokens of the examples."""
    batch = make_batch(next(packed(tested.examples, 1024)), "best")
    stepper = Stepper(runner, bank, tasks={"best": tested.task})
    device = device_of(runner.model)
    memory = memory_of(device)
    times: list[float] = []
    most = 0
    for repeat in range(_REPEATS):
        for parameter in bank.parameters("best"):
            parameter.grad = None
        if not repeat:
            memory.give_back()  # memory that earlier passes left would hide what the first one takes
        before = memory.used()
        with memory.peak_of() as peak:
            start = time.perf_counter()
            stepper.forward_backward(batch)
            wait_for(device)
            times.append(1e3 * (time.perf_counter() - start))
        most = max(most, peak.bytes - before)
    return statistics.median(times), most


def _added_ms(runner: FlatRunner, bank: Bank, example: Example) -> float:
    """Milliseconds that the adapter adds to a forward of one example; the base and the adapter take turns."""
    batch, device = make_batch([example], "best"), device_of(runner.model)
    times: dict[str | None, list[float]] = {}
    with torch.no_grad():
        for _ in range(3 * _REPEATS):
            for route in (None, "best"):
                longer, prefix = lengthen(bank, batch, [*Route.parse(route).mixes])
                keep = torch.tensor([longer.tokens - 1])
                cells = runner.head_cells(longer, keep)
                with running(runner, prefix), bank.use(route, keep=cells, training=False):
                    wait_for(device)
                    start = time.perf_counter()
                    runner.logits(longer, keep)
                    wait_for(device)
                    times.setdefault(route, []).append(1e3 * (time.perf_counter() - start))
    base, adapter = (statistics.median(taken[2:]) for taken in times.values())  # the first two warm up
    return adapter - base
