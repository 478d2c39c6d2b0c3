"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
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
from veneer.serve.api.parameters import ChatRequest, JsonRoute
from veneer.serve.api.prompts import RenderedPrompt
from veneer.serve.api.sampling import choices, each_choice, grammar_of, sampling_params
from veneer.serve.api.tools import MessageParser, MessagePieces, description_of, forced_call
from veneer.serve.engine.request import Event, Finished, GenerationRequest, Mix, TextDelta


@dataclass(frozen=True)
class ChatPlan:
    """A checked request: its prompt, the engine's requests, the parameter that their grammar is from, and how its answers are split."""

    id: str
    created: int
    model: str
    prompt: RenderedPrompt
    requests: list[GenerationRequest]
    grammar_param: str
    description: dict[str, Any] | None
    tools: list[dict[str, Any]]

    def parser(self) -> MessageParser:
        """A parser for one choice."""
        return MessageParser(self.description, self.prompt.text, self.tools)

    def chunk(self, choice: list[dict[str, Any]], **more: Any) -> bytes:
        """A chunk of a stream."""
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        return data({**head, "choices": choice, **more})


@dataclass
class ChatChoice:
    """A choice as it grows."""

    parser: MessageParser
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, pieces: MessagePieces) -> None:
        """Add what a piece of text holds."""
        self.content += pieces.content
        self.reasoning += pieces.reasoning
        self.calls += pieces.calls

    def message(self) -> dict[str, Any]:
        """The complete message."""
        found: dict[str, Any] = {
            "role": "assistant",
            "content": self.content or (None if self.calls else ""),
            "refusal": None,
        }
        if self.reasoning:
            found["reasoning_content"] = self.reasoning
        if self.calls:
            found["tool_calls"] = self.calls
        return found


def chat_routes(context: ApiContext) -> APIRouter:
    """The route of chat completions."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request, parameters: ChatRequest) -> Response:
        plan = await run_in_threadpool(plan_chat, context, parameters)
        generation = Generation(
            context.engine,
            plan.requests,
            seconds=context.limits.request_seconds,
            params={"prompt": "messages", "grammar": plan.grammar_param, "mix": "adapters"},
        )
        if parameters.stream:
            await generation.submit()  # refused requests are answered with their status, before the stream begins
            usage = parameters.stream_options is not None and parameters.stream_options.include_usage
            role = {"role": "assistant", "content": ""}
            first = [
                {"index": i, "delta": role, "logprobs": None, "finish_reason": None} for i in range(len(plan.requests))
            ]
            more = {"usage": None} if usage else {}
            return EventStream(
                request,
                plan.chunk(first, **more),
                _stream(context, plan, generation, usage=usage),
                finish=generation.cancel,
            )
        return await while_connected(request.receive, _complete(context, plan, generation))

    return router


def plan_chat(context: ApiContext, parameters: ChatRequest) -> ChatPlan:
    """Check a request and render its prompt.

    Raises:
        ApiError: it cannot be honoured; names the parameter.
    """
    _check_combinations(context, parameters)
    mix = context.mix_of(parameters.model, parameters.adapters)
    tools = [] if parameters.tool_choice == "none" else parameters.tools or []
    template = adapter_template(context, mix)
    prompt = context.prompts.chat(parameters.messages, tools, template=template, effort=parameters.reasoning_effort)
    source = context.prompts.source(template)
    description = description_of(context.tokenizer, source) if tools or "<think>" in source else None
    form = grammar_of(parameters.response_format)
    call = forced_call(parameters.tool_choice, tools, description)
    if form is not None and call is not None:
        raise invalid("response_format and tool_choice cannot both be forced", "response_format")
    count = choices(parameters, 1, context.limits)
    limit = parameters.max_completion_tokens
    params = sampling_params(
        parameters,
        limits=context.limits,
        vocabulary=context.engine.vocabulary,
        max_tokens=parameters.max_tokens if limit is None else limit,
        logprobs=(parameters.top_logprobs or 0) if parameters.logprobs else None,
        grammar=call or form,
    )
    return ChatPlan(
        id=f"chatcmpl-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=parameters.model,
        prompt=prompt,
        requests=[GenerationRequest("", prompt.ids, mix, one) for one in each_choice(params, count)],
        grammar_param="response_format" if call is None else "tools",
        description=description,
        tools=[tool.model_dump(exclude_none=True) for tool in tools],
    )


def adapter_template(context: ApiContext, mix: Mix) -> str | None:
    """The chat template that the adapters of a mix were trained with, if it is not the base's.

    Raises:
        ApiError: they were trained with different ones.
    """
    found = {status.template for status in context.engine.adapters() if status.name in dict(mix)}
    if len(found) > 1:
        raise invalid(
            "adapters: they were trained with different chat templates; use /v1/completions for this mix", "adapters"
        )
    return next(iter(found), None)


def _check_combinations(context: ApiContext, parameters: ChatRequest) -> None:
    """Raise ApiError for parameters that do not go together or are beyond the limits."""
    limits = context.limits
    if len(parameters.messages) > limits.max_messages:
        raise invalid(f"messages: expected at most {limits.max_messages}, found {len(parameters.messages)}", "messages")
    if len(parameters.tools or ()) > limits.max_tools:
        raise invalid(f"tools: expected at most {limits.max_tools}, found {len(parameters.tools or ())}", "tools")
    if parameters.tool_choice not in (None, "none") and not parameters.tools:
        raise invalid("tool_choice: there are no tools", "tool_choice")
    if parameters.top_logprobs is not None and not parameters.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    if parameters.stream_options is not None and not parameters.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    if parameters.max_tokens is not None and parameters.max_completion_tokens is not None:
        raise invalid("max_tokens and max_completion_tokens are both given; give only one of them", "max_tokens")
    if parameters.parallel_tool_calls is False and parameters.tools:
        raise invalid("parallel_tool_calls: only true is supported", "parallel_tool_calls")


async def _complete(context: ApiContext, plan: ChatPlan, generation: Generation) -> Response:
    try:
        await generation.submit()
        found = [ChatChoice(plan.parser()) for _ in plan.requests]
        async for numbered in generation.events():
            if numbered is not None:
                _take(context, found[numbered[0]], numbered[1])
    finally:
        generation.cancel()
    entries = []
    for number, choice in enumerate(found):
        logprobs = (
            {"content": choice.logprobs, "refusal": None} if plan.requests[0].sampling.logprobs is not None else None
        )
        entry = {"index": number, "message": choice.message(), "logprobs": logprobs}
        entries.append({**entry, "finish_reason": _reason(generation.finished[number], choice)})
    head = {"id": plan.id, "object": "chat.completion", "created": plan.created, "model": plan.model}
    return JSONResponse({**head, "choices": entries, "usage": generation.usage(len(plan.requests)).as_dict()})


async def _stream(context: ApiContext, plan: ChatPlan, generation: Generation, *, usage: bool) -> AsyncIterator[bytes]:
    more = {"usage": None} if usage else {}
    found = [ChatChoice(plan.parser()) for _ in plan.requests]
    async for numbered in generation.events(quiet=PING_SECONDS):
        if numbered is None:
            yield PING
            continue
        number, event = numbered
        choice = found[number]
        calls = len(choice.calls)
        pieces, logprobs = _take(context, choice, event)
        delta = _delta(pieces, calls)
        reason = _reason(event, choice) if isinstance(event, Finished) else None
        entry = {"index": number, "finish_reason": None}
        if delta or logprobs:
            yield plan.chunk(
                [{**entry, "delta": delta, "logprobs": {"content": logprobs} if logprobs else None}], **more
            )
        if reason is not None:
            yield plan.chunk([{**entry, "delta": {}, "logprobs": None, "finish_reason": reason}], **more)
    if usage:
        yield plan.chunk([], usage=generation.usage(len(plan.requests)).as_dict())
    yield DONE


def _take(context: ApiContext, choice: ChatChoice, event: Event) -> tuple[MessagePieces, list[dict[str, Any]]]:
    """Add an event to its choice; returns what it adds. Raises the error of a request that failed."""
    pieces, logprobs = MessagePieces(), []
    if isinstance(event, TextDelta):
        pieces = choice.parser.feed(event.text)
        logprobs = [context.token_names.chat_entry(entry) for entry in event.logprobs]
    elif isinstance(event, Finished):
        context.metrics.finished(event)
        if (error := failure(event)) is not None:
            raise error
        pieces = choice.parser.end()
    choice.add(pieces)
    choice.logprobs += logprobs
    return pieces, logprobs


def _delta(pieces: MessagePieces, calls: int) -> dict[str, Any]:
    """The change of a message; ``calls`` is the number of its tool calls before."""
    delta: dict[str, Any] = {}
    if pieces.content:
        delta["content"] = pieces.content
    if pieces.reasoning:
        delta["reasoning_content"] = pieces.reasoning
    if pieces.calls:
        delta["tool_calls"] = [{"index": calls + i, **call} for i, call in enumerate(pieces.calls)]
    return delta


def _reason(event: Finished, choice: ChatChoice) -> str:
    return "tool_calls" if choice.calls and event.reason == "stop" else event.reason
