"""Text through the openai client: models, completions, chat, streams, mixes, embeddings, log-probabilities."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.serve.api.made import Running

HELLO: Any = [{"role": "user", "content": "Hello"}]


def chat(client: openai.OpenAI, model: str = "base", **options: Any) -> str:
    """The text of a greedy answer."""
    options = {"max_tokens": 8, "temperature": 0, "messages": HELLO, **options}
    return client.chat.completions.create(model=model, **options).choices[0].message.content or ""


def test_models_are_listed_with_their_parent(client: openai.OpenAI) -> None:
    """The base and the adapters are models; an adapter's parent is the base, and no path is shown."""
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"base", "sql", "style", "tone"}
    assert models["base"].model_extra["parent"] is None and models["style"].model_extra["parent"] == "base"
    assert client.models.retrieve("style").id == "style"
    assert "/" not in json.dumps([model.model_dump() for model in models.values()])
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("organisation/none")
    assert error.value.code == "model_not_found" and error.value.request_id.startswith("req-")


def test_each_model_answers_in_its_own_words(client: openai.OpenAI) -> None:
    """The base, a LoRA and a DoRA adapter answer differently, and each the same twice."""
    answers = {model: chat(client, model) for model in ("base", "sql", "style", "tone")}
    assert len(set(answers.values())) == 4
    assert answers == {model: chat(client, model) for model in answers}


def test_model_of_a_job_that_was_cancelled_is_not_served(server: Running, adapters: Path) -> None:
    """A model whose job has not succeeded when it is published is neither listed nor in the engine."""
    server.server.registry.publish("late", adapters / "sql", "a-job", lambda: False)
    assert "late" not in [card.id for card in server.server.registry.cards()]
    assert "late" not in [one.name for one in server.engine.adapters()]


def test_mix_is_a_model_of_one_request(client: openai.OpenAI) -> None:
    """A mix of one adapter with weight 1 is the adapter, with weight 0 the base, and two of them something else."""
    alone = chat(client, extra_body={"adapters": [{"name": "sql"}]})
    assert alone == chat(client, "sql")
    assert chat(client, extra_body={"adapters": [{"name": "sql", "weight": 0}]}) == chat(client)
    both = chat(client, extra_body={"adapters": [{"name": "sql", "weight": 0.5}, {"name": "style", "weight": 0.5}]})
    assert both not in (alone, chat(client), chat(client, "style"))


def test_stream_has_the_text_of_the_answer(client: openai.OpenAI) -> None:
    """A stream's pieces are the answer; its first chunk has the role and its last the usage."""
    chunks = list(
        client.chat.completions.create(
            model="sql",
            messages=HELLO,
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat(client, "sql")
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["length"] and chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_choices_and_seeds(client: openai.OpenAI) -> None:
    """Sampled choices differ from each other and are the same again with their seed, in a stream too."""
    asked: dict[str, Any] = {"model": "tone", "messages": HELLO, "n": 3, "seed": 7, "max_tokens": 6, "temperature": 1.5}
    first = [choice.message.content for choice in client.chat.completions.create(**asked).choices]
    again = client.chat.completions.create(**asked)
    assert first == [choice.message.content for choice in again.choices] and len(set(first)) == 3
    assert again.usage is not None and again.usage.completion_tokens <= 18
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == first


def test_stop_ends_the_text_before_the_string(client: openai.OpenAI) -> None:
    """A stop string is not in the text and ends it with the reason stop."""
    whole = chat(client, "sql", max_tokens=12)
    stop = whole[4:6]
    answer = client.chat.completions.create(model="sql", messages=HELLO, max_tokens=12, temperature=0, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_chat_logprobs(client: openai.OpenAI) -> None:
    """Each token has its log-probability, its bytes and the likeliest tokens, of which a greedy one is the first."""
    answer = client.chat.completions.create(
        model="style", messages=HELLO, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content if answer.choices[0].logprobs else None
    assert content is not None and len(content) == 4
    for entry in content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
    raw = b"".join(bytes(entry.bytes or []) for entry in content)
    assert raw.decode(errors="replace") == answer.choices[0].message.content


def test_completion_of_text_tokens_and_lists(client: openai.OpenAI, server: Running) -> None:
    """A prompt as text and as its token ids gives the same text; a list of prompts gives a choice for each."""
    with server.http() as http:
        ids = http.post("/v1/tokenize", json={"model": "sql", "prompt": "The rain"}).json()["tokens"]
    asked: dict[str, Any] = {"model": "sql", "max_tokens": 6, "temperature": 0}
    text = client.completions.create(prompt="The rain", **asked).choices[0].text
    assert client.completions.create(prompt=ids, **asked).choices[0].text == text
    many = client.completions.create(prompt=["The rain", "An adapter"], n=2, **asked)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == many.choices[1].text == text != many.choices[2].text
    assert client.completions.create(prompt=[ids, ids], **asked).choices[1].text == text
    streamed = client.completions.create(prompt="The rain", stream=True, **asked)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text


def test_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    """With echo the prompt's tokens come first; the first has no log-probability."""
    answer = client.completions.create(
        model="tone", prompt="The rain", max_tokens=1, echo=True, logprobs=2, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text.startswith("The rain") and choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None and choice.logprobs.token_logprobs[0] is None
    assert "".join(choice.logprobs.tokens or []) == choice.text
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert len(choice.logprobs.tokens or []) == (answer.usage.prompt_tokens if answer.usage else 0) + 1
    scored = client.completions.create(model="tone", prompt="The rain", max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == "The rain"
    asked: dict[str, Any] = {"model": "tone", "prompt": "The rain", "max_tokens": 5, "temperature": 0, "logprobs": 1}
    ended = client.completions.create(**asked, echo=True, logit_bias={"2": 100}).choices[0]
    assert ended.finish_reason == "stop" and ended.text == "The rain" and ended.logprobs is not None
    assert len(ended.logprobs.tokens or []) == len(choice.logprobs.tokens or [])  # the end has its entry too
    streamed = client.completions.create(**asked, stream=True, logit_bias={"2": 100})
    pieces = [one.choices[0].logprobs.tokens or [] for one in streamed if one.choices[0].logprobs]
    assert sum(map(len, pieces)) == 1


def test_embeddings_as_numbers_and_base64(client: openai.OpenAI, server: Running) -> None:
    """Embeddings have length 1, differ by adapter, and are the same as base64, which the client asks for."""
    vector = client.embeddings.create(model="sql", input="The rain").data[0].embedding
    assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-4)
    assert vector != client.embeddings.create(model="base", input="The rain").data[0].embedding
    both = client.embeddings.create(model="sql", input=["The rain", "An adapter"])
    assert both.data[0].embedding == pytest.approx(vector, abs=1e-5) and len(both.data) == 2
    with server.http() as http:
        body = {"model": "sql", "input": "The rain", "encoding_format": "base64"}
        raw = base64.b64decode(http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(vector, abs=1e-6)


def test_json_schema(client: openai.OpenAI) -> None:
    """A random model under a JSON schema writes an object of the schema."""
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    for seed in range(3):
        text = chat(client, "sql", response_format=form, max_tokens=60, temperature=1, seed=seed)
        found = json.loads(text)
        assert set(found) == {"ok", "kind"} and isinstance(found["ok"], bool) and found["kind"] in ("a", "b")


def test_async_client_in_parallel(server: Running) -> None:
    """Twelve requests at once on four models get the answers that each gets alone."""
    alone = {model: chat(server.client(), model) for model in ("base", "sql", "style", "tone")}

    async def all_at_once() -> list[tuple[str, str]]:
        async with server.async_client() as client:

            async def one(model: str, *, stream: bool) -> tuple[str, str]:
                asked: Any = {"model": model, "messages": HELLO, "max_tokens": 8, "temperature": 0}
                if not stream:
                    answer = await client.chat.completions.create(**asked)
                    return model, answer.choices[0].message.content or ""
                pieces = [
                    chunk.choices[0].delta.content or ""
                    async for chunk in await client.chat.completions.create(stream=True, **asked)
                ]
                return model, "".join(pieces)

            return await asyncio.gather(*(one(model, stream=i % 2 == 0) for i in range(3) for model in alone))

    assert [text == alone[model] for model, text in asyncio.run(all_at_once())] == [True] * 12
