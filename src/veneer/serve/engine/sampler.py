"""The sampler: the next token of each sequence from its logits.

    penalties, bias, grammar -> temperature -> top-k, top-p, min-p -> one random number picks the token

The random number is a function of (seed, choice, position), so a seeded answer does not depend on what runs beside it. Logits are changed
in a copy, and only for sequences that ask for a change.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.serve.engine.request import SamplingParams, TokenLogprob
from veneer.serve.engine.sequence import Sequence

_HEAD = 512
"""Tokens that are sorted first where only the most likely ones count; all are sorted if these have too little probability."""


@dataclass(frozen=True)
class Chosen:
    """A token, with its log-probability where it was asked for. ``fault``: why there is none."""

    token: int
    logprob: TokenLogprob | None = None
    fault: str = ""


def choose(sequences: Items[Sequence], rows: Items[int], logits_KV: Tensor) -> list[Chosen]:
    """The next token of each sequence from its row of the logits."""
    best_K = logits_KV.max(dim=-1)
    finite = torch.isfinite(best_K.values).tolist()
    best = best_K.indices.tolist()
    found: list[Chosen] = []
    for n, sequence in zip(rows, sequences, strict=True):
        params = sequence.sampling
        if not finite[n]:
            found.append(Chosen(-1, fault="the model's logits are not finite"))
            continue
        token = best[n]
        if params.temperature > 0 or _changes(params):
            picked = _pick(sequence, logits_KV[n])
            if picked is None:
                found.append(Chosen(-1, fault="no token is allowed: the grammar, the bias and the limits exclude all"))
                continue
            token = picked
        logprob = None if params.logprobs is None else score(logits_KV[n : n + 1], [token], params.logprobs)[0]
        found.append(Chosen(token, logprob))
    return found


def score(logits_NV: Tensor, tokens: Items[int], top: int) -> list[TokenLogprob]:
    """Log-probability of each row's token, and its ``top`` most likely ones."""
    logprobs_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    own = logprobs_NV.gather(1, torch.tensor(tokens, device=logits_NV.device)[:, None]).squeeze(1).tolist()
    if top == 0:
        return [TokenLogprob(token, value) for token, value in zip(tokens, own, strict=True)]
    best = logprobs_NV.topk(min(top, logprobs_NV.shape[1]), dim=-1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenLogprob(token, value, tuple(zip(ids, values, strict=True)))
        for token, value, (ids, values) in zip(tokens, own, rows, strict=True)
    ]


def _changes(params: SamplingParams) -> bool:
    penalised = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    return bool(penalised or params.logit_bias or params.grammar is not None)


def _pick(sequence: Sequence, logits_V: Tensor) -> int | None:
    """A token by the sequence's own rules; None if all are excluded."""
    params = sequence.sampling
    logits = logits_V.float()
    if _changes(params):
        logits = _changed(sequence, logits if logits is not logits_V else logits.clone())
        if not bool(torch.isfinite(logits.max())):
            return None
    if params.temperature == 0:
        return int(logits.argmax())
    if params.temperature < 1e-4:  # dividing by it would overflow
        return int(logits.argmax())
    probabilities = torch.softmax(logits / params.temperature, dim=-1)
    if params.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0.0)
    if params.top_p < 1 or params.top_k > 0:
        values, tokens = _likely(probabilities, params.top_p, params.top_k)
        return int(tokens[_position(values, sequence.uniform())])
    return _position(probabilities, sequence.uniform())


def _position(weights: Tensor, u: float) -> int:
    """The place where the running sum of ``weights`` passes the fraction ``u`` of their total."""
    sums = weights.double().cumsum(0)
    place = int(torch.searchsorted(sums, sums[-1:] * u, right=True))
    last = int(weights.nonzero()[-1]) if place >= len(weights) else place
    return last


def _likely(probabilities_V: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """(weights, tokens) of the fewest most likely tokens with probability ``top_p`` together, at most ``top_k`` of them.

    They stand in the order of their ids: in that of their weights, two that are equal up to rounding would change places, and with them
    the token that the random number picks.
    """
    size = len(probabilities_V)
    count = min(top_k or size, size)
    head = min(count, _HEAD)
    values, tokens = probabilities_V.topk(head)
    if head < count and float(values.sum()) < top_p:
        values, tokens = probabilities_V.topk(count)
    total = values.sum() if top_k else probabilities_V.sum()
    before = values.cumsum(0) - values
    kept = max(1, int((before < top_p * total).sum()))
    tokens, order = tokens[:kept].sort()
    return values[order], tokens


def _changed(sequence: Sequence, logits_V: Tensor) -> Tensor:
    """Logits after penalties, bias and grammar; ``logits_V`` is written to."""
    params = sequence.sampling
    device = logits_V.device
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(sequence.tokens)), device=device)
        values = logits_V[seen]
        factor = params.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / factor, values * factor)
    if sequence.counts and (params.presence_penalty or params.frequency_penalty):
        tokens = torch.tensor(list(sequence.counts), device=device)
        counts = torch.tensor(list(sequence.counts.values()), dtype=torch.float32, device=device)
        logits_V[tokens] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        tokens = torch.tensor(list(params.logit_bias), device=device)
        logits_V[tokens] += torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
    if sequence.grammar is not None:
        logits_V.masked_fill_(~sequence.grammar.allowed().to(device), float("-inf"))
    return logits_V
