"""What goes wrong in one job stays there: the others end bit for bit as if that job had been cancelled at the same step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.training.made import Ear, World, apart, examples, values

from veneer.adapters import DoRA, LoRA
from veneer.data.example import Example
from veneer.training.loop.job import Job, JobState
from veneer.training.loop.trainer import Request

NAMES = [f"job{i:02d}" for i in range(16)]
VICTIMS = ("job00", "job05", "job10", "job15")
STEP, STEPS = 2, 5
"""Steps that the victim takes before it is hit, and those of everybody."""


class Rows(Sequence[Example]):
    """Examples that may raise when they are read, or carry a poisoned row."""

    def __init__(self, rows: list[Example]) -> None:
        self.rows = rows
        self.broken = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if self.broken:
            raise OSError("Input/output error")
        return self.rows[index]


def build(optimizer: str = "sgd") -> tuple[World, dict[str, Job]]:
    """Sixteen jobs, LoRA and DoRA in turn, ranks 1 to 4, every third with dropout."""
    world = World()
    jobs = {}
    for i, name in enumerate(NAMES):
        kind = DoRA if i % 2 else LoRA
        method = kind(r=1 + i % 4, lora_dropout=0.2 if i % 3 == 0 else 0.0)
        rows = Rows(examples(7, seed=i))
        jobs[name] = world.job(name, method, rows=rows, seed=i, optimizer=optimizer, steps=STEPS, clip=None)
    return world, jobs


class Hit(Ear):
    """Does something to one job when it stands at a step: between two rounds, just before its step, or by asking for its end."""

    def __init__(
        self,
        victim: str,
        *,
        step: int = STEP,
        between: Callable[[Job], None] | None = None,
        at: Callable[[Job], None] | None = None,
        asks: bool = False,
    ) -> None:
        super().__init__()
        self.victim, self.step, self.between, self.at, self.asks = victim, step, between, at, asks
        self.jobs: dict[str, Job] = {}

    def stepping(self, job: Job) -> None:
        if job.name == self.victim and job.progress.step == self.step and self.at is not None:
            self.at(job)

    def requests(self) -> list[Request]:
        now = self.asks and self.jobs[self.victim].progress.step == self.step
        return [Request(self.victim, "cancel")] if now else []

    def end_round(self) -> bool:
        job = self.jobs[self.victim]
        if job.progress.step == self.step and self.between is not None:
            self.between(job)
        return super().end_round()


def run(ear: Hit, optimizer: str = "sgd") -> tuple[World, dict[str, Job]]:
    world, jobs = build(optimizer)
    ear.jobs = jobs
    world.trainer(list(jobs.values()), ear, share=256).run()
    return world, jobs


def nan_weight(job: Job) -> None:
    with torch.no_grad():
        job.bank[job.name].tensors["model.layers.0.self_attn.k_proj"]["lora_A"].view(-1)[0] = math.nan


def poisoned_row(job: Job) -> None:
    for row in job.examples.rows:  # type: ignore[attr-defined]
        object.__setattr__(row, "weights", (0.0, *[math.inf] * (len(row.weights) - 1)))


def unreadable(job: Job) -> None:
    job.examples.broken = True  # type: ignore[attr-defined]


def absurd_rate(job: Job) -> None:
    job.peak = 1e38


def cancel(job: Job) -> None:
    job.end(JobState.CANCELLED, "cancelled")


# What hits it (None: a request to cancel), the job's code, and the step in which its rows were still in the pass (None: they were not).
FAULTS = {
    "nan_weight": (nan_weight, "non_finite", STEP),
    "poisoned_row": (poisoned_row, "non_finite", STEP),
    "unreadable": (unreadable, "data", None),
    "absurd_rate": (absurd_rate, "non_finite", STEP + 1),
    "cancelled": (None, "cancelled", None),
}


@pytest.fixture(scope="module")
def cancelled() -> Callable[[str, int | None], World]:
    """The run in which a job is cancelled: between two rounds (None), or when its gradient of a step is whole, kept for all tests."""
    known: dict[tuple[str, int | None], World] = {}

    def get(victim: str, step: int | None) -> World:
        if (victim, step) not in known:
            known[victim, step] = run(
                Hit(victim, between=cancel) if step is None else Hit(victim, step=step, at=cancel)
            )[0]
        return known[victim, step]

    return get


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_others_end_as_if_it_had_been_cancelled(
    fault: str, victim: str, cancelled: Callable[[str, int | None], World]
) -> None:
    """Five faults in four of sixteen jobs: fifteen are bitwise those of the run in which the victim is cancelled at that step."""
    hit, code, step = FAULTS[fault]
    ear = Hit(victim, between=hit, asks=hit is None)
    world, jobs = run(ear)
    assert ear.ends[victim] == code
    assert {ear.ends[name] for name in NAMES if name != victim} == {"finished"}
    assert jobs[victim].progress.step == (STEP if step is None else step)
    reference = cancelled(victim, step)
    for name in NAMES:
        if name != victim:
            assert all(torch.equal(a, b) for a, b in zip(values(world, name), values(reference, name), strict=True)), (
                name
            )


@pytest.mark.parametrize("name", NAMES)
def test_each_of_sixteen_is_within_rounding_of_its_solo_run(
    name: str, cancelled: Callable[[str, int | None], World]
) -> None:
    """With SGD, a job beside fifteen others, one of which fails, ends within 1e-5 of its run alone."""
    world = cancelled("job05", STEP)
    if name == "job05":
        return
    alone, jobs = build()
    alone.trainer([jobs[name]]).run()
    assert apart(values(world, name), values(alone, name)) < 1e-5


def test_a_neighbours_fault_changes_no_bit_with_adamw() -> None:
    """The same with AdamW and dropout: NaN in one job, bits of the others as when it is cancelled."""
    faulty, _ = run(Hit("job03", between=nan_weight), "adamw")
    reference, _ = run(Hit("job03", at=cancel), "adamw")
    for name in NAMES:
        if name != "job03":
            assert all(torch.equal(a, b) for a, b in zip(values(faulty, name), values(reference, name), strict=True))


def test_an_evaluation_that_raises_ends_its_job_alone() -> None:
    """Held-out examples that cannot be judged are that job's own fault."""
    world, ear = World(), Ear()
    jobs = [
        world.job("bad", held_out=[Example((1, 2), (0.0, 0.0), "held:1")]),
        world.job("good", held_out=examples(2), seed=1),
    ]
    world.trainer(jobs, ear).run()
    assert ear.ends == {"bad": "data", "good": "finished"}
    assert 'job "bad": its evaluation failed' in jobs[0].reason
