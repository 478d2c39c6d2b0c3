"""Rounds: many jobs on one base end as each would alone, whoever joins, leaves or waits meanwhile."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.training.made import Ear, World, apart, examples, values

from veneer.adapters import DoRA, LoRA
from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.errors import TrainingError
from veneer.training.loop.job import Job, JobState
from veneer.training.loop.trainer import Request, passes

EIGHT: dict[str, dict[str, Any]] = {
    "a": {"method": LoRA(r=4), "learning_rate": 1e-2},
    "b": {"method": DoRA(r=4), "learning_rate": 5e-3, "steps": 4},
    "c": {"method": LoRA(r=8, lora_dropout=0.2), "learning_rate": 2e-2, "batch_size": 3},
    "d": {"method": DoRA(r=8, lora_dropout=0.1), "learning_rate": 1e-2, "steps": 8},
    "e": {"method": LoRA(r=16, use_rslora=True), "learning_rate": 3e-3, "batch_size": 1},
    "f": {"method": DoRA(r=16), "learning_rate": 2e-3, "clip": None},
    "g": {"method": LoRA(r=32), "learning_rate": 1e-3, "weight_decay": 0.1, "steps": 3},
    "h": {"method": DoRA(r=5, use_rslora=True), "learning_rate": 4e-3, "schedule": "cosine"},
}


def jobs_of(world: World, names: Sequence[str], **common: Any) -> list[Job]:
    """Some of the eight; each job's seed is its own, whoever else is there."""
    found = []
    for name in names:
        own = {**EIGHT[name], **common}
        found.append(world.job(name, own.pop("method"), seed=ord(name), **own))
    return found


def alone(name: str, **common: Any) -> tuple[list[torch.Tensor], list[float]]:
    """A job's tensors and losses after a run of its own."""
    world, ear = World(), Ear()
    world.trainer(jobs_of(world, [name], **common), ear).run()
    return values(world, name), ear.losses[name]


@pytest.mark.parametrize("share", [512, 40, 0])
def test_eight_jobs_with_sgd_end_as_eight_runs(share: int) -> None:
    """LoRA and DoRA, ranks 4 to 32, own rates, two with dropout, different lengths: tensors within 1e-5 of solo runs."""
    world, ear = World(), Ear()
    world.trainer(jobs_of(world, [*EIGHT], optimizer="sgd"), ear, share=share).run()
    assert set(ear.ends.values()) == {"finished"}
    for name in EIGHT:
        tensors, losses = alone(name, optimizer="sgd")
        assert apart(values(world, name), tensors) < 1e-5
        assert ear.losses[name] == pytest.approx(losses, abs=1e-5)


def test_eight_jobs_with_adamw_lose_as_eight_runs() -> None:
    """AdamW divides by gradients that may be tiny, so losses are held, step by step, within 1e-4."""
    world, ear = World(), Ear()
    world.trainer(jobs_of(world, [*EIGHT]), ear).run()
    for name in EIGHT:
        assert ear.losses[name] == pytest.approx(alone(name)[1], abs=1e-4)


def test_jobs_that_take_turns_are_bitwise_as_alone() -> None:
    """Without shared passes every product has the shapes of a solo run, and every bit is the same."""
    world = World()
    world.trainer(jobs_of(world, [*EIGHT]), share=0).run()
    for name in EIGHT:
        assert all(torch.equal(a, b) for a, b in zip(values(world, name), alone(name)[0], strict=True))


def test_every_gradient_is_as_alone_from_the_same_state() -> None:
    """At every step of the mixed run, each job's gradient is within 1e-5 of what it would get alone just then."""
    world = World()
    jobs = jobs_of(world, [*EIGHT])
    worst: list[float] = []

    class Check(Ear):
        def stepping(self, job: Job) -> None:
            mixed = [p.grad.clone() for p in job.parameters if p.grad is not None]
            job.optimizer.zero_grad()
            pieces = trainer.pieces_of(job)
            if world.bank[job.name].method.lora_dropout:
                world.bank[job.name].draws -= len(pieces)
            for piece in pieces:
                world.stepper.forward_backward(make_batch(piece.examples, job.name))
            solo = [p.grad for p in job.parameters if p.grad is not None]
            worst.append(apart(mixed, solo))
            for p, grad in zip(job.parameters, mixed, strict=True):
                p.grad = grad

    trainer = world.trainer(jobs, Check())
    trainer.run()
    assert len(worst) == sum(job.steps for job in jobs) and max(worst) < 1e-5


def test_micro_batches_change_nothing_but_rounding() -> None:
    """Any budget of tokens a pass gives the same losses within 1e-6, without dropout."""
    found = {}
    for budget in (1, 9, 20, 64):
        world, ear = World(), Ear()
        world.trainer(jobs_of(world, ["a", "b"], batch_size=5), ear, budget=budget).run()
        found[budget] = ear.losses["a"] + ear.losses["b"]
    for losses in found.values():
        assert losses == pytest.approx(found[64], rel=2e-6)


def test_pieces_do_not_depend_on_neighbours() -> None:
    """A job's examples are cut by the budget alone; whole pieces share passes, never two of one job; nothing is lost."""
    world = World()
    jobs = jobs_of(world, [*EIGHT], batch_size=7)
    for budget in (1, 15, 40, 1000):
        trainer = world.trainer(jobs, budget=budget)
        pieces = [piece for job in jobs for piece in trainer.pieces_of(job)]
        for job in jobs:
            mine = [piece for piece in pieces if piece.job is job]
            assert [e for piece in mine for e in piece.examples] == job.next_examples()
            assert all(piece.tokens <= budget or len(piece.examples) == 1 for piece in mine)
        for share in (0, 30, 100, 10_000):
            groups = list(passes(pieces, share))
            assert [piece for group in groups for piece in group] == pieces
            for group in groups:
                assert len({piece.job.name for piece in group}) == len(group)
                assert len(group) == 1 or sum(piece.tokens for piece in group) <= share


@pytest.mark.parametrize("schedule", [*range(20), *(pytest.param(n, marks=pytest.mark.slow) for n in range(20, 100))])
def test_random_joining_and_leaving(schedule: int) -> None:
    """Jobs join, are cancelled, pause and go on at random rounds: each that ends has the tensors of its solo run."""
    rng = random.Random(schedule)
    names = rng.sample([*EIGHT], rng.randint(2, 4))
    world = World()
    first, later = names[:1], names[1:]
    jobs = jobs_of(world, first, optimizer="sgd", steps=3)
    joins = {rng.randint(0, 2): name for name in later}
    asks: dict[int, list[Request]] = {}
    for name in names:
        pause = rng.randint(0, 3)
        if rng.random() < 0.5:
            asks.setdefault(pause, []).append(Request(name, "pause"))
            asks.setdefault(pause + rng.randint(1, 2), []).append(Request(name, "resume"))
        elif rng.random() < 0.3:
            asks.setdefault(pause, []).append(Request(name, "cancel"))

    class Joining(Ear):
        def end_round(self) -> bool:
            name = joins.pop(self.rounds, None)
            if name is not None:
                self.joining += jobs_of(world, [name], optimizer="sgd", steps=3)
            return super().end_round()

    ear = Joining(asks)
    trainer = world.trainer(jobs, ear, share=rng.choice([0, 512]))
    for _ in range(12):  # a run of paused jobs stops; asking again goes on
        trainer.run()
        ear.rounds += 1
        if all(job.over for job in trainer.jobs) and not joins:
            break
        asks.setdefault(ear.rounds, []).extend(Request(job.name, "resume") for job in trainer.jobs)
    for job in trainer.jobs:
        assert job.state in (JobState.FINISHED, JobState.CANCELLED)
        if job.state is JobState.FINISHED:
            assert apart(values(world, job.name), alone(job.name, optimizer="sgd", steps=3)[0]) < 1e-5


def test_a_job_cannot_be_added_twice() -> None:
    """A new job with the name of one that is there is an error."""
    world, ear = World(), Ear()
    jobs = jobs_of(world, ["a", "b"], steps=2)
    ear.joining = jobs[:1]
    with pytest.raises(TrainingError, match='already has a job "a"'):
        world.trainer(jobs, ear).run()


def test_requests_that_do_not_apply_do_nothing() -> None:
    """Cancelling twice, resuming a job that runs, and pausing one that has ended change nothing."""
    world = World()
    jobs = jobs_of(world, ["a", "b"], steps=2)
    asks = {0: [Request("a", "cancel"), Request("a", "cancel"), Request("b", "resume"), Request("a", "pause")]}
    world.trainer(jobs, Ear(asks)).run()
    assert (jobs[0].state, jobs[0].progress.step, jobs[1].state) == (JobState.CANCELLED, 0, JobState.FINISHED)


def test_early_stopping_takes_the_held_out_loss() -> None:
    """A job that does not get better on other examples stops after so many looks; its neighbour goes on."""
    world, ear = World(), Ear()
    held = examples(3, seed=50)
    jobs = [
        world.job(
            "wild", rows=examples(4), held_out=held, learning_rate=1.0, steps=40, eval_every=1, early_stop_patience=3
        ),
        world.job("calm", seed=1, steps=20),
    ]
    world.trainer(jobs, ear).run()
    assert ear.ends == {"wild": "early_stop", "calm": "finished"}
    losses = [loss for _, loss in jobs[0].progress.evaluations]
    assert min(losses) == losses[-4] and jobs[0].progress.step < 40


def test_a_bad_token_ends_its_job_before_the_pass() -> None:
    """A token that the base does not know is an error of that job's data, with its place."""
    world, ear = World(), Ear()
    bad = [Example((5, 6, 999), (0.0, 1.0, 1.0), "rows.jsonl:7")]
    jobs = [world.job("good"), world.job("bad", rows=bad, seed=1)]
    world.trainer(jobs, ear).run()
    assert ear.ends == {"good": "finished", "bad": "data"}
    assert "rows.jsonl:7: found token 999, and the base has tokens 0 to 319" in jobs[1].reason


def test_a_pass_that_raises_is_run_again_job_by_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in a shared pass ends the job that causes it, with its code; the others go on as if it had not been there."""
    world, ear = World(), Ear()
    jobs = jobs_of(world, ["a", "c", "d"], optimizer="sgd", steps=4)
    forward, raised = world.stepper.forward_backward, []

    def broken(batch: Any, **rest: Any) -> Any:
        if "c" in batch.jobs and jobs[1].progress.step == 2:
            raised.append(len(set(batch.jobs)))
            raise MemoryError("cannot allocate memory")
        return forward(batch, **rest)

    monkeypatch.setattr(world.stepper, "forward_backward", broken)
    world.trainer(jobs, ear).run()
    assert raised == [3, 1]
    assert ear.ends == {"a": "finished", "c": "memory", "d": "finished"}
    assert 'job "c": its forward or backward pass failed: a pass of 29 tokens' in jobs[1].reason
    assert "a pass of 28 tokens fitted; use tokens_per_pass 28, or activation_checkpointing" in jobs[1].reason
    for name in ("a", "d"):
        assert apart(values(world, name), alone(name, optimizer="sgd", steps=4)[0]) < 1e-5
