"""POST /v1/completions, with echo, log-probabilities and prompts as token ids."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from veneer.serve.api.connection import while_connected
from veneer.serve.api.context import ApiContext
from veneer.serve.api.errors import invalid
from veneer.serve.api.event_stream import DONE, PING, PING_SECONDS, EventStream, data
from veneer.serve.api.generation import Generation, failure
from veneer.serve.api.parameters import CompletionRequest, JsonRoute
from veneer.serve.api.sampling import choices, each_choice, sampling_params
from veneer.serve.api.token_names import finite
from veneer.serve.engine.request import Event, Finished, GenerationRequest, PromptScored, TextDelta, TokenLogprob

MAX_TOKENS = 16
"""Tokens of a request that gives no ``max_tokens``, as OpenAI's."""


@dataclass(frozen=True)
class CompletionPlan:
    """A checked request. Request i is choice ``i % choices`` of prompt ``i // choices``."""

    id: str
    created: int
    model: str
    requests: list[GenerationRequest]
    choices: int
    echo: bool
    logprobs: bool

    def chunk(self, choice: list[dict[str, Any]], **more: Any) -> bytes:
        """A chunk of a stream."""
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return data({**head, "choices": choice, **more})


@dataclass
class CompletionChoice:
    """A choice as it grows: its text and the log-probabilities of its tokens."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)
    _characters: int = 0

    def add_token(self, context: ApiContext, token: int, entry: TokenLogprob | None) -> None:
        """Add a token with its log-probability; the first token of a prompt has none."""
        text, _ = context.token_names(token)
        self.tokens.append(text)
        self.text_offset.append(self._characters)
        self._characters += len(text)
        self.token_logprobs.append(None if entry is None else finite(entry.logprob))
        if entry is None:
            self.top_logprobs.append(None)
            return
        top: dict[str, float] = {}
        for other, logprob in (*entry.top, (entry.token, entry.logprob)):
            name, _ = context.token_names(other)
            top[name] = max(top.get(name, -9999.0), finite(logprob))  # several tokens may have one text
        self.top_logprobs.append(top)

    def logprobs(self, first: int = 0) -> dict[str, Any]:
        """The log-probabilities from token ``first`` on."""
        lists = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: getattr(self, name)[first:] for name in lists}


def completion_routes(context: ApiContext) -> APIRouter:
    """The route of completions."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/completions")
    async def completions(request: Request, parameters: CompletionRequest) -> Response:
        plan = await run_in_threadpool(_plan, context, parameters)
        generation = Generation(
            context.engine,
            plan.requests,
            seconds=context.limits.request_seconds,
            params={"prompt": "prompt", "mix": "adapters"},
        )
        if parameters.stream:
            await generation.submit()  # refused requests are answered with their status, before the stream begins
            usage = parameters.stream_options is not None and parameters.stream_options.include_usage
            return EventStream(request, PING, _stream(context, plan, generation, usage=usage), finish=generation.cancel)
        return await while_connected(request.receive, _complete(context, plan, generation))

    return router


def _plan(context: ApiContext, parameters: CompletionRequest) -> CompletionPlan:
    if parameters.stream_options is not None and not parameters.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    mix = context.mix_of(parameters.model, parameters.adapters)
    prompts = prompt_ids(context, parameters.prompt, "prompt")
    count = choices(parameters, len(prompts), context.limits)
    if parameters.best_of not in (None, count):
        raise invalid("best_of: only the value of n is supported", "best_of")
    max_tokens = MAX_TOKENS if parameters.max_tokens is None else parameters.max_tokens
    echo = bool(parameters.echo)
    if max_tokens == 0 and not echo:
        raise invalid("max_tokens: 0 needs echo: true", "max_tokens")
    scored = parameters.logprobs if echo else None
    params = sampling_params(
        parameters,
        limits=context.limits,
        vocabulary=context.engine.vocabulary,
        max_tokens=max_tokens,
        logprobs=parameters.logprobs,
        logprobs_name="logprobs",
        prompt_logprobs=0 if max_tokens == 0 and scored is None else scored,
    )
    return CompletionPlan(
        id=f"cmpl-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=parameters.model,
        requests=[GenerationRequest("", ids, mix, one) for ids in prompts for one in each_choice(params, count)],
        choices=count,
        echo=echo,
        logprobs=parameters.logprobs is not None,
    )


def prompt_ids(context: ApiContext, given: str | Sequence[Any], param: str) -> list[tuple[int, ...]]:
    """Token ids of each prompt: a text, token ids, or a list of either.

    Raises:
        ApiError: there are none, too many, an empty one, or ids that the model does not have.
    """
    single = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], int))
    prompts: list[Any] = [given] if single else list(given)
    limits, vocabulary = context.limits, context.engine.vocabulary
    if not 1 <= len(prompts) <= limits.max_prompts:
        raise invalid(f"{param}: expected 1 to {limits.max_prompts} prompts, found {len(prompts)}", param)
    if sum(map(len, prompts)) > limits.max_prompt_characters:
        raise invalid(f"{param}: expected at most {limits.max_prompt_characters:,} characters or tokens", param)
    found = []
    for prompt in prompts:
        ids = context.prompts.text(prompt) if isinstance(prompt, str) else tuple(prompt)
        wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise invalid(f"{param}: expected tokens from 0 to {vocabulary - 1}, found {wrong}", param)
        if not ids:
            raise invalid(f"{param}: an empty prompt has no token to go on from", param)
        found.append(ids)
    return found


async def _complete(context: ApiContext, plan: CompletionPlan, generation: Generation) -> Response:
    try:
        await generation.submit()
        found = [_begun(context, plan, number) for number in range(len(plan.requests))]
        async for numbered in generation.events():
            if numbered is not None:
                _take(context, plan, found[numbered[0]], numbered[1], plan.requests[numbered[0]].prompt)
    finally:
        generation.cancel()
    entries = [
        {
            "index": number,
            "text": choice.text,
            "logprobs": choice.logprobs() if plan.logprobs else None,
            "finish_reason": generation.finished[number].reason,
        }
        for number, choice in enumerate(found)
    ]
    head = {"id": plan.id, "object": "text_completion", "created": plan.created, "model": plan.model}
    return JSONResponse({**head, "choices": entries, "usage": generation.usage(plan.choices).as_dict()})


async def _stream(
    context: ApiContext, plan: CompletionPlan, generation: Generation, *, usage: bool
) -> AsyncIterator[bytes]:
    more = {"usage": None} if usage else {}
    found = [_begun(context, plan, number) for number in range(len(plan.requests))]
    sent = [0] * len(found)
    for number, choice in enumerate(found):
        if choice.text:
            entry = {"index": number, "text": choice.text, "logprobs": None, "finish_reason": None}
            yield plan.chunk([entry], **more)
    async for numbered in generation.events(quiet=PING_SECONDS):
        if numbered is None:
            yield PING
            continue
        number, event = numbered
        choice, before = found[number], len(found[number].text)
        _take(context, plan, choice, event, plan.requests[number].prompt)
        text = choice.text[before:]
        reason = event.reason if isinstance(event, Finished) else None
        if text or reason or len(choice.tokens) > sent[number]:
            logprobs = choice.logprobs(sent[number]) if plan.logprobs else None
            sent[number] = len(choice.tokens)
            yield plan.chunk([{"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}], **more)
    if usage:
        yield plan.chunk([], usage=generation.usage(plan.choices).as_dict())
    yield DONE


def _begun(context: ApiContext, plan: CompletionPlan, number: int) -> CompletionChoice:
    """A choice before its first event, with the text of its prompt if it is echoed."""
    choice = CompletionChoice()
    if plan.echo:
        choice.text = str(context.tokenizer.decode(plan.requests[number].prompt, skip_special_tokens=False))
    return choice


def _take(
    context: ApiContext, plan: CompletionPlan, choice: CompletionChoice, event: Event, prompt: tuple[int, ...]
) -> None:
    """Add an event to its choice. Raises the error of a request that failed."""
    if isinstance(event, PromptScored) and plan.logprobs:
        for token, entry in zip(prompt, event.logprobs, strict=True):
            choice.add_token(context, token, entry)
    elif isinstance(event, TextDelta):
        choice.text += event.text
        if plan.logprobs:
            for entry in event.logprobs:
                choice.add_token(context, entry.token, entry)
    elif isinstance(event, Finished):
        context.metrics.finished(event)
        if (error := failure(event)) is not None:
            raise error
        # As other servers do: evaluation programs count on a token a step.
        if plan.logprobs and event.logprob is not None:
            choice.add_token(context, event.logprob.token, event.logprob)
