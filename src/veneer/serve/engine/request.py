"""A request for text, the events that answer it, and the status of an engine.

    stream = engine.submit(GenerationRequest("r1", prompt=ids, mix=(("sql", 1.0),), sampling=SamplingParams(max_tokens=64)))
    for event in stream:
        match event:
            case TextDelta(): print(event.text, end="")
            case Finished():  print(event.reason, event.usage)

A request with n choices is n requests with the same prompt and seed and the choices 0 to n - 1; they share the prompt's cache blocks. Every
request ends with exactly one `Finished`, whatever happens, and nothing comes after it.
"""

from __future__ import annotations

import math
import queue
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from veneer.errors import ConfigError, VeneerError

FinishReason = Literal["stop", "length", "error", "cancelled"]
Mix = tuple[tuple[str, float], ...]
"""Adapters with their weights; the empty mix is the base."""
MAX_TENANTS = 1000
OTHER_TENANTS = "other"


@dataclass(frozen=True)
class Grammar:
    """The form that a text must have.

    kind: "json_schema" (text is a schema as JSON), "json_object" (any object; text is ignored), "regex" or "lark".
    """

    kind: Literal["json_schema", "json_object", "regex", "lark"]
    text: str = ""


@dataclass(frozen=True)
class SamplingParams:
    """The choice of each next token, and the end of the text.

    Attributes:
        max_tokens: maximum tokens to generate; None means up to the end of the context. 0 generates nothing and scores the prompt.
        temperature: 0 decodes greedily.
        top_p, top_k, min_p: sample from the most likely tokens only; 1, 0 and 0 leave all.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens that were generated, once and per occurrence.
        repetition_penalty: divides positive logits of tokens in prompt and answer, and multiplies negative ones.
        logit_bias: added to the logits of tokens.
        seed: the same seed and choice give the same text beside any other requests; None draws a seed.
        choice: number of this request among those of one prompt.
        stop: strings that end the text and are not part of it.
        stop_token_ids: tokens that end the text beside the model's own ends.
        ignore_eos: go on past the model's ends.
        logprobs: None, or the number of most likely tokens to report beside each token's own log-probability.
        prompt_logprobs: the same for the prompt's tokens.
        grammar: the form that the text must have.
    """

    max_tokens: int | None = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    choice: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def problems(self, vocabulary: int) -> dict[str, str]:
        """{parameter: what is wrong with it}; empty if all can be honoured. ``vocabulary``: number of tokens of the model."""
        limits: dict[str, tuple[float | int | None, float, float]] = {
            "max_tokens": (self.max_tokens, 0, math.inf),
            "temperature": (self.temperature, 0, 100),
            "top_p": (self.top_p, 0, 1),
            "top_k": (self.top_k, 0, math.inf),
            "min_p": (self.min_p, 0, 1),
            "presence_penalty": (self.presence_penalty, -2, 2),
            "frequency_penalty": (self.frequency_penalty, -2, 2),
            "repetition_penalty": (self.repetition_penalty, 0.01, 100),
            "seed": (self.seed, -(2**63), 2**64 - 1),
            "choice": (self.choice, 0, 2**31 - 1),
            "logprobs": (self.logprobs, 0, min(vocabulary, 1000)),
            "prompt_logprobs": (self.prompt_logprobs, 0, min(vocabulary, 1000)),
        }
        found = {
            name: f"expected a number from {low:g} to {high:g}, found {value!r}"
            for name, (value, low, high) in limits.items()
            if value is not None and not low <= value <= high
        }
        if self.top_p == 0:
            found["top_p"] = "expected a number above 0, found 0"
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocabulary:
                found["logit_bias"] = f"expected tokens from 0 to {vocabulary - 1}, found {token}"
            elif not -100 <= bias <= 100:
                found["logit_bias"] = f"expected biases from -100 to 100, found {bias!r} for token {token}"
        if any(not text for text in self.stop):
            found["stop"] = "expected strings of at least one character, found an empty one"
        if any(not 0 <= token < vocabulary for token in self.stop_token_ids):
            found["stop_token_ids"] = f"expected tokens from 0 to {vocabulary - 1}, found {list(self.stop_token_ids)}"
        return found


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt to go on with under a mix of adapters.

    Attributes:
        id: unique among the requests that have not ended.
        prompt: token ids, at least one.
        mix: adapters with their weights; empty means the base.
        sampling: choice of the tokens and the end of the text.
        tenant: whose share of the engine it counts to, for fairness; None means its adapters.
        salt: requests with different salts share no cache blocks.
        embed: also return the mean of the prompt's final states, scaled to length 1, with `Finished`.
        skip_special_tokens: leave control tokens out of the text.
    """

    id: str
    prompt: tuple[int, ...]
    mix: Mix = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    tenant: str | None = None
    salt: str = ""
    embed: bool = False
    skip_special_tokens: bool = True

    def check(self, vocabulary: int, context: int) -> None:
        """Raise ConfigError, which begins with a parameter's name, unless a model with so many tokens and so long a context can answer."""
        for name, problem in self.sampling.problems(vocabulary).items():
            raise ConfigError(f"{name}: {problem}")
        size = len(self.prompt)
        if not size:
            raise ConfigError("prompt: expected at least one token, found none")
        if not all(0 <= token < vocabulary for token in self.prompt):
            raise ConfigError(f"prompt: expected tokens from 0 to {vocabulary - 1}")
        if size + (self.sampling.max_tokens != 0) > context:
            raise ConfigError(
                f"prompt: it has {size} tokens, and the context length is {context} tokens, answer included; shorten it"
            )
        names = [name for name, _ in self.mix]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"mix: {name} is named twice; give each adapter one weight")


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token, and the most likely tokens at its place, best first, as (token, log-probability).

    Both are of the model's own distribution, before temperature, penalties, bias and grammar.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptScored:
    """The log-probabilities of the prompt's tokens; None for the first, which nothing precedes. Comes before any text."""

    logprobs: tuple[TokenLogprob | None, ...]


@dataclass(frozen=True)
class TextDelta:
    """Further tokens and the text that they add.

    The text may lag behind the tokens: incomplete characters and beginnings of stop strings are held back. ``logprobs`` has one entry
    per token where they are asked for.
    """

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts of a request; ``cached_tokens`` are those of the prompt that were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Timing:
    """Times by ``time.monotonic()``; None for what did not happen."""

    arrived: float
    started: float | None
    first_token: float | None
    finished: float


@dataclass(frozen=True)
class Finished:
    """The end of a request.

    Attributes:
        reason: "stop" (the model's end, a stop token or string, a complete grammar), "length", "error" or "cancelled".
        stopped_by: the stop string or token that ended it, if one did.
        error: the cause of "error".
        embedding: of the prompt, where it was asked for.
        logprob: of the token that ended it, which is in no `TextDelta`, where log-probabilities are asked for.
    """

    reason: FinishReason
    usage: Usage
    timing: Timing
    stopped_by: str | int | None = None
    error: VeneerError | None = None
    embedding: tuple[float, ...] | None = None
    logprob: TokenLogprob | None = None


Event = PromptScored | TextDelta | Finished


class RequestStream:
    """The events of one request, for a thread that waits for them. The last is `Finished`."""

    def __init__(self, request: GenerationRequest, cancel: Callable[[str], bool]) -> None:
        self.request = request
        self._cancel = cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._ended = False

    def put(self, event: Event) -> None:
        """Add an event; called by the engine."""
        self._events.put(event)

    def get(self, timeout: float | None = None) -> Event:
        """Wait for the next event. Raises queue.Empty after ``timeout`` seconds."""
        event = self._events.get(timeout=timeout)
        self._ended = isinstance(event, Finished)
        return event

    def poll(self) -> Event | None:
        """The next event, or None if there is none yet."""
        try:
            return self.get(timeout=0)
        except queue.Empty:
            return None

    def __iter__(self) -> Iterator[Event]:
        while not self._ended:
            yield self.get()

    def cancel(self) -> bool:
        """End the request; its stream still ends with `Finished`. Returns False if it has ended already."""
        return self._cancel(self.request.id)


class TenantCounter(Counter[str]):
    """Counts by tenant. Clients name mixes and tenants, so beyond ``MAX_TENANTS`` names the others are counted as one, "other"."""

    def add(self, tenant: str, number: int) -> None:
        """Add to a tenant's count."""
        self[tenant if tenant in self or len(self) < MAX_TENANTS else OTHER_TENANTS] += number


@dataclass(frozen=True)
class AdapterStatus:
    """An adapter that requests may name.

    Attributes:
        version: hash of its content; a replaced adapter has another.
        place: where its tensors are: "disk", "memory" or "bank" (beside the base's layers, where it can run).
        running, waiting: number of its requests.
        bytes: size of its tensors.
        template: the chat template that it was trained with; None if it is the base's.
    """

    name: str
    path: Path | None
    version: str
    place: Literal["disk", "memory", "bank"]
    method: str
    rank: int
    bytes: int
    pinned: bool
    running: int
    waiting: int
    template: str | None = None


@dataclass(frozen=True)
class EngineMetrics:
    """Counts since the engine was made, and its present state. Names of adapters are those that are registered, "" the base's."""

    running: int
    waiting: int
    waiting_by_adapter: Mapping[str, int]
    steps: int
    prompt_tokens: Mapping[str, int]
    generated_tokens: Mapping[str, int]
    cached_tokens: int
    finished: Mapping[FinishReason, int]
    preemptions: int
    blocks: int
    free_blocks: int
    cached_blocks: int
    adapters_on_disk: int
    adapters_in_memory: int
    adapters_in_bank: int
    adapter_loads: int
    adapter_evictions: int
    busy_seconds: float
