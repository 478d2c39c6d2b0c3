"""Grammars: the tokens that may come next so that a text keeps a given form (JSON schema, regular expression, Lark), by llguidance."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.serve.engine.request import Grammar

_KEPT = 32
"""Compiled grammars that are kept."""
_BITS = 2 ** torch.arange(8, dtype=torch.uint8)


class GrammarCompiler:
    """Compiles grammars for one tokenizer. llguidance is imported with the first. Its methods may be called from any thread."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._ends = sorted(ends)
        self._own: Any = None
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()
        """Matchers at the beginning of a text, the last used one last."""
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> TokenMatcher:
        """A matcher at the beginning of a text. Choices and later requests with the same grammar do not compile it again.

        Raises:
            ConfigError: llguidance is not installed, the grammar is not valid, or it uses what llguidance does not support.
        """
        with self._lock:
            matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return TokenMatcher(matcher.deep_copy(), self._vocabulary)

    def _compile(self, grammar: Grammar) -> Any:
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise ConfigError("grammar: constrained text needs llguidance; run `pip install llguidance`") from None
        try:
            matcher = LLMatcher(self._tokens(), self._rules(LLMatcher, grammar), log_level=0)
        except ValueError as error:
            raise ConfigError(f"grammar: {error}") from None
        if matcher.is_error():
            raise ConfigError(f"grammar: {matcher.get_error().strip().splitlines()[0]}")
        return matcher

    def _rules(self, matcher: Any, grammar: Grammar) -> str:
        if grammar.kind == "regex":
            return str(matcher.grammar_from_regex(grammar.text))
        if grammar.kind == "lark":
            return str(matcher.grammar_from_lark(grammar.text))
        schema: Any = {"type": "object"}
        if grammar.kind == "json_schema":
            try:
                schema = json.loads(grammar.text)
            except ValueError as error:
                raise ConfigError(f"grammar: the schema is not JSON: {error}") from None
        # Without this, a model may go on writing spaces up to its last token.
        return str(matcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False}))

    def _tokens(self) -> Any:
        if self._own is None:
            from llguidance import LLTokenizer

            backend = getattr(self._tokenizer, "backend_tokenizer", None)
            if backend is None or not self._ends:
                raise ConfigError(
                    "grammar: constrained text needs a fast tokenizer with an end token; use a base that has one"
                )
            self._own = LLTokenizer(backend.to_str(), n_vocab=self._vocabulary, eos_token=self._ends)
        return self._own


class TokenMatcher:
    """The state of one text in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def allowed(self) -> Tensor:
        """Bool [V]: the tokens that may come next; only the ends where the text is complete and nothing can follow."""
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        return (packed[:, None] & _BITS).bool().flatten()[: self._vocabulary]

    def accept(self, token: int) -> bool:
        """Go on by a token; False if the grammar does not have it here."""
        return bool(self._matcher.consume_token(token))

    @property
    def finished(self) -> bool:
        """True if nothing but an end can follow."""
        return bool(self._matcher.is_stopped())
