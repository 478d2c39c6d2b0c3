"""The engine: takes requests from any thread, and answers them step by step.

    engine = Engine(base.model, base.tokenizer, bank)
    for event in engine.run(GenerationRequest("r1", tuple(ids))):     # in the caller's thread
        ...
    engine.start()                                                    # or in a thread of its own, for many callers
    stream = engine.submit(request)

A step plans (``scheduler.py``), computes (``runner.py``), chooses tokens (``sampler.py``) and hands out events. An error of one sequence
ends that sequence: if a step fails, its sequences are computed one by one, and those that fail alone end with the error. Any other error
in the engine's thread ends all requests, and the engine refuses new ones.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.adapters import Bank
from veneer.data.chat.render import Renderer
from veneer.data.chat.stops import stop_ids
from veneer.errors import BaseModelError, ConfigError, EngineBusyError, ServeError
from veneer.models.flat import FlatRunner
from veneer.models.load import own_ends
from veneer.serve.engine.adapters import AdapterLimits, AdapterStore, AdapterVersion
from veneer.serve.engine.answer import Ending, emit_end, next_token, prompt_scores, start_text
from veneer.serve.engine.blocks import BlockPool, root_digest
from veneer.serve.engine.cache import PagedCache
from veneer.serve.engine.decoding import fastest_runner
from veneer.serve.engine.grammar import GrammarCompiler
from veneer.serve.engine.request import (
    AdapterStatus,
    EngineMetrics,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    RequestStream,
    TenantCounter,
)
from veneer.serve.engine.runner import Embedder, scores_prompt
from veneer.serve.engine.sampler import Chosen, choose
from veneer.serve.engine.scheduler import Chunk, Scheduler, SchedulerLimits
from veneer.serve.engine.sequence import Sequence
from veneer.serve.engine.turns import ModelTurns
from veneer.serve.runner_record import RunnerRecord

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLimits:
    """Limits of an engine.

    Attributes:
        context: maximum tokens of prompt and answer together; None takes the model's.
        cache_tokens: tokens whose keys and values are kept; None takes four contexts, at most 32,768.
        block: tokens of a cache block.
        waiting: maximum requests that wait.
        scheduler, adapters: limits of the scheduler and of the adapters that are kept.
        background_share: maximum part of the time that `Engine.exclusive` takes while requests run.
    """

    context: int | None = None
    cache_tokens: int | None = None
    block: int = 16
    waiting: int = 10_000
    scheduler: SchedulerLimits = field(default_factory=SchedulerLimits)
    adapters: AdapterLimits = field(default_factory=AdapterLimits)
    background_share: float = 0.5


class Engine:
    """Answers requests with one model under the adapters of its bank.

    All public methods may be called from any thread; none waits for a running step unless it says so.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        bank: the adapters; those that it has are pinned under their names.
        limits: see `EngineLimits`.
        record: keeps which runner the model passed its checks with (`runner_record.py`); without one, they run at each start.

    Raises:
        BaseModelError: the model does not generate text, or has no tokenizer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bank: Bank | None = None,
        limits: EngineLimits | None = None,
        *,
        record: RunnerRecord | None = None,
    ) -> None:
        if tokenizer is None:
            raise BaseModelError(
                "the base has no tokenizer, so it cannot be given text; add its tokenizer's files to the folder"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.bank = bank
        self.limits = limits = limits or EngineLimits()
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        self._vocabulary = int(config.vocab_size)
        self.renderer = Renderer(tokenizer)
        longest = int(limits.context or getattr(config, "max_position_embeddings", None) or 2048)
        tokens = limits.cache_tokens or min(4 * longest, 32_768)
        self._pool = BlockPool(max(1, tokens // limits.block), limits.block)
        self._cache = PagedCache(self._pool.count, limits.block)
        model.eval()
        self._context = min(longest, self._pool.count * limits.block)
        self.runner = fastest_runner(model, bank, self._cache, self._vocabulary, self._context, record)
        if self.runner.paged and (rope := FlatRunner(model, probe=False).longest_position) is not None:
            self._context = min(self._context, rope)
        prepare = getattr(self.runner, "prepare", None)
        self._store = AdapterStore(bank, limits.adapters, self._wake, prepare)
        self._embedder = Embedder(model, bank)
        self._scheduler = Scheduler(
            self._pool,
            limits.scheduler,
            self._acquire,
            lambda sequence: self._store.leave_batch(sequence.adapters),
            paged=self.runner.paged,
        )
        self._grammars = GrammarCompiler(tokenizer, self._vocabulary, self._stops(()))
        self._inbox: deque[Sequence] = deque()
        self._unread: list[Sequence] = []
        """Prompts to embed whose adapters are still being read."""
        self._sequences: dict[str, Sequence] = {}
        self._failed: list[tuple[Sequence, Ending]] = []
        self._changed = threading.Condition()
        self._turns = ModelTurns(limits.background_share)
        self._thread: threading.Thread | None = None
        self._stopping = self._closed = False
        self.failure = ""
        """The error that ended the engine's thread; empty if none did."""
        self._numbers = itertools.count()
        self._steps = 0
        self._busy = 0.0
        self._cached_tokens = 0
        self._prompt_tokens = TenantCounter()
        self._generated_tokens = TenantCounter()
        self._finished: Counter[FinishReason] = Counter()

    @property
    def context_length(self) -> int:
        """Maximum tokens of prompt and answer together."""
        return self._context

    @property
    def vocabulary(self) -> int:
        """Number of tokens of the model."""
        return self._vocabulary

    # Requests

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None] | None = None) -> RequestStream:
        """Queue a request.

        Args:
            request: the text to generate.
            on_event: called on the engine's thread with each event in place of the returned stream's queue; it must return at once
                (``loop.call_soon_threadsafe(queue.put_nowait, event)`` for asyncio).

        Raises:
            ConfigError: a parameter that cannot be honoured, or a prompt that does not fit; the message begins with its name.
            AdapterError: the mix names an adapter that is not loaded.
            EngineBusyError: the queue is full.
            ServeError: the engine is stopping, or has failed.
        """
        sampling = request.sampling
        request.check(self._vocabulary, self._context)
        request = self._store.without_zeros(request)
        grammar = None if sampling.grammar is None else self._grammars.compile(sampling.grammar)
        stream = RequestStream(request, self.cancel)
        versions = self._store.hold(request.mix)
        try:
            mix = tuple((one.bank_name, weight) for one, (_, weight) in zip(versions, request.mix, strict=True))
            room = self._context - len(request.prompt)
            sequence = Sequence(
                request,
                mix,
                versions,
                self._root(request, versions),
                len(request.prompt) + (room if sampling.max_tokens is None else min(room, sampling.max_tokens)),
                on_event or stream.put,
                *start_text(self.tokenizer, request),
                self._stops(versions),
                grammar,
            )
            with self._changed:
                self._admit(sequence)
                self._changed.notify_all()
        except BaseException:
            self._store.release(versions)
            raise
        return stream

    def _stops(self, versions: tuple[AdapterVersion, ...]) -> frozenset[int]:
        """The tokens that end an answer: those that its adapters were trained with, and the base's own."""
        return frozenset(stop_ids(self.renderer, own_ends(self.model), [one.stops for one in versions]))

    def _root(self, request: GenerationRequest, versions: tuple[AdapterVersion, ...]) -> bytes:
        """The digest of everything besides the tokens on which keys and values depend. Those of an adapter that trains are not reused."""
        mix = sorted((one.version, weight) for one, (_, weight) in zip(versions, request.mix, strict=True))
        return root_digest(mix, request.salt, next(self._numbers) if any(one.trained for one in versions) else None)

    def _admit(self, sequence: Sequence) -> None:
        if self.failure:
            raise ServeError(self.failure)
        if self._stopping:
            raise ServeError("the engine is stopping, so it takes no more requests; send it to another server")
        if sequence.id in self._sequences:
            raise ConfigError(f"id: another request is named {sequence.id}; choose a new name")
        if len(self._sequences) >= self.limits.waiting + self.limits.scheduler.running:
            raise EngineBusyError(f"{len(self._sequences)} requests wait already; send it again later")
        self._sequences[sequence.id] = sequence
        self._inbox.append(sequence)

    def run(self, request: GenerationRequest) -> Iterator[Event]:
        """Submit a request and compute in this thread until it ends. Ending the iteration early cancels it."""
        stream = self.submit(request)
        try:
            while True:
                while (event := stream.poll()) is not None:
                    yield event
                    if isinstance(event, Finished):
                        return
                self.step()
        finally:
            if stream.cancel() and self._thread is None:
                self.step()

    def cancel(self, request_id: str) -> bool:
        """End a request at the next step; False if there is none of this id."""
        with self._changed:
            sequence = self._sequences.get(request_id)
            if sequence is None or sequence.cancelled:
                return False
            sequence.cancelled = True
            self._changed.notify_all()
        return True

    # Adapters

    def load_adapter(self, name: str, path: Path, *, pinned: bool = False) -> AdapterStatus:
        """Read and verify an adapter from a folder, in the caller's thread, and route new requests of this name to it.

        An adapter of the same name is replaced: its running requests end with the old one.

        Raises:
            CheckpointError, AdapterError: the folder is damaged, or does not fit the base.
        """
        return self._store.load(name, path, pinned=pinned)

    def unload_adapter(self, name: str) -> None:
        """Refuse new requests of this name; running ones end with it. Raises AdapterError if no adapter has it."""
        self._store.unload(name)

    def adapters(self) -> list[AdapterStatus]:
        """The adapters that requests may name."""
        return self._store.status()

    def _acquire(self, sequence: Sequence) -> bool:
        try:
            return self._store.enter_batch(sequence.adapters)
        except Exception as error:
            self._failed.append((sequence, Ending.by(error)))
            return False

    # Steps

    def step(self) -> bool:
        """Compute one step. Returns False if there was nothing to compute."""
        with self._turns.step():
            begun = time.monotonic()
            self._take()
            chunks = self._scheduler.plan()
            for sequence, ending in self._failed:
                self._end(sequence, ending)
            self._failed.clear()
            self._compute([chunk for chunk in chunks if not chunk.sequence.cancelled])
            self._store.sweep()
            if chunks:
                self._steps += 1
                self._busy += time.monotonic() - begun
            return bool(chunks)

    def _take(self) -> None:
        """Take what other threads have asked for."""
        with self._changed:
            new = [*self._unread, *self._inbox]
            self._unread.clear()
            self._inbox.clear()
            cancelled = [sequence for sequence in self._sequences.values() if sequence.cancelled]
        for sequence in new:
            if not sequence.cancelled:
                self._begin(sequence)
        for sequence in cancelled:
            self._end(sequence, Ending("cancelled"))

    def _begin(self, sequence: Sequence) -> None:
        with self._ended_by_errors(sequence):
            if sequence.request.embed:
                if not self._store.enter_batch(sequence.adapters):
                    self._unread.append(sequence)
                    return
                try:
                    sequence.embedding = self._embedder(sequence)
                finally:
                    self._store.leave_batch(sequence.adapters)
            if sequence.max_length == sequence.prompt_length and sequence.sampling.prompt_logprobs is None:
                self._end(sequence, Ending("length"))
            else:
                self._scheduler.add(sequence)

    def _compute(self, chunks: list[Chunk]) -> None:
        """Compute chunks and hand out what they give; those that fail by themselves end."""
        if not chunks:
            return
        if len(chunks) > 1 and not self.runner.paged:
            # The model's own caches go on with each chunk, so none can be computed again because another failed.
            for chunk in chunks:
                self._compute([chunk])
            return
        try:
            logits, counts = self.runner.run(chunks)
        except Exception as error:
            if len(chunks) > 1:
                for chunk in chunks:
                    self._compute([chunk])
            else:
                self._end(chunks[0].sequence, Ending.by(error))
            return
        self._advance(chunks, logits, counts)

    def _advance(self, chunks: list[Chunk], logits_KV: Tensor, counts: list[int]) -> None:
        """Choose tokens and hand out what the chunks gave."""
        rows: list[int] = []
        ready: list[Sequence] = []
        end = 0
        for chunk, count in zip(chunks, counts, strict=True):
            sequence, end = chunk.sequence, end + count
            if chunk.start == sequence.cached and sequence.generated == 0:
                self._cached_tokens += sequence.cached
            prompt = min(chunk.start + chunk.count, sequence.prompt_length) - chunk.start
            self._prompt_tokens.add(sequence.tenant, max(0, prompt))
            with self._ended_by_errors(sequence):
                if scores_prompt(chunk):
                    prompt_scores(chunk, logits_KV[end - count : end])
                self._scheduler.computed(chunk)
                if chunk.last and sequence.max_length == sequence.prompt_length:
                    self._end(sequence, Ending("length"))
                elif chunk.last:
                    ready.append(sequence)
                    rows.append(end - 1)
        for sequence, chosen in self._chosen(ready, rows, logits_KV):
            self._generated_tokens.add(sequence.tenant, 1)
            with self._ended_by_errors(sequence):
                if (ending := next_token(sequence, chosen)) is not None:
                    self._end(sequence, ending)

    def _chosen(self, sequences: list[Sequence], rows: list[int], logits_KV: Tensor) -> list[tuple[Sequence, Chosen]]:
        """Sequences with their next tokens; those whose choice fails end."""
        if not sequences:
            return []
        try:
            return list(zip(sequences, choose(sequences, rows, logits_KV), strict=True))
        except Exception as error:
            if len(sequences) == 1:
                self._end(sequences[0], Ending.by(error))
                return []
        each = zip(sequences, rows, strict=True)
        return [found for one, row in each for found in self._chosen([one], [row], logits_KV)]

    @contextlib.contextmanager
    def _ended_by_errors(self, sequence: Sequence) -> Iterator[None]:
        """End a sequence with the error that is raised in this context."""
        try:
            yield
        except Exception as error:
            self._end(sequence, Ending.by(error))

    def _end(self, sequence: Sequence, ending: Ending) -> None:
        with self._changed:
            if self._sequences.pop(sequence.id, None) is None:
                return
            self._finished[ending.reason] += 1
        self._scheduler.remove(sequence)
        self._store.release(sequence.adapters)
        emit_end(sequence, ending)

    # Beside other work

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the model between two steps, for work beside serving (a training step). Waits for its turn.

        While requests run, the time inside is bounded by the engine's ``background_share``.
        """
        try:
            with self._turns.other_work(lambda: bool(self._sequences)):
                yield
        finally:
            self._wake()

    def start(self) -> None:
        """Run steps in a thread until `stop`."""
        if self._thread is None:
            self._closed = self._stopping = False
            self._thread = threading.Thread(target=self._loop, name="veneer-engine", daemon=True)
            self._thread.start()

    def stop(self, *, drain: float = 0.0) -> None:
        """Refuse new requests, let running ones end for ``drain`` seconds, cancel the rest, and end the thread."""
        with self._changed:
            self._stopping = True
        until = time.monotonic() + drain
        while self._sequences and time.monotonic() < until:
            time.sleep(0.01)
        with self._changed:
            for sequence in self._sequences.values():
                sequence.cancelled = True
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if not self.failure:
            self.step()

    def _loop(self) -> None:
        try:
            while not self._closed:
                self._turns.give_way()
                if not self.step():
                    self._wait()
        except Exception as error:
            _log.exception("the engine failed")
            self._fail(error)

    def _wait(self) -> None:
        """Wait until there is something to compute."""
        with self._changed:
            if not self._inbox and not self._closed and not any(one.cancelled for one in self._sequences.values()):
                self._changed.wait(0.05 if self._sequences else None)

    def _fail(self, error: Exception) -> None:
        """End all requests and refuse new ones: the state of the engine may be damaged."""
        with self._changed:
            self.failure = f"the engine failed ({type(error).__name__}: {error}); restart the server"
            left = list(self._sequences.values())
            self._sequences.clear()
            self._inbox.clear()
            self._finished["error"] += len(left)
        for sequence in left:
            emit_end(sequence, Ending.by(ServeError(self.failure)))

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def metrics(self) -> EngineMetrics:
        """Counts and present state."""
        places = Counter(one.place for one in self._store.status())  # not inside: the adapters may be locked
        with self._changed:
            running = len(self._scheduler.running)
            return EngineMetrics(
                running=running,
                waiting=max(0, len(self._sequences) - running),
                waiting_by_adapter=Counter(one.tenant for one in self._sequences.values() if one.started is None),
                steps=self._steps,
                prompt_tokens=dict(self._prompt_tokens),
                generated_tokens=dict(self._generated_tokens),
                cached_tokens=self._cached_tokens,
                finished=dict(self._finished),
                preemptions=self._scheduler.preemptions,
                blocks=self._pool.count,
                free_blocks=self._pool.free,
                cached_blocks=self._pool.cached,
                adapters_on_disk=places["disk"],
                adapters_in_memory=places["memory"],
                adapters_in_bank=places["bank"],
                adapter_loads=self._store.loads,
                adapter_evictions=self._store.evictions,
                busy_seconds=self._busy,
            )
