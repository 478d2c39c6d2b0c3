"""A request in the engine, with all of its state: tokens, blocks, adapters, random stream, grammar, text and times.

    waiting -> running -> finished
       ^---------'  preempted: its blocks are given up, and its tokens are computed again later

``computed`` tokens have keys and values in the cache; the engine computes the rest, of which the last gives the next token.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from veneer.serve.engine.blocks import Digest
from veneer.serve.engine.grammar import TokenMatcher
from veneer.serve.engine.request import Event, GenerationRequest, Mix, SamplingParams, TokenLogprob
from veneer.serve.engine.text import StopStrings, TokenText


@dataclass(eq=False)
class Sequence:
    """One request.

    Attributes:
        request: as it was submitted.
        mix: its adapters under the names that the bank has for their versions, with their weights.
        adapters: what the adapter store holds for it.
        root: digest that its first block follows.
        max_length: maximum tokens of prompt and answer.
        emit: takes its events.
        text, stops, grammar: where its text stands.
        ends: the tokens that end it.
        tokens: prompt and answer.
        computed: tokens whose keys and values are in the cache.
        cached: tokens of the prompt that were found there.
        blocks, digests: its cache blocks, and the digests behind those that are full.
        passed: times that others were admitted before it.
        state: what the model keeps for it outside the blocks, where it does.
    """

    request: GenerationRequest
    mix: Mix
    adapters: tuple[Any, ...]
    root: Digest
    max_length: int
    emit: Callable[[Event], None]
    text: TokenText | None
    stops: StopStrings
    ends: frozenset[int] = frozenset()
    grammar: TokenMatcher | None = None
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: list[Digest] = field(default_factory=list)
    passed: int = 0
    state: Any = None
    cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    embedding: tuple[float, ...] | None = None
    prompt_scores: list[TokenLogprob | None] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    """Occurrences of each generated token, where a penalty asks for them."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        seed = self.sampling.seed
        self._seed = secrets.randbits(63) if seed is None else seed

    @property
    def sampling(self) -> SamplingParams:
        """Parameters of the choice of its tokens."""
        return self.request.sampling

    @property
    def id(self) -> str:
        """The request's."""
        return self.request.id

    @property
    def tenant(self) -> str:
        """Whose share of the engine it uses: by default that of its adapters."""
        named = self.request.tenant
        return "+".join(name for name, _ in self.request.mix) if named is None else named

    @property
    def prompt_length(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        """Number of tokens of the answer so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def uncomputed(self) -> int:
        """Number of tokens to compute before the next can be chosen."""
        return len(self.tokens) - self.computed

    @property
    def reuses(self) -> bool:
        """True if known blocks of its prompt may be used: not where every token of the prompt is scored."""
        return self.sampling.prompt_logprobs is None

    def uniform(self) -> float:
        """The random number in [0, 1) of the next token: a function of seed, choice and position alone."""
        key = f"{self._seed}/{self.sampling.choice}/{self.generated}".encode()
        return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 11) / 2.0**53
