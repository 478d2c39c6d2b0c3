"""The scheduler alone: order of a step, reservation, preemption and fairness, without a model."""

from __future__ import annotations

import random
from typing import Any

from veneer.serve.engine.blocks import BlockPool
from veneer.serve.engine.request import GenerationRequest, SamplingParams
from veneer.serve.engine.scheduler import Chunk, Scheduler, SchedulerLimits
from veneer.serve.engine.sequence import Sequence
from veneer.serve.engine.text import StopStrings

count = iter(range(10**9))


def sequence(prompt: int, answer: int = 4, tenant: str = "a", *, same: bool = False) -> Sequence:
    start = 0 if same else 1000 * next(count)
    request = GenerationRequest(
        f"r{next(count)}",
        tuple(range(start, start + prompt)),
        sampling=SamplingParams(max_tokens=answer),
        tenant=tenant,
    )
    return Sequence(request, (), (), b"", prompt + answer, lambda _: None, None, StopStrings(()))


def run(scheduler: Scheduler, chunks: list[Chunk]) -> list[Sequence]:
    """Compute a step: every sequence whose last token was computed gets another one. Returns those that ended."""
    ended = []
    for chunk in chunks:
        one = chunk.sequence
        last = chunk.last
        scheduler.computed(chunk)
        if last:
            one.tokens.append(7)
            if len(one.tokens) == one.max_length:
                scheduler.remove(one)
                ended.append(one)
    return ended


def made(blocks: int = 100, size: int = 4, **limits: Any) -> Scheduler:
    return Scheduler(BlockPool(blocks, size), SchedulerLimits(**{"reserve": 0, **limits}))


def test_decodes_come_before_prompts() -> None:
    """A step takes one token of every running answer, then fills up with pieces of prompts."""
    scheduler = made(step_tokens=10)
    first, second = sequence(4), sequence(30)
    scheduler.add(first)
    scheduler.add(second)
    plan = scheduler.plan()
    assert [(c.sequence, c.start, c.count) for c in plan] == [(first, 0, 4), (second, 0, 6)]
    run(scheduler, plan)
    assert [(c.sequence, c.start, c.count) for c in scheduler.plan()] == [(first, 4, 1), (second, 6, 9)]


def test_a_known_prefix_is_not_computed_again() -> None:
    """A second sequence with the same prompt computes only what its blocks do not have, and at least one token."""
    scheduler = made()
    first, second = sequence(12, same=True), sequence(12, same=True)
    scheduler.add(first)
    run(scheduler, scheduler.plan())
    scheduler.add(second)
    chunk = next(c for c in scheduler.plan() if c.sequence is second)
    assert (chunk.start, chunk.count, second.cached) == (8, 4, 8)
    assert second.blocks[:2] == first.blocks[:2]


def test_equal_prompts_of_one_step_wait_for_the_first() -> None:
    """Of several choices of one prompt the first computes it, and the others find it in the next step."""
    scheduler = made()
    group = [sequence(12, same=True) for _ in range(3)]
    for one in group:
        scheduler.add(one)
    plan = scheduler.plan()
    assert [c.sequence for c in plan] == group[:1]
    run(scheduler, plan)
    assert sum(c.count for c in scheduler.plan()) == 1 + 4


def test_the_last_admitted_is_preempted_and_ends_with_the_same_tokens() -> None:
    """Without a block for the next token the youngest gives up its blocks, waits in front, and is computed again."""
    scheduler = made(blocks=4, size=2)
    old, young = sequence(4, 4, "a"), sequence(4, 4, "b")
    scheduler.add(old)
    scheduler.add(young)
    ended: list[Sequence] = []
    for _ in range(20):
        ended += run(scheduler, scheduler.plan())
    assert ended == [old, young] and scheduler.preemptions == 1
    assert len(young.tokens) == 8 and scheduler.pool.free == 4


def test_a_blocked_head_is_passed_by_within_its_patience() -> None:
    """A sequence that does not fit lets others pass `patience` times; then nothing is admitted before it."""
    scheduler = made(blocks=10, size=2, patience=3)
    scheduler.add(sequence(8, 8, "small"))
    run(scheduler, scheduler.plan())
    big = sequence(18, 2, "big")
    scheduler.add(big)
    for _ in range(40):
        scheduler.add(sequence(2, 1, "small"))
    before = 0
    while big.started is None:
        run(scheduler, scheduler.plan())
        before += 1
        assert before < 20
    assert big.passed == 0 and before <= 3 + 8 + 2


def test_the_least_served_tenant_comes_first() -> None:
    """With one place, two tenants of which one has queued far more are served alternately."""
    scheduler = made(running=1)
    for _ in range(20):
        scheduler.add(sequence(4, 2, "many"))
    for _ in range(3):
        scheduler.add(sequence(4, 2, "few"))
    ended: list[Sequence] = []
    while sum(one.tenant == "few" for one in ended) < 3:
        ended += run(scheduler, scheduler.plan())
    assert len(ended) <= 7


def test_a_full_engine_gives_a_place_to_a_tenant_without_one() -> None:
    """While one tenant has all places with long answers, another one runs after `patience` steps, and the first loses one place."""
    scheduler = made(running=4, patience=5, blocks=1000)
    for _ in range(10):
        scheduler.add(sequence(2, 500, "many"))
    run(scheduler, scheduler.plan())
    late = sequence(2, 3, "few")
    scheduler.add(late)
    steps = 0
    while late.started is None:
        run(scheduler, scheduler.plan())
        steps += 1
        assert steps <= 7
    assert [one.tenant for one in scheduler.running].count("many") == 3 and scheduler.preemptions == 1


def test_a_full_cache_gives_blocks_to_a_tenant_without_a_place() -> None:
    """While one tenant's long answers have all blocks, and take each one that is freed, others begin after about `patience` steps."""
    scheduler = made(running=16, patience=5, blocks=30, size=2)
    for _ in range(40):
        scheduler.add(sequence(2, 40, "many"))
    for _ in range(30):
        run(scheduler, scheduler.plan())
    assert len(scheduler.running) < 16
    late = [sequence(2, 3, "few"), sequence(9, 3, "long")]
    for one in late:
        scheduler.add(one)
    steps = 0
    while any(one.started is None for one in late):
        run(scheduler, scheduler.plan())
        steps += 1
        assert steps <= 20
    while scheduler.running or scheduler.waiting:
        run(scheduler, scheduler.plan())
    assert scheduler.pool.free == 30


def test_a_tenant_that_comes_back_has_saved_up_nothing() -> None:
    """A tenant that was idle while others were served thousands of tokens does not run alone when it returns."""
    scheduler = made(running=1)
    for _ in range(50):
        scheduler.add(sequence(100, 1, "steady"))
    for _ in range(20):
        run(scheduler, scheduler.plan())
    for _ in range(10):
        scheduler.add(sequence(100, 1, "back"))
    order = [one.tenant for _ in range(10) for one in run(scheduler, scheduler.plan())]
    assert 3 <= order.count("steady") <= 7


def test_random_traces_end_and_give_everything_back() -> None:
    """Thousands of sequences of many tenants with too few blocks, some cancelled: all end, budgets hold, and all blocks come back."""
    for seed in range(5):
        draw = random.Random(seed)
        scheduler = made(blocks=24, size=2, running=6, step_tokens=16, patience=4, reserve=3)
        left = [sequence(draw.randrange(1, 20), draw.randrange(1, 20), f"t{draw.randrange(5)}") for _ in range(200)]
        live: list[Sequence] = []
        ended = 0
        for _ in range(100_000):
            if left and draw.random() < 0.3:
                live.append(left.pop())
                scheduler.add(live[-1])
            plan = scheduler.plan()
            assert len({c.sequence.id for c in plan}) == len(plan) and len(scheduler.running) <= 6
            assert sum(c.count for c in plan) <= 16 and all(c.start == c.sequence.computed for c in plan)
            for one in run(scheduler, plan):
                assert len(one.tokens) == one.max_length
                live.remove(one)
                ended += 1
            if live and draw.random() < 0.02:
                scheduler.remove(live.pop(draw.randrange(len(live))))
                ended += 1
            if ended == 200:
                break
        assert ended == 200 and scheduler.pool.free == 24 and not scheduler.running and not scheduler.waiting
