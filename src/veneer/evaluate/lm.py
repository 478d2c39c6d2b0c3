"""The three methods that evaluation harnesses ask of a model, on a base under a route.

    loglikelihood(context, continuation)     log p(continuation | context), and whether it is what greedy decoding writes
    loglikelihood_rolling(text)              log p(text)
    generate_until(prompt, stops, ...)       text up to a stop string

They are all that a task needs, so any harness with this interface can judge an adapter beside its base.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from veneer.adapters.runtime.route import RouteLike
from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.evaluate.generation import Generator, Sampling
from veneer.models.flat import FlatRunner


class RoutedModel:
    """One route of one base, as a harness sees it."""

    def __init__(self, generator: Generator, runner: FlatRunner, route: RouteLike = None) -> None:
        self.generator = generator
        self.runner = runner
        self.route = route

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, is it greedy) of each continuation behind its context.

        The two are encoded as one text; the continuation is what the context alone does not already hold. Where there is no
        context, the first token is given and not scored.
        """
        results = []
        for context, continuation in requests:
            whole = self._ids(context + continuation)
            given = max(1, min(len(self._ids(context)), len(whole) - 1)) if context else 1
            results.append(self._score(whole, given))
        return results

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood in nats of each text behind its first token (the begin token, where the tokenizer adds one)."""
        return [self._score(self._ids(text), 1)[0] for text in texts]

    def generate_until(self, requests: Sequence[tuple[str, Sequence[str]]], max_new_tokens: int = 256) -> list[str]:
        """Greedy text for each prompt, cut before the first of its stop strings."""
        texts = []
        for prompt, stops in requests:
            text = self.generator.write(prompt, self.route, Sampling(max_new_tokens=max_new_tokens))
            ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
            texts.append(text[: min(ends)] if ends else text)
        return texts

    def _ids(self, text: str) -> list[int]:
        return list(self.generator.tokenizer(text)["input_ids"])

    def _score(self, ids: list[int], given: int) -> tuple[float, bool]:
        if len(ids) <= given:
            return 0.0, True
        weights = tuple(0.0 if i < given else 1.0 for i in range(len(ids)))
        batch = make_batch([Example(tuple(ids), weights, "harness")], "harness")
        keep = batch.weights.nonzero().squeeze(1)
        with torch.no_grad(), self.generator._routed(self.route):
            logp_KV = self.runner.logits(batch, keep).double().log_softmax(-1)
        target_K = batch.targets[keep]
        total = float(logp_KV.gather(1, target_K.unsqueeze(1)).sum())
        return total, bool((logp_KV.argmax(1) == target_K).all())
