"""Tool calls: parsed from an answer as it comes, forced by a grammar, and rendered with the template that an adapter was trained with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tests.serve.api.made import Running, write_adapters
from tests.tiny import tiny, tiny_tokenizer
from tests.training.made import SIZES

from veneer.adapters import LoRA
from veneer.checkpoints import attach
from veneer.data.chat.named_templates import NAMED_TEMPLATES
from veneer.models.load import load_base
from veneer.serve.api.tools import MessageParser, description_of

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
ASK: Any = [{"role": "user", "content": "Weather?"}]
SOURCE = NAMED_TEMPLATES["chatml-tools"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose adapter "tools" was trained with a template that renders tools."""
    place = tmp_path_factory.mktemp("place")
    model = tiny("llama", num_key_value_heads=1, **{**SIZES, "max_position_embeddings": 1024})
    model.save_pretrained(place / "base")
    tiny_tokenizer().save_pretrained(place / "base")
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(place / "base", folder, {"plain": LoRA(r=2)})
    bank = attach(load_base(str(place / "base"), dtype="float32").model)
    bank.add("tools", LoRA(r=2))
    bank.save("tools", folder / "tools", base_name=str(place / "base"), template=SOURCE)
    bank.detach()
    running = Running(place / "base", tmp_path_factory.mktemp("state"), folder)
    yield running
    running.close()


def parsed(*pieces: str) -> tuple[str, str, list[dict[str, Any]]]:
    """(content, reasoning, calls) of a text that comes in pieces."""
    parser = MessageParser(description_of(tiny_tokenizer(), SOURCE), "", TOOLS)
    found = [*(parser.feed(piece) for piece in pieces), parser.end()]
    calls = [call["function"] for one in found for call in one.calls]
    return "".join(one.content for one in found), "".join(one.reasoning for one in found), calls


def test_calls_are_split_from_the_text() -> None:
    """Calls come out of the text wherever its pieces are cut; broken JSON stays text."""
    text = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    for size in (1, 7, 1000):
        content, _, calls = parsed(*(text[i : i + size] for i in range(0, len(text), size)))
        assert content.strip() == "Let me see."
        assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [("weather", {"city": "Rome"})]
    two = text + text[len("Let me see.") :].replace("Rome", "Oslo")
    assert [json.loads(call["arguments"])["city"] for call in parsed(two)[2]] == ["Rome", "Oslo"]
    content, _, calls = parsed('<tool_call>\n{"name": "weather", broken\n</tool_call>')
    assert calls == [] and "broken" in content
    assert parsed("<think>why</think>", "Because.")[:2] == ("Because.", "why")


def test_forced_call(client: openai.OpenAI) -> None:
    """A random model that must call a function calls it with arguments of its schema, whole and in a stream."""
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    asked: Any = {
        "model": "tools",
        "messages": ASK,
        "tools": TOOLS,
        "tool_choice": choice,
        "max_tokens": 120,
        "seed": 1,
    }
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.tool_calls and answer.message.content is None
    call: Any = answer.message.tool_calls[0]
    assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(stream=True, **asked)]
    streamed = [part for delta in deltas for part in delta.tool_calls or ()]
    assert [(part.index, part.function.arguments) for part in streamed if part.function] == [
        (0, call.function.arguments)
    ]
    follow_up: Any = [
        *ASK,
        answer.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "Sun"},
    ]
    assert client.chat.completions.create(model="tools", messages=follow_up, tools=TOOLS, max_tokens=2).usage


def test_template_of_the_adapter_renders_its_prompts(server: Running, client: openai.OpenAI) -> None:
    """An adapter's prompts are rendered with the template that it was trained with, the base's with the base's own."""
    with server.http() as http:
        rendered = {
            model: http.post("/v1/tokenize", json={"model": model, "messages": ASK}).json()["tokens"]
            for model in ("base", "plain", "tools")
        }
        tokens = {"tokens": rendered["tools"]}
        assert http.post("/v1/detokenize", json=tokens).json()["prompt"].startswith("<|im_start|>user\nWeather?")
    assert rendered["base"] == rendered["plain"] != rendered["tools"]
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="plain", messages=ASK, tools=TOOLS)
    assert error.value.param == "tools" and error.value.code == "unsupported_by_template"
    extra = {"adapters": [{"name": "plain"}, {"name": "tools"}]}
    with pytest.raises(openai.BadRequestError) as mixed:
        client.chat.completions.create(model="base", messages=ASK, extra_body=extra)
    assert mixed.value.param == "adapters"
