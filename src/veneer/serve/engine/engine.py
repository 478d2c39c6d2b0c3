"""The engine: takes requests from any thread, and answers them step by step.

    engine = Engine(base.model, base.tokenizer, bank)
    for event in engine.run(GenerationRequest("r1", tuple(ids))):     # in the caller's thread
        ...
    engine.start()                                                    # or in a thread of its own, for many callers
    stream = engine.submit(request)

A step plans (``scheduler.py``), computes (``runner.py``), chooses tokens (``sampler.py``) and hands out events. What fails with one
sequence ends that sequence: if a step fails, its sequences are computed one by one, and those that fail alone end with the error.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapters import Bank
from veneer.data.chat.render import Renderer
from veneer.data.chat.stops import stop_ids
from veneer.errors import BaseModelError, ConfigError, EngineBusyError, ServeError, VeneerError
from veneer.models.flat import Flat, FlatRunner
from veneer.models.load import own_ends
from veneer.serve.engine.adapters import AdapterLimits, AdapterStore, AdapterVersion
from veneer.serve.engine.answer import finished, next_token, prompt_scores, start_text
from veneer.serve.engine.blocks import BlockPool, root_digest
from veneer.serve.engine.cache import PagedCache
from veneer.serve.engine.decoding import CheckRecord, fastest_runner
from veneer.serve.engine.grammar import GrammarCompiler
from veneer.serve.engine.request import (
    AdapterStatus,
    EngineMetrics,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    RequestStream,
    TokenLogprob,
)
from veneer.serve.engine.runner import scores_prompt
from veneer.serve.engine.sampler import choose
from veneer.serve.engine.scheduler import Chunk, Scheduler, SchedulerLimits
from veneer.serve.engine.sequence import Sequence


@dataclass(frozen=True)
class EngineLimits:
    """Limits of an engine.

    Attributes:
        context: most tokens of prompt and answer; None takes the model's.
        cache_tokens: tokens whose keys and values are kept; None takes four contexts, at most 32,768.
        block: tokens of a cache block.
        waiting: requests that may wait.
        scheduler, adapters: see there.
        background_share: part of the time that `Engine.exclusive` may take while requests run.
    """

    context: int | None = None
    cache_tokens: int | None = None
    block: int = 16
    waiting: int = 10_000
    scheduler: SchedulerLimits = field(default_factory=SchedulerLimits)
    adapters: AdapterLimits = field(default_factory=AdapterLimits)
    background_share: float = 0.5


class Engine:
    """Answers requests with one model under the adapters of its bank. See `GenerationEngine` for the methods that callers use.

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
        record: CheckRecord | None = None,
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
        self._scheduler = Scheduler(
            self._pool,
            limits.scheduler,
            self._acquire,
            lambda sequence: self._store.rest(sequence.adapters),
            paged=self.runner.paged,
        )
        self._grammars = GrammarCompiler(tokenizer, self._vocabulary, self._stops(()))
        self._inbox: deque[Sequence] = deque()
        self._sequences: dict[str, Sequence] = {}
        self._failed: list[tuple[Sequence, VeneerError]] = []
        self._changed = threading.Condition()
        self._model_lock = threading.Lock()
        self._background = threading.Semaphore(1)
        self._background_until = 0.0
        self._outside = 0
        self._thread: threading.Thread | None = None
        self._stopping = self._closed = False
        self._numbers = itertools.count()
        self._steps = 0
        self._busy = 0.0
        self._cached_tokens = 0
        self._prompt_tokens: Counter[str] = Counter()
        self._generated_tokens: Counter[str] = Counter()
        self._finished: Counter[FinishReason] = Counter()

    @property
    def context_length(self) -> int:
        """Most tokens that prompt and answer may have together."""
        return self._context

    @property
    def vocabulary(self) -> int:
        """Number of tokens of the model."""
        return self._vocabulary

    # Requests

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None] | None = None) -> RequestStream:
        """Queue a request; see `GenerationEngine.submit`."""
        sampling = request.sampling
        for name, problem in sampling.problems(self._vocabulary).items():
            raise ConfigError(f"{name}: {problem}")
        self._check_prompt(request)
        names = [name for name, _ in request.mix]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"mix: {name} is named twice; give each adapter one weight")
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

    def _check_prompt(self, request: GenerationRequest) -> None:
        size, sampling = len(request.prompt), request.sampling
        if not size:
            raise ConfigError("prompt: expected at least one token, found none")
        if not all(0 <= token < self._vocabulary for token in request.prompt):
            raise ConfigError(f"prompt: expected tokens from 0 to {self._vocabulary - 1}")
        if size + (sampling.max_tokens != 0) > self._context:
            raise ConfigError(
                f"prompt: it has {size} tokens, and prompt and answer may have {self._context} together; shorten it"
            )

    def _admit(self, sequence: Sequence) -> None:
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
        """Read and verify an adapter in this thread, and route new requests of this name to it."""
        return self._store.load(name, path, pinned=pinned)

    def unload_adapter(self, name: str) -> None:
        """Refuse new requests of this name; running ones end with it."""
        self._store.unload(name)

    def adapters(self) -> list[AdapterStatus]:
        """The adapters that requests may name."""
        return self._store.status()

    def _acquire(self, sequence: Sequence) -> bool:
        try:
            return self._store.ready(sequence.adapters)
        except VeneerError as error:
            self._failed.append((sequence, error))
            return False

    # Steps

    def step(self) -> bool:
        """Compute one step. Returns False if there was nothing to compute."""
        with self._model_lock:
            begun = time.monotonic()
            self._take()
            chunks = self._scheduler.plan()
            for sequence, error in self._failed:
                self._end(sequence, "error", error=error)
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
            new = list(self._inbox)
            self._inbox.clear()
            cancelled = [sequence for sequence in self._sequences.values() if sequence.cancelled]
        for sequence in new:
            if not sequence.cancelled:
                self._begin(sequence)
        for sequence in cancelled:
            self._end(sequence, "cancelled")

    def _begin(self, sequence: Sequence) -> None:
        try:
            if sequence.request.embed:
                sequence.embedding = self._embed(sequence)
            if sequence.most == sequence.prompt_length and sequence.sampling.prompt_logprobs is None:
                self._end(sequence, "length")
                return
        except VeneerError as error:
            self._end(sequence, "error", error=error)
            return
        self._scheduler.add(sequence)

    @torch.no_grad()
    def _embed(self, sequence: Sequence) -> tuple[float, ...] | None:
        """The mean of the prompt's final states, scaled to length 1."""
        while not self._store.ready(sequence.adapters):
            time.sleep(0.005)
        try:
            flat = Flat.of([list(sequence.request.prompt)])
            with (
                contextlib.nullcontext()
                if self.bank is None
                else self.bank.use(dict(sequence.mix) or None, training=False)
            ):
                states = self._embedder.hidden(flat).float().mean(0)
        finally:
            self._store.rest(sequence.adapters)
        return tuple((states / states.norm().clamp_min(1e-12)).tolist())

    @property
    def _embedder(self) -> FlatRunner:
        if not hasattr(self, "_flat"):
            self._flat = FlatRunner(self.model)
        return self._flat

    def _compute(self, chunks: list[Chunk]) -> None:
        """Compute chunks and hand out what they give; those that fail by themselves end."""
        if not chunks:
            return
        try:
            logits, counts = self.runner.run(chunks)
        except Exception as error:
            if len(chunks) > 1:
                for chunk in chunks:
                    self._compute([chunk])
                return
            cause = error if isinstance(error, VeneerError) else ServeError(f"{type(error).__name__}: {error}")
            self._end(chunks[0].sequence, "error", error=cause)
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
            self._prompt_tokens[sequence.tenant] += max(0, prompt)
            if scores_prompt(chunk):
                prompt_scores(chunk, logits_KV[end - count : end])
            self._scheduler.computed(chunk)
            if chunk.last and sequence.most == sequence.prompt_length:
                self._end(sequence, "length")
            elif chunk.last:
                ready.append(sequence)
                rows.append(end - 1)
        if not ready:
            return
        for sequence, chosen in zip(ready, choose(ready, rows, logits_KV), strict=True):
            self._generated_tokens[sequence.tenant] += 1
            ended = next_token(sequence, chosen)
            if ended is not None:
                self._end(sequence, ended.reason, stopped_by=ended.stopped_by, error=ended.error, logprob=ended.logprob)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        stopped_by: str | int | None = None,
        error: VeneerError | None = None,
        logprob: TokenLogprob | None = None,
    ) -> None:
        with self._changed:
            if self._sequences.pop(sequence.id, None) is None:
                return
            self._finished[reason] += 1
        self._scheduler.remove(sequence)
        self._store.release(sequence.adapters)
        sequence.emit(finished(sequence, reason, stopped_by=stopped_by, error=error, logprob=logprob))

    # Beside other work

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the model between two steps, for work beside serving; waits for its turn."""
        with self._background:
            while self._sequences and time.monotonic() < self._background_until:
                time.sleep(min(0.005, max(0.0, self._background_until - time.monotonic())))
            self._outside += 1
            try:
                with self._model_lock:
                    self._outside -= 1
                    begun = time.monotonic()
                    try:
                        yield
                    finally:
                        ended = time.monotonic()
                        share = min(max(self.limits.background_share, 1e-3), 1.0)
                        self._background_until = ended + (ended - begun) * (1 - share) / share
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
        self.step()

    def _loop(self) -> None:
        while not self._closed:
            if self._outside:
                time.sleep(0.0002)  # a lock does not go to the thread that waits for it unless this one lets it
            if not self.step():
                with self._changed:
                    if not self._inbox and not self._closed and not any(s.cancelled for s in self._sequences.values()):
                        self._changed.wait(0.05 if self._sequences else None)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def metrics(self) -> EngineMetrics:
        """Counts and present state."""
        with self._changed:
            running = len(self._scheduler.running)
            waiting = Counter(sequence.tenant for sequence in self._sequences.values() if sequence.started is None)
            every = self._store.status()
            places = Counter(one.place for one in every)
            return EngineMetrics(
                running=running,
                waiting=max(0, len(self._sequences) - running),
                waiting_by_adapter=dict(waiting),
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
