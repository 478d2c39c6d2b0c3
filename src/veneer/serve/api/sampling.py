"""Sampling parameters of requests as the engine takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from veneer.serve.api.errors import invalid
from veneer.serve.api.parameters import ResponseFormat, SamplingParameters
from veneer.serve.engine.request import Grammar, SamplingParams
from veneer.serve.limits import ServeLimits

_PASSED = (
    "seed",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
)
TEMPERATURE = 1.0
"""The temperature of requests that give none, as OpenAI's."""


def sampling_params(
    parameters: SamplingParameters,
    *,
    limits: ServeLimits,
    vocabulary: int,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    logprobs_name: str = "top_logprobs",
    grammar: Grammar | None = None,
) -> SamplingParams:
    """The sampling parameters of a request's first choice. ``logprobs_name``: the parameter that gives ``logprobs``.

    Raises:
        ApiError: one of them cannot be honoured; names it.
    """
    given: dict[str, Any] = {
        name: getattr(parameters, name) for name in _PASSED if getattr(parameters, name) is not None
    }
    found = SamplingParams(
        **given,
        temperature=TEMPERATURE if parameters.temperature is None else parameters.temperature,
        max_tokens=max_tokens,
        stop_token_ids=tuple(parameters.stop_token_ids or ()),
        stop=_stops(parameters.stop, limits),
        logit_bias=_biases(parameters.logit_bias or {}, limits),
        logprobs=_bounded(logprobs_name, logprobs, limits.max_top_logprobs),
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )
    if max_tokens is not None and max_tokens < 1 and prompt_logprobs is None:
        raise invalid(f"max_tokens: expected at least 1, found {max_tokens}", "max_tokens")
    for name, problem in found.problems(vocabulary).items():
        raise invalid(f"{name}: {problem}", name)
    return found


def choices(parameters: SamplingParameters, prompts: int, limits: ServeLimits) -> int:
    """The number of choices for each prompt."""
    count = 1 if parameters.n is None else parameters.n
    if not 1 <= count <= limits.max_choices:
        raise invalid(f"n: expected a number from 1 to {limits.max_choices}, found {count}", "n")
    if count * prompts > limits.max_prompts:
        raise invalid(
            f"n: expected at most {limits.max_prompts} answers of one request, found {prompts} prompts with {count} each",
            "n",
        )
    return count


def each_choice(params: SamplingParams, count: int) -> list[SamplingParams]:
    """The parameters of each choice."""
    return [replace(params, choice=number) for number in range(count)]


def grammar_of(form: ResponseFormat | None) -> Grammar | None:
    """The grammar that a response format asks for."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Grammar("json_object")
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise invalid(
            "response_format.json_schema.schema is missing", "response_format.json_schema", "missing_parameter"
        )
    return Grammar("json_schema", json.dumps(form.json_schema.schema_))


def _bounded(name: str, value: int | None, most: int) -> int | None:
    if value is not None and not 0 <= value <= most:
        raise invalid(f"{name}: expected a number from 0 to {most}, found {value}", name)
    return value


def _stops(stop: str | list[str] | None, limits: ServeLimits) -> tuple[str, ...]:
    found = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(found) > limits.max_stops:
        raise invalid(f"stop: expected at most {limits.max_stops} strings, found {len(found)}", "stop")
    if any(len(text) > limits.max_stop_characters for text in found):
        raise invalid(f"stop: expected strings of at most {limits.max_stop_characters} characters", "stop")
    return found


def _biases(given: Mapping[str, Any], limits: ServeLimits) -> dict[int, float]:
    if len(given) > limits.max_biases:
        raise invalid(f"logit_bias: expected at most {limits.max_biases} tokens, found {len(given)}", "logit_bias")
    found = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise invalid(f"logit_bias: expected token ids, found {token[:40]!r}", "logit_bias")
        found[int(token)] = float(bias)
    return found
