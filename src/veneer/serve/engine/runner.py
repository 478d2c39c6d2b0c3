"""Runners: compute the tokens of a step with the model, under each sequence's own adapters.

    PagedRunner      one flat call for all sequences; keys and values in the engine's own blocks
    ModelCacheRunner  one call for each sequence; keys, values or states in the model's own cache
    NoCacheRunner    one call for each sequence on all of its tokens

The first that gives what the model gives on a whole text is used (`choose_runner`); the others say why they are slower.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from veneer.adapters import Bank
from veneer.adapters.runtime.route import Route
from veneer.errors import BaseModelError
from veneer.models.flat import Flat, FlatRunner
from veneer.models.flat_check import relative_error
from veneer.serve.engine.cache import PagedCache, StepAttention
from veneer.serve.engine.request import GenerationRequest, Mix
from veneer.serve.engine.scheduler import Chunk
from veneer.serve.engine.sequence import Sequence
from veneer.serve.engine.text import StopStrings

_BOUND = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}


class StepRunner(Protocol):
    """Computes steps."""

    paged: bool
    reason: str

    def run(self, chunks: Items[Chunk]) -> tuple[Tensor, list[int]]:
        """Logits [K, V] of all chunks, and the number of rows of each: see `rows_wanted`."""


def scores_prompt(chunk: Chunk) -> bool:
    """True if logits of all tokens of the chunk are needed."""
    sequence = chunk.sequence
    return sequence.sampling.prompt_logprobs is not None and chunk.start < sequence.prompt_length - 1


def rows_wanted(chunk: Chunk) -> int:
    """Number of the chunk's last tokens whose logits are needed: all where the prompt is scored, one where the next token follows."""
    return chunk.count if scores_prompt(chunk) else int(chunk.last)


class PagedRunner:
    """All sequences in one flat call."""

    paged = True
    reason = ""

    def __init__(self, flat: FlatRunner, bank: Bank | None, cache: PagedCache) -> None:
        self.flat = flat
        self._bank = bank
        self.cache = cache
        self._device = next(flat.model.parameters()).device

    @torch.no_grad()
    def run(self, chunks: Items[Chunk]) -> tuple[Tensor, list[int]]:
        """See `StepRunner`."""
        ids: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        bounds, kept = [0], []
        for chunk in chunks:
            end = chunk.start + chunk.count
            ids += chunk.sequence.tokens[chunk.start : end]
            positions += range(chunk.start, end)
            kept.append(rows_wanted(chunk))
            keep += range(len(ids) - kept[-1], len(ids))
            bounds.append(len(ids))
        made = Flat(torch.tensor(ids), torch.tensor(positions), torch.tensor(bounds))
        flat = self.flat.prepare(Flat(made.ids.to(self._device), made.positions.to(self._device), made.offsets))
        keep_K = torch.tensor(keep, dtype=torch.long)
        attend = StepAttention(self.cache, chunks, self._device)
        with self._routed([chunk.sequence.mix for chunk in chunks], made.offsets, self.flat.head_cells(flat, keep_K)):
            logits = self.flat.logits(flat, keep_K, attend=attend)
        return logits, kept

    def _routed(self, mixes: list[Mix], offsets: Tensor, keep: Tensor) -> AbstractContextManager[object]:
        if self._bank is None or not any(mixes):
            return nullcontext() if self._bank is None else self._bank.use(None, training=False)
        distinct = list(dict.fromkeys(mixes))
        if len(distinct) == 1:
            return self._bank.use(dict(distinct[0]), training=False)
        number = torch.tensor([distinct.index(mix) for mix in mixes]).repeat_interleave(offsets.diff())
        return self._bank.use(Route.tokens([dict(mix) for mix in distinct], number), keep=keep, training=False)


class ModelCacheRunner:
    """One sequence after another, each with a cache that the model makes."""

    paged = False
    _keeps = True

    def __init__(self, model: Any, bank: Bank | None, reason: str) -> None:
        self.reason = reason
        self._model = model
        self._bank = bank
        self._device = next(model.parameters()).device
        takes = inspect.signature(model.forward).parameters
        self._cache_name = next((name for name in ("past_key_values", "cache_params") if name in takes), "")
        self._takes_mask = "attention_mask" in takes and self._cache_name == "past_key_values"
        self._takes_keep = "logits_to_keep" in takes

    @torch.no_grad()
    def run(self, chunks: Items[Chunk]) -> tuple[Tensor, list[int]]:
        """See `StepRunner`."""
        found = [self._run(chunk) for chunk in chunks]
        return torch.cat(found), [len(rows) for rows in found]

    def _run(self, chunk: Chunk) -> Tensor:
        sequence = chunk.sequence
        end = chunk.start + chunk.count
        first = chunk.start if self._keeps else 0
        ids = torch.tensor([sequence.tokens[first:end]], device=self._device)
        wanted = rows_wanted(chunk)
        options: dict[str, Any] = {}
        if self._cache_name:
            options["use_cache"] = self._keeps
        if self._keeps and chunk.start > 0:
            options[self._cache_name] = sequence.state
        if self._takes_mask:
            options["attention_mask"] = torch.ones(1, end, dtype=torch.long, device=self._device)
        if self._takes_keep and wanted:
            options["logits_to_keep"] = wanted
        with nullcontext() if self._bank is None else self._bank.use(dict(sequence.mix) or None, training=False):
            out = self._model(input_ids=ids, **options)
        if self._keeps:
            sequence.state = getattr(out, self._cache_name)
        logits: Tensor = out.logits[0]
        return logits[len(logits) - wanted :]


class NoCacheRunner(ModelCacheRunner):
    """One sequence after another, all of its tokens in every step."""

    _keeps = False


class Embedder:
    """Computes embeddings of prompts: the mean of the final states, scaled to length 1."""

    def __init__(self, model: Any, bank: Bank | None) -> None:
        self._model = model
        self._bank = bank
        self._flat: FlatRunner | None = None

    @torch.no_grad()
    def __call__(self, sequence: Sequence) -> tuple[float, ...]:
        """The embedding of a sequence's prompt."""
        if self._flat is None:
            self._flat = FlatRunner(self._model)
        flat = Flat.of([list(sequence.request.prompt)])
        with nullcontext() if self._bank is None else self._bank.use(dict(sequence.mix) or None, training=False):
            states = self._flat.hidden(flat).float().mean(0)
        return tuple((states / states.norm().clamp_min(1e-12)).tolist())


class Reference:
    """The logits of one text that the model computed whole, which runners are compared with.

    Raises:
        BaseModelError: the model gives no logits per token.
    """

    def __init__(self, model: Any, bank: Bank | None, cache: PagedCache, vocabulary: int) -> None:
        self._ids = _sample(model, vocabulary)
        self._cache = cache
        try:
            self._whole = _whole(model, bank, self._ids)
        except Exception as error:
            raise BaseModelError(
                f"{type(model).__name__} does not generate text ({type(error).__name__}: {error}); use a causal language model"
            ) from error

    def error(self, runner: StepRunner) -> float:
        """Relative difference of a runner that computes the text piece by piece."""
        return relative_error(_piecewise(runner, self._ids, self._cache), self._whole)

    def agrees(self, error: float) -> bool:
        """True if a difference is rounding."""
        return error <= _BOUND.get(self._whole.dtype, _BOUND[torch.bfloat16])


def choose_runner(model: Any, bank: Bank | None, cache: PagedCache, reference: Reference) -> StepRunner:
    """The fastest runner that computes a text piece by piece as the model computes it whole.

    Raises:
        BaseModelError: the model gives no logits per token.
    """
    reasons: list[str] = []
    for make in (
        lambda: PagedRunner(_flat(model), bank, cache),
        lambda: ModelCacheRunner(model, bank, "; ".join(reasons)),
        lambda: NoCacheRunner(model, bank, "; ".join(reasons)),
    ):
        try:
            runner: StepRunner = make()
            error_size = reference.error(runner)
        except Exception as error:  # a model may refuse a way of calling it in any manner
            reasons.append(f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        if reference.agrees(error_size):
            return runner
        reasons.append(f"pieces of a text differ from the whole by {error_size:.1e}")
    raise BaseModelError(f"{type(model).__name__} cannot generate text here: {'; '.join(reasons)}")


def _flat(model: Any) -> FlatRunner:
    flat = FlatRunner(model)
    if flat.kind != "flat":
        raise BaseModelError(flat.reason)
    return flat


def _sample(model: Any, vocabulary: int) -> list[int]:
    """Token ids that reach beyond a short window."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    window = getattr(config, "sliding_window", None)
    length = min(int(window), 64) + 9 if isinstance(window, int) else 21
    return [vocabulary // 8 + (17 + 7 * (i + 1) * (i + 3)) % (vocabulary - vocabulary // 8) for i in range(length)]


@torch.no_grad()
def _whole(model: Any, bank: Bank | None, ids: list[int]) -> Tensor:
    device = next(model.parameters()).device
    with nullcontext() if bank is None else bank.use(None, training=False):
        found: Tensor = model(input_ids=torch.tensor([ids], device=device)).logits[0, -3:]
    return found


def _piecewise(runner: StepRunner, ids: list[int], cache: PagedCache) -> Tensor:
    """Logits of the last three tokens: the first one's from a prompt in two pieces, the others' one at a time."""
    sequence = Sequence(
        GenerationRequest("probe", tuple(ids)), (), (), b"", len(ids), lambda _: None, None, StopStrings(())
    )
    sequence.blocks = list(range(-(-len(ids) // cache.size)))
    prompt = len(ids) - 2
    pieces = [(0, prompt // 2), (prompt // 2, prompt - prompt // 2)] if runner.paged else [(0, prompt)]
    found: list[Tensor] = []
    for start, count in [*pieces, (prompt, 1), (prompt + 1, 1)]:
        sequence.tokens = ids[: start + count]
        found.append(runner.run([Chunk(sequence, start, count)])[0][-1:])
    return torch.cat(found[-3:])
