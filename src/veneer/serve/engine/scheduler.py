"""The scheduler: which tokens of which sequences the next step computes. No tensors.

A step takes one token of every sequence that decodes, then pieces of prompts up to a budget of tokens, then new sequences.

Admission   A sequence is admitted when its adapters are in the bank and there are blocks for its tokens and the next ``reserve``. One that
            does not fit is passed by, up to ``patience`` times; then nothing else is admitted before it.
Fairness    Among tenants (adapters, unless a request names another), the one that was served the fewest tokens comes first. One that
            comes back after a pause starts level with those that waited. Where all places or blocks are taken, the tenant with the most
            places gives one up, at most one a step, to a tenant that has none and was passed by ``patience`` steps long. So while others
            keep the engine full, a tenant waits at most ``patience`` steps for each tenant that waits with it, and a step more for
            each sequence that must give up its blocks.
Preemption  A sequence that needs a block when there is none takes those of the sequence admitted last, which waits again, first in its
            queue, and computes its tokens again (its own known blocks, most likely, are still there).
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from veneer.serve.engine.blocks import BlockPool
from veneer.serve.engine.sequence import Sequence


@dataclass(frozen=True)
class SchedulerLimits:
    """Limits of a step and of what runs.

    running: sequences that run at once. step_tokens: tokens of a step. reserve: tokens of answer for which blocks must be free at
    admission. patience: times that a sequence may be passed by.
    """

    running: int = 64
    step_tokens: int = 512
    reserve: int = 32
    patience: int = 16


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + count) of a sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def last(self) -> bool:
        """True if the sequence's next token follows from this chunk."""
        return self.start + self.count == len(self.sequence.tokens)


class Scheduler:
    """The waiting and the running sequences of one engine.

    Args:
        pool: the cache's blocks.
        limits: limits of a step and of what runs.
        acquire: brings a sequence's adapters to where they can run and holds them; False if they cannot be there yet.
        release: gives them up.
        paged: False where the model keeps keys and values itself: then a prompt is computed in one piece and no prefix is reused.
    """

    def __init__(
        self,
        pool: BlockPool,
        limits: SchedulerLimits,
        acquire: Callable[[Sequence], bool] = lambda _: True,
        release: Callable[[Sequence], None] = lambda _: None,
        *,
        paged: bool = True,
    ) -> None:
        self.paged = paged
        self.pool = pool
        self.limits = limits
        self.running: list[Sequence] = []
        self.waiting: dict[str, deque[Sequence]] = {}
        self.preemptions = 0
        self._acquire = acquire
        self._release = release
        self._served: dict[str, float] = {}

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._queue(sequence.tenant).append(sequence)

    def _queue(self, tenant: str) -> deque[Sequence]:
        found = self.waiting.get(tenant)
        if found is None:
            found = self.waiting[tenant] = deque()
            others = self._active()
            level = min((self._served[name] for name in others if name in self._served), default=0.0)
            self._served = {name: self._served.get(name, level) for name in others}
            self._served[tenant] = max(self._served.get(tenant, level), level)
        return found

    def _active(self) -> set[str]:
        return {*self.waiting, *(sequence.tenant for sequence in self.running)}

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that has ended, wherever it is."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._give_up(sequence)
            return
        queue = self.waiting.get(sequence.tenant)
        if queue is not None and sequence in queue:
            queue.remove(sequence)
            if not queue:
                del self.waiting[sequence.tenant]

    def plan(self) -> list[Chunk]:
        """The next step. Empty if nothing can run now."""
        chunks: list[Chunk] = []
        for sequence in [one for one in self.running if one.uncomputed == 1]:
            if sequence in self.running and self._grow(sequence, chunks):
                chunks.append(Chunk(sequence, sequence.computed, 1))
        budget = self.limits.step_tokens - len(chunks)
        for sequence in [one for one in self.running if one.uncomputed > 1]:
            budget -= self._prefill(sequence, budget, chunks)
        self._admit(budget, chunks)
        for chunk in chunks:
            tenant = chunk.sequence.tenant
            self._served[tenant] = self._served.get(tenant, 0.0) + chunk.count
        return chunks

    def _prefill(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        if budget <= 0:
            return 0
        count = min(budget, sequence.uncomputed) if self.paged else sequence.uncomputed
        chunks.append(Chunk(sequence, sequence.computed, count))
        return count

    def _grow(self, sequence: Sequence, chunks: list[Chunk]) -> bool:
        """Give a sequence the block for its next token; False if it was preempted for want of one."""
        while self.pool.blocks_for(len(sequence.tokens)) > len(sequence.blocks):
            found = self.pool.allocate(1)
            if found is not None:
                sequence.blocks += found
                continue
            victim = self.running[-1]
            self._preempt(victim)
            chunks[:] = [chunk for chunk in chunks if chunk.sequence is not victim]
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(victim)
        self._give_up(victim)
        self._queue(victim.tenant).appendleft(victim)

    def _give_up(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.digests, sequence.computed, sequence.state = [], [], 0, None
        self._release(sequence)

    def _admit(self, budget: int, chunks: list[Chunk]) -> None:
        """Admit heads of queues, the least served tenant's first."""
        tried: set[str] = set()
        admitted: list[Sequence] = []
        passed: list[Sequence] = []
        while budget > 0:
            tenants = [tenant for tenant in self.waiting if tenant not in tried]
            if not tenants:
                break
            urgent = [name for name in tenants if self.waiting[name][0].passed >= self.limits.patience]
            tenant = min(
                urgent or tenants, key=lambda name: (self._served.get(name, 0.0), self.waiting[name][0].arrived)
            )
            sequence = self.waiting[tenant][0]
            if len(self.running) >= self.limits.running and not self._make_place(sequence, tenant, chunks):
                passed += [self.waiting[name][0] for name in tenants]
                break
            found = self._start(sequence, admitted)
            if found != "started":
                tried.add(tenant)
                passed.append(sequence)
                if found == "no blocks" and not admitted and self._starved(tenant):
                    # Where all places are taken, this is counted below.
                    sequence.passed += len(self.running) < self.limits.running
                    self._make_place(sequence, tenant, chunks)
                if sequence.passed >= self.limits.patience:
                    break
                continue
            admitted.append(sequence)
            budget -= self._prefill(sequence, budget, chunks)
            self._served[tenant] = self._served.get(tenant, 0.0) + 1e-3
        if admitted or len(self.running) >= self.limits.running:
            for sequence in passed:
                sequence.passed += 1

    def _make_place(self, sequence: Sequence, tenant: str, chunks: list[Chunk]) -> bool:
        """Preempt the last sequence of the tenant with the most places, for one that has waited its time and has none."""
        if sequence.passed < self.limits.patience or not self._starved(tenant):
            return False
        held = self._places()
        largest = max(held, key=lambda name: held[name])
        victim = next(one for one in reversed(self.running) if one.tenant == largest)
        self._preempt(victim)
        chunks[:] = [chunk for chunk in chunks if chunk.sequence is not victim]
        return True

    def _places(self) -> Counter[str]:
        """The number of running sequences of each tenant."""
        return Counter(one.tenant for one in self.running)

    def _starved(self, tenant: str) -> bool:
        """True if a tenant has no place while another has several."""
        held = self._places()
        return not held[tenant] and max(held.values(), default=0) > 1

    def _start(self, sequence: Sequence, admitted: list[Sequence]) -> Literal["started", "no blocks", "later"]:
        """Admit one sequence, if its adapters and its blocks are to be had."""
        first = tuple(sequence.tokens[: self.pool.size])
        twins = any(one.root == sequence.root and tuple(one.tokens[: self.pool.size]) == first for one in admitted)
        if twins and len(sequence.tokens) > self.pool.size and sequence.reuses and self.paged:
            return "later"  # the next step finds the blocks that this step fills
        if not self._acquire(sequence):
            return "later"
        known = sequence.tokens[:-1] if sequence.reuses and self.paged else []
        blocks, digests = self.pool.match(sequence.root, known)
        ahead = min(self.limits.reserve, max(1, sequence.max_length - len(sequence.tokens)))
        needed = self.pool.blocks_for(len(sequence.tokens)) - len(blocks)
        if self.pool.free < self.pool.blocks_for(len(sequence.tokens) + ahead) - len(blocks):
            self.pool.release(blocks)
            self._release(sequence)
            return "no blocks"
        own = self.pool.allocate(needed)
        assert own is not None
        sequence.blocks, sequence.digests = [*blocks, *own], digests
        sequence.computed = len(blocks) * self.pool.size
        if sequence.started is None:
            sequence.cached = min(sequence.computed, sequence.prompt_length)
            sequence.started = time.monotonic()
        queue = self.waiting[sequence.tenant]
        queue.popleft()
        if not queue:
            del self.waiting[sequence.tenant]
        sequence.passed = 0
        self.running.append(sequence)
        return "started"

    def computed(self, chunk: Chunk) -> None:
        """Note that a chunk's keys and values are in the cache; full blocks become known."""
        sequence, size = chunk.sequence, self.pool.size
        sequence.computed = chunk.start + chunk.count
        if not self.paged:
            return
        for number in range(len(sequence.digests), sequence.computed // size):
            parent = sequence.digests[-1] if sequence.digests else sequence.root
            own = sequence.tokens[number * size : (number + 1) * size]
            sequence.digests.append(self.pool.publish(sequence.blocks[number], parent, own))
