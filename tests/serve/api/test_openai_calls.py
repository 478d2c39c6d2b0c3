"""Calls of the openai client, one a line: each is answered as asked, and a client that sends all of them at once gets the same answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from tests.serve.api.made import Running

USER: Any = {"role": "user", "content": "Hello"}
SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        },
    },
}
IDS = [60, 70, 80, 90]
Check = Callable[[Any], bool]


def mix(*pairs: tuple[str, float]) -> dict[str, Any]:
    """Parameters of a mix."""
    return {"extra_body": {"adapters": [{"name": name, "weight": weight} for name, weight in pairs]}}


def texts(count: int) -> Check:
    """True for so many choices, each with its index."""
    return lambda answer: [choice.index for choice in answer.choices] == list(range(count))


def tokens(count: int) -> Check:
    """True for so many tokens of answer."""
    return lambda answer: answer.usage.completion_tokens == count


def whole(chunks: list[Any]) -> bool:
    """True for a stream in which each choice has ended."""
    ended = {choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason}
    return ended == {choice.index for chunk in chunks for choice in chunk.choices} and bool(ended)


def scored(answer: Any) -> bool:
    """True if each token of a chat has its log-probability."""
    return all(one.logprob <= 0 for one in answer.choices[0].logprobs.content)


CHAT: dict[str, tuple[dict[str, Any], Check]] = {
    "plain": ({}, tokens(6)),
    "max_completion_tokens": ({"max_tokens": openai.omit, "max_completion_tokens": 3}, tokens(3)),
    "one token": ({"max_tokens": 1}, tokens(1)),
    "system": ({"messages": [{"role": "system", "content": "Be brief."}, USER]}, texts(1)),
    "developer": ({"messages": [{"role": "developer", "content": "Be brief."}, USER]}, texts(1)),
    "several turns": ({"messages": [USER, {"role": "assistant", "content": "Hi"}, USER]}, texts(1)),
    "content in parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]}, texts(1)),
    "seed": ({"temperature": 1, "seed": 3}, texts(1)),
    "negative seed": ({"temperature": 1, "seed": -3}, texts(1)),
    "high temperature": ({"temperature": 2, "seed": 3}, texts(1)),
    "top_p": ({"temperature": 1, "top_p": 0.5, "seed": 3}, texts(1)),
    "top_k": ({"temperature": 1, "seed": 3, "extra_body": {"top_k": 5}}, texts(1)),
    "min_p": ({"temperature": 1, "seed": 3, "extra_body": {"min_p": 0.1}}, texts(1)),
    "repetition_penalty": ({"extra_body": {"repetition_penalty": 1.5}}, texts(1)),
    "presence_penalty": ({"presence_penalty": 1.0}, texts(1)),
    "frequency_penalty": ({"frequency_penalty": -1.0}, texts(1)),
    "logit_bias": ({"logit_bias": {"65": 100}}, lambda answer: len(set(answer.choices[0].message.content)) == 1),
    "stop": ({"stop": "e"}, lambda answer: "e" not in answer.choices[0].message.content),
    "several stops": (
        {"stop": ["a", "e", "i"]},
        lambda answer: not set("aei") & set(answer.choices[0].message.content),
    ),
    "stop_token_ids": (
        {"logit_bias": {"65": 100}, "extra_body": {"stop_token_ids": [65]}},
        lambda answer: answer.choices[0].finish_reason == "stop" and not answer.choices[0].message.content,
    ),
    "ignore_eos": ({"max_tokens": 20, "extra_body": {"ignore_eos": True}}, tokens(20)),
    "choices": ({"n": 3, "temperature": 1, "seed": 1}, texts(3)),
    "logprobs": ({"logprobs": True}, scored),
    "top_logprobs": (
        {"logprobs": True, "top_logprobs": 4},
        lambda answer: all(len(one.top_logprobs) == 4 for one in answer.choices[0].logprobs.content),
    ),
    "text format": ({"response_format": {"type": "text"}}, texts(1)),
    "json object": (
        {"response_format": {"type": "json_object"}, "logit_bias": {"125": 5}, "max_tokens": 40},
        lambda answer: answer.choices[0].message.content.startswith("{"),
    ),
    "json schema": (
        {"response_format": SCHEMA, "max_tokens": 40},
        lambda answer: isinstance(json.loads(answer.choices[0].message.content)["ok"], bool),
    ),
    "LoRA": ({"model": "sql"}, lambda answer: answer.model == "sql"),
    "DoRA": ({"model": "style"}, lambda answer: answer.model == "style"),
    "third adapter": ({"model": "tone"}, texts(1)),
    "mix of one": (mix(("sql", 1.0)), texts(1)),
    "mix of two": (mix(("sql", 0.5), ("style", 0.5)), texts(1)),
    "mix of three": (mix(("sql", 0.5), ("style", -0.2), ("tone", 0.7)), texts(1)),
    "weight zero": (mix(("tone", 0.0)), texts(1)),
    "mix with choices": ({**mix(("sql", 0.3), ("tone", 0.3)), "n": 2, "temperature": 1, "seed": 2}, texts(2)),
    "metadata and user": ({"metadata": {"a": "b"}, "user": "me"}, texts(1)),
    "hosted parameters": (
        {"store": False, "service_tier": "auto", "safety_identifier": "x", "verbosity": "low"},
        texts(1),
    ),
    "stream": ({"stream": True}, whole),
    "stream with usage": (
        {"stream": True, "stream_options": {"include_usage": True}},
        lambda chunks: chunks[-1].usage.completion_tokens == 6 and not chunks[-1].choices,
    ),
    "stream without obfuscation": ({"stream": True, "stream_options": {"include_obfuscation": False}}, whole),
    "stream of choices": ({"stream": True, "n": 2, "temperature": 1, "seed": 4}, whole),
    "stream with logprobs": (
        {"stream": True, "logprobs": True, "top_logprobs": 2},
        lambda chunks: sum(len(c.choices[0].logprobs.content) for c in chunks if c.choices[0].logprobs) == 6,
    ),
    "stream of a schema": ({"stream": True, "response_format": SCHEMA, "max_tokens": 40}, whole),
    "stream of an adapter": ({"stream": True, "model": "style"}, whole),
    "stream of a mix": ({"stream": True, **mix(("sql", 0.5), ("style", 0.5))}, whole),
    "stream with a stop": ({"stream": True, "stop": "e"}, whole),
}
TEXT: dict[str, tuple[dict[str, Any], Check]] = {
    "text": ({}, tokens(6)),
    "token ids": ({"prompt": IDS}, lambda answer: answer.usage.prompt_tokens == len(IDS)),
    "texts": ({"prompt": ["The rain", "An adapter", "a"]}, texts(3)),
    "lists of ids": ({"prompt": [IDS, IDS[:2]]}, texts(2)),
    "default length": ({"max_tokens": openai.omit, "extra_body": {"ignore_eos": True}}, tokens(16)),
    "echo": ({"echo": True}, lambda answer: answer.choices[0].text.startswith("The rain")),
    "echo and logprobs": (
        {"echo": True, "logprobs": 1},
        lambda answer: answer.choices[0].logprobs.token_logprobs[0] is None,
    ),
    "scores of ids": (
        {"prompt": [IDS, IDS], "echo": True, "logprobs": 1, "max_tokens": 1},
        lambda answer: [len(choice.logprobs.tokens) for choice in answer.choices] == [len(IDS) + 1] * 2,
    ),
    "scores alone": (
        {"echo": True, "logprobs": 0, "max_tokens": 0},
        lambda answer: answer.choices[0].text == "The rain",
    ),
    "logprobs": ({"logprobs": 3}, lambda answer: len(answer.choices[0].logprobs.tokens) == 6),
    "choices": ({"n": 2, "temperature": 1, "seed": 5}, texts(2)),
    "choices of two prompts": ({"prompt": ["The rain", "a"], "n": 2}, texts(4)),
    "best of all": ({"n": 2, "best_of": 2}, texts(2)),
    "stop": ({"stop": ["e"]}, lambda answer: "e" not in answer.choices[0].text),
    "seed": ({"temperature": 1, "seed": 9}, texts(1)),
    "penalties": ({"presence_penalty": 0.5, "frequency_penalty": 0.5}, texts(1)),
    "logit_bias": ({"logit_bias": {"66": 100}}, lambda answer: len(set(answer.choices[0].text)) == 1),
    "adapter": ({"model": "tone"}, texts(1)),
    "mix": (mix(("sql", 0.4), ("tone", 0.6)), texts(1)),
    "stream": ({"stream": True}, whole),
    "stream with echo": ({"stream": True, "echo": True}, lambda chunks: "The rain" in chunks[0].choices[0].text),
    "stream with usage": (
        {"stream": True, "stream_options": {"include_usage": True}},
        lambda chunks: chunks[-1].usage.total_tokens > 6,
    ),
    "stream of two prompts": ({"stream": True, "prompt": [IDS, IDS[:3]], "n": 2}, whole),
    "stream with logprobs": ({"stream": True, "logprobs": 2}, whole),
}
VECTOR: dict[str, tuple[dict[str, Any], Check]] = {
    "text": ({}, lambda answer: len(answer.data) == 1 and abs(sum(x * x for x in answer.data[0].embedding) - 1) < 1e-3),
    "texts": ({"input": ["The rain", "a"]}, lambda answer: [one.index for one in answer.data] == [0, 1]),
    "token ids": ({"input": IDS}, lambda answer: answer.usage.prompt_tokens == len(IDS)),
    "lists of ids": ({"input": [IDS, IDS[:2]]}, lambda answer: len(answer.data) == 2),
    "float": ({"encoding_format": "float"}, lambda answer: isinstance(answer.data[0].embedding[0], float)),
    "base64": ({"encoding_format": "base64"}, lambda answer: isinstance(answer.data[0].embedding, str)),
    "adapter": ({"model": "style"}, lambda answer: answer.model == "style"),
    "mix": (mix(("sql", 0.5), ("style", 0.5)), lambda answer: len(answer.data) == 1),
}
CALLS = [
    *(("chat", name, options, check) for name, (options, check) in CHAT.items()),
    *(("completions", name, options, check) for name, (options, check) in TEXT.items()),
    *(("embeddings", name, options, check) for name, (options, check) in VECTOR.items()),
]
COMMON: dict[str, dict[str, Any]] = {
    "chat": {"model": "base", "messages": [USER], "max_tokens": 6, "temperature": 0, "logit_bias": {"2": -100}},
    "completions": {
        "model": "base",
        "prompt": "The rain",
        "max_tokens": 6,
        "temperature": 0,
        "logit_bias": {"2": -100},
    },
    "embeddings": {"model": "base", "input": "The rain"},
}


def create(client: Any, kind: str, options: dict[str, Any]) -> Any:
    """The call."""
    resource = client.chat.completions if kind == "chat" else getattr(client, kind)
    return resource.create(**{**COMMON[kind], **options})


def shown(answer: Any) -> Any:
    """What of an answer does not depend on its time and id."""
    if isinstance(answer, list):
        return sorted(json.dumps(shown(chunk), sort_keys=True) for chunk in answer)
    found = answer.model_dump(exclude={"id", "created"})
    usage = found.get("usage") or {}
    usage.pop("prompt_tokens_details", None)  # a later one finds its prompt in the cache
    return found


def text_of(answer: Any) -> Any:
    """The texts of an answer's choices, joined from a stream's chunks."""
    if not isinstance(answer, list):
        return shown(answer)
    found: dict[int, str] = {}
    for choice in (choice for chunk in answer for choice in chunk.choices):
        piece = choice.text if hasattr(choice, "text") else choice.delta.content
        found[choice.index] = found.get(choice.index, "") + (piece or "")
    return found


def test_there_are_eighty_calls_and_more() -> None:
    """With the calls for files and jobs (`test_openai_jobs.py`) and tools (`test_tools.py`), more than eighty are different."""
    assert len(CALLS) >= 78 and len({(kind, name) for kind, name, _, _ in CALLS}) == len(CALLS)


@pytest.fixture(scope="module")
def alone(server: Running) -> dict[tuple[str, str], Any]:
    """The answer to each call, one after the other."""
    found: dict[tuple[str, str], Any] = {}
    with server.client() as client:
        for kind, name, options, _ in CALLS:
            answer = create(client, kind, options)
            found[kind, name] = list(answer) if options.get("stream") else answer
    return found


@pytest.mark.parametrize(("kind", "name", "check"), [(kind, name, check) for kind, name, _, check in CALLS])
def test_call(alone: dict[tuple[str, str], Any], kind: str, name: str, check: Check) -> None:
    """The answer is as the call asks."""
    assert check(alone[kind, name]), shown(alone[kind, name])


def test_all_calls_at_once_have_the_answers_that_each_has_alone(
    server: Running, alone: dict[tuple[str, str], Any]
) -> None:
    """The asynchronous client sends all calls together; adapters, mixes, schemas and seeds run in the same steps."""

    async def together() -> dict[tuple[str, str], Any]:
        async with server.async_client() as client:

            async def one(kind: str, options: dict[str, Any]) -> Any:
                answer = await create(client, kind, options)
                return [chunk async for chunk in answer] if options.get("stream") else answer

            found = await asyncio.gather(*(one(kind, options) for kind, _, options, _ in CALLS))
            return {(kind, name): answer for (kind, name, _, _), answer in zip(CALLS, found, strict=True)}

    different = []
    for key, answer in asyncio.run(together()).items():
        if key[0] == "embeddings" or "logprobs" in key[1] or "scores" in key[1]:
            continue  # their numbers are those of a batch of another size
        if text_of(answer) != text_of(alone[key]):
            different.append(key)
    assert different == []


def test_raw_and_streamed_responses(client: openai.OpenAI) -> None:
    """The client's other forms of a call: headers beside the answer, and lines as they come."""
    asked: Any = COMMON["chat"]
    raw = client.chat.completions.with_raw_response.create(**asked)
    assert raw.headers["x-request-id"].startswith("req-") and raw.parse().choices
    with client.chat.completions.with_streaming_response.create(**asked, stream=True) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith(("data: ", ":")) for line in lines)
    with client.chat.completions.create(**asked, stream=True) as stream:
        assert next(iter(stream)).choices
