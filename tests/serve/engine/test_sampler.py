"""Sampling by the request's own rules and its own random numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from veneer.serve.engine.request import GenerationRequest, SamplingParams
from veneer.serve.engine.sampler import choose, score
from veneer.serve.engine.sequence import Sequence
from veneer.serve.engine.text import StopStrings

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])
P = torch.softmax(LOGITS[0], -1).tolist()


def sequence(**params: Any) -> Sequence:
    request = GenerationRequest("r", (0, 1), sampling=SamplingParams(**params))
    return Sequence(request, (), (), b"", 10, lambda _: None, None, StopStrings(()))


def counted(draws: int = 3000, **params: Any) -> dict[int, float]:
    """Shares of the tokens over many choices."""
    found: Counter[int] = Counter()
    for choice in range(draws):
        found[choose([sequence(seed=1, choice=choice, **params)], [0], LOGITS)[0].token] += 1
    return {token: n / draws for token, n in sorted(found.items())}


def test_tokens_come_with_their_probabilities() -> None:
    """Shares over many seeds are the softmax at the temperature."""
    for temperature in (1.0, 0.5):
        expected = torch.softmax(LOGITS[0] / temperature, -1)
        found = counted(temperature=temperature)
        assert all(abs(found.get(i, 0) - float(p)) < 0.035 for i, p in enumerate(expected))


@pytest.mark.parametrize(
    ("params", "tokens"),
    [({"top_k": 2}, {0, 1}), ({"top_p": 0.7}, {0, 1}), ({"top_p": 0.6}, {0}), ({"min_p": 0.3}, {0, 1})],
)
def test_unlikely_tokens_are_left_out(params: dict[str, Any], tokens: set[int]) -> None:
    """Only the tokens within the limit occur, with their relative probabilities."""
    found = counted(1500, temperature=1.0, **params)
    assert set(found) == tokens
    total = sum(P[token] for token in tokens)
    assert all(abs(share - P[token] / total) < 0.05 for token, share in found.items())


def test_the_order_of_equal_tokens_changes_nothing() -> None:
    """Where two tokens are equal up to rounding, the one that is larger by the last bit does not change what a seed draws."""
    up, down = LOGITS.clone(), LOGITS.clone()
    up[0, 1], down[0, 1] = (
        torch.nextafter(LOGITS[0, 0], torch.tensor(9.0)),
        torch.nextafter(LOGITS[0, 0], torch.tensor(0.0)),
    )
    for params in ({"top_p": 0.95}, {"top_k": 4}):
        seeded = [sequence(seed=seed, temperature=1.0, **params) for seed in range(200)]
        first = choose(seeded, [0] * 200, up)
        assert first == choose(seeded, [0] * 200, down) and len({one.token for one in first}) > 2


def test_the_random_number_depends_on_seed_choice_and_position_alone() -> None:
    """Equal (seed, choice, position) give equal numbers, others differ, and all are spread over [0, 1)."""
    numbers = {}
    for seed in range(20):
        for choice in range(5):
            one = sequence(seed=seed, choice=choice)
            for _ in range(5):
                numbers[seed, choice, one.generated] = one.uniform()
                assert one.uniform() == numbers[seed, choice, one.generated]
                one.tokens.append(3)
    values = sorted(numbers.values())
    assert len(set(values)) == 500 and 0 <= values[0] < values[-1] < 1 and abs(sum(values) / 500 - 0.5) < 0.05


def test_penalties_and_bias_change_the_greedy_choice() -> None:
    """Each rule moves the best token by its own formula."""
    assert choose([sequence()], [0], LOGITS)[0].token == 0
    assert choose([sequence(logit_bias={4: 5.0})], [0], LOGITS)[0].token == 4
    assert choose([sequence(repetition_penalty=4.0)], [0], LOGITS)[0].token == 0  # 2 / 4 against 1 / 4 and 0
    seen = sequence(presence_penalty=1.5)
    seen.counts = {0: 1}
    assert choose([seen], [0], LOGITS)[0].token == 1
    often = sequence(frequency_penalty=0.6)
    often.counts = {0: 2}
    assert choose([often], [0], LOGITS)[0].token == 1
    assert torch.equal(LOGITS[0], torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0]))


def test_a_row_that_is_not_finite_concerns_its_own_sequence() -> None:
    """NaN in one row is a fault of that sequence and of no other."""
    logits = torch.cat([torch.full((1, 5), float("nan")), LOGITS])
    found = choose([sequence(), sequence()], [0, 1], logits)
    assert found[0].fault and not found[1].fault and found[1].token == 0


def test_log_probabilities_are_the_models_own() -> None:
    """The token's log-probability and the best ones are those of the logits, whatever the temperature."""
    found = choose([sequence(logprobs=2, temperature=0.01)], [0], LOGITS)[0].logprob
    expected = torch.log_softmax(LOGITS[0], -1)
    assert found is not None and found.token == 0 and found.logprob == pytest.approx(float(expected[0]))
    assert [token for token, _ in found.top] == [0, 1]
    assert score(LOGITS, [3], 0)[0].logprob == pytest.approx(float(expected[3]))
