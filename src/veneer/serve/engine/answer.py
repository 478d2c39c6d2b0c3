"""From a chosen token to events: text, stop strings, ends, log-probabilities of the prompt."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from veneer.errors import ServeError, VeneerError
from veneer.serve.engine.request import (
    Finished,
    FinishReason,
    GenerationRequest,
    PromptScored,
    TextDelta,
    Timing,
    TokenLogprob,
    Usage,
)
from veneer.serve.engine.sampler import Chosen, score
from veneer.serve.engine.scheduler import Chunk
from veneer.serve.engine.sequence import Sequence
from veneer.serve.engine.text import StopStrings, TokenText

_log = logging.getLogger(__name__)
_ROWS = 32
"""Rows of logits that are turned into log-probabilities at once."""


@dataclass(frozen=True)
class Ending:
    """Reason for which a sequence ends, and the log-probability of the token that ended it, which is not part of the text."""

    reason: FinishReason
    stopped_by: str | int | None = None
    logprob: TokenLogprob | None = None
    error: VeneerError | None = None

    @classmethod
    def by(cls, error: Exception) -> Ending:
        """The ending by an error."""
        known = error if isinstance(error, VeneerError) else ServeError(f"{type(error).__name__}: {error}")
        return cls("error", error=known)


def start_text(tokenizer: Any, request: GenerationRequest) -> tuple[TokenText, StopStrings]:
    """The text of a request's answer, at its beginning."""
    text = TokenText(tokenizer, request.prompt, skip_special_tokens=request.skip_special_tokens)
    return text, StopStrings(request.sampling.stop)


def next_token(sequence: Sequence, chosen: Chosen) -> Ending | None:
    """Go on by a token and emit its text; returns why the sequence ends, if it does."""
    if chosen.fault:
        return Ending("error", error=ServeError(f"request {sequence.id}: {chosen.fault}"))
    token, params = chosen.token, sequence.sampling
    if sequence.first_token is None:
        sequence.first_token = time.monotonic()
    sequence.tokens.append(token)
    if params.presence_penalty or params.frequency_penalty:
        sequence.counts[token] = sequence.counts.get(token, 0) + 1
    ended = _ends_at(sequence, token)
    assert sequence.text is not None
    shown = () if ended is not None and ended.stopped_by is not None else (token,)
    added = sequence.text.add(token) if shown else ""
    if ended is not None or len(sequence.tokens) >= sequence.max_length:
        added += sequence.text.end()
    text, stop = sequence.stops.add(added)
    if stop is not None:
        ended = Ending("stop", stop)
    elif ended is None and len(sequence.tokens) >= sequence.max_length:
        ended = Ending("length")
    if ended is not None and stop is None:
        text += sequence.stops.end()
    if ended is not None and not shown:
        ended = replace(ended, logprob=chosen.logprob)
    if shown or text:
        logprobs = (chosen.logprob,) if chosen.logprob is not None and shown else ()
        sequence.emit(TextDelta(shown, text, logprobs))
    return ended


def _ends_at(sequence: Sequence, token: int) -> Ending | None:
    params = sequence.sampling
    grammar = sequence.grammar
    if token in params.stop_token_ids or (token in sequence.ends and not params.ignore_eos):
        return Ending("stop", token)
    if grammar is not None:
        if not grammar.accept(token):
            return Ending("error", error=ServeError(f"request {sequence.id}: the grammar does not take token {token}"))
        if grammar.finished:
            return Ending("stop")
    return None


def emit_end(sequence: Sequence, ending: Ending) -> None:
    """Emit the last event of a sequence, whose receiver may be gone."""
    usage = Usage(sequence.prompt_length, sequence.generated, sequence.cached)
    timing = Timing(sequence.arrived, sequence.started, sequence.first_token, time.monotonic())
    try:
        sequence.emit(
            Finished(ending.reason, usage, timing, ending.stopped_by, ending.error, sequence.embedding, ending.logprob)
        )
    except Exception:
        _log.exception("request %s: its end could not be handed over", sequence.id)


def prompt_scores(chunk: Chunk, logits_NV: Tensor) -> None:
    """Collect the log-probabilities of the prompt's tokens behind a chunk's; emit them when all are there."""
    sequence = chunk.sequence
    top = sequence.sampling.prompt_logprobs
    assert top is not None
    scores: list[TokenLogprob | None] = sequence.prompt_scores
    if chunk.start == 0:
        scores[:] = [None]
    following = sequence.request.prompt[chunk.start + 1 : chunk.start + 1 + chunk.count]
    for first in range(0, len(following), _ROWS):
        tokens = following[first : first + _ROWS]
        scores += score(logits_NV[first : first + len(tokens)], tokens, top)
    if len(scores) == sequence.prompt_length:
        sequence.emit(PromptScored(tuple(scores)))
