"""The gateway in front of replicas, without Ray: answers, lost replicas, requests that all replicas answer, and clients that go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.types import Message, Scope
from tests.serve.api.made import ADMIN_KEY, KEY, wait, write_adapters

from veneer import DoRA, LoRA
from veneer.serve.api.errors import BrokenAnswerError
from veneer.serve.api.guard import Guard
from veneer.serve.keys import read_keys
from veneer.serve.limits import ServeLimits
from veneer.serve.loading import EngineOptions
from veneer.serve.registry import base_names
from veneer.serve.replicas.gateway import Gateway, ReplicaLostError, adapter_of
from veneer.serve.replicas.replica import Replica

SCOPE: dict[str, Any] = {
    "type": "http",
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": "/v1/completions",
    "raw_path": b"/v1/completions",
    "query_string": b"",
    "headers": [(b"content-type", b"application/json")],
    "server": ("here", 80),
    "client": None,
    "role": "user",
    "caller": "someone",
    "request_id": "one",
}
"""A request that the guard has let pass."""


class InProcess:
    """Two replicas; the first ones that are asked may be lost, before their answer or after some messages."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas = replicas
        self.asked: list[str] = []
        self.lost_after: list[int] = []

    async def answer(self, scope: Scope, body: bytes, adapter: str) -> AsyncIterator[Message]:
        self.asked.append(adapter)
        left = self.lost_after.pop(0) if self.lost_after else None
        async for message in self.replicas[len(adapter) % 2].answer(scope, body):
            if left is not None:
                if not left:
                    raise ReplicaLostError
                left -= 1
            yield message

    async def answer_each(self, scope: Scope, body: bytes) -> dict[str, tuple[int, bytes]]:
        return {str(i): await one.whole_answer(scope, body) for i, one in enumerate(self.replicas)}


@pytest.fixture(scope="module")
def adapters(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(place / "base", folder, {"sql": LoRA(r=2), "style": DoRA(r=3)})
    return folder


@pytest.fixture(scope="module")
def replicas(place: Path, adapters: Path) -> Iterator[InProcess]:
    """Two replicas of the tiny base."""
    options = EngineOptions(str(place / "base"), dtype="float32", device="cpu", adapters=adapters)
    made = InProcess(Replica(options), Replica(options))
    yield made
    for one in made.replicas:
        one.close()


def calls(replicas: InProcess, place: Path, tmp_path: Path, work: Any, key: str = KEY) -> Any:
    """The result of ``work(client)`` with a client of a gateway."""
    keys = read_keys({"VENEER_API_KEY": KEY, "VENEER_ADMIN_KEY": ADMIN_KEY}, None, tmp_path / "keys")
    app = Guard(
        Gateway(replicas, base_names(str(place / "base"))),
        keys=keys,
        limits=ServeLimits(),
        hosts=lambda: ["here"],
        any_address=False,
        answered=lambda status: None,
    )

    async def run() -> Any:
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        headers = {"authorization": f"Bearer {key}"}
        async with httpx2.AsyncClient(transport=transport, base_url="http://here", headers=headers) as client:
            return await work(client)

    return asyncio.run(run())


def test_requests_are_passed_on(replicas: InProcess, place: Path, tmp_path: Path) -> None:
    """Answers, errors and streams are those of a replica; the key is checked before, and what replicas do not have is 501."""
    body = {"prompt": "The rain", "max_tokens": 3, "temperature": 0}

    async def work(client: httpx2.AsyncClient) -> None:
        models = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in models] == ["base", "sql", "style"]
        replicas.asked.clear()
        texts = []
        for extra in (
            {"model": "sql"},
            {"model": "base", "adapters": [{"name": "style", "weight": 1}]},
            {"model": "base"},
        ):
            answer = await client.post("/v1/completions", json=body | extra)
            assert answer.status_code == 200 and answer.headers["x-request-id"]
            texts.append(answer.json()["choices"][0]["text"])
        assert replicas.asked == ["sql", "style", ""] and len(set(texts)) == 3
        stream = await client.post("/v1/completions", json=body | {"model": "sql", "stream": True})
        assert stream.text.endswith("data: [DONE]\n\n")
        unknown = await client.post("/v1/completions", json=body | {"model": "none"})
        assert unknown.status_code == 404 and unknown.json()["error"]["param"] == "model"
        for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/unload_lora_adapter"):
            assert (await client.post(path, json={})).status_code == 501
        assert (await client.get("/v1/models", headers={"authorization": "Bearer wrong"})).status_code == 401
        assert (await client.get("/health", headers={"authorization": ""})).text == "ok\n"

    calls(replicas, place, tmp_path, work)


def test_a_lost_replica(replicas: InProcess, place: Path, tmp_path: Path) -> None:
    """A request goes to another replica if no answer had begun; a stream that had begun ends with an error and without [DONE]."""
    asked = {"model": "sql", "prompt": "The rain", "max_tokens": 6, "stream": True}

    async def work(client: httpx2.AsyncClient) -> list[httpx2.Response]:
        found = []
        for lost_after in ([0, 0], [0, 0, 0]):
            replicas.lost_after = list(lost_after)
            found.append(await client.post("/v1/completions", json=asked))
        return found

    retried, refused = calls(replicas, place, tmp_path, work)
    assert retried.status_code == 200 and retried.text.endswith("data: [DONE]\n\n")
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"

    sent: list[Message] = []

    asked_for: list[Message] = [{"type": "http.request", "body": json.dumps(asked).encode(), "more_body": False}]

    async def receive() -> Message:
        if not asked_for:
            await asyncio.Event().wait()  # the client stays
        return asked_for.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    replicas.lost_after = [2]
    with pytest.raises(BrokenAnswerError):
        asyncio.run(Gateway(replicas, ())(SCOPE, receive, send))
    assert b"replica_lost" in sent[-1]["body"] and sent[-1]["more_body"]


def test_requests_to_all_replicas(replicas: InProcess, place: Path, adapters: Path, tmp_path: Path) -> None:
    """An adapter is replaced in all replicas with the admin key only, and metrics have the replica as a label."""

    async def work(client: httpx2.AsyncClient) -> list[httpx2.Response]:
        loaded = await client.post("/v1/load_lora_adapter", json={"lora_name": "sql"})
        unknown = await client.post("/v1/load_lora_adapter", json={"lora_name": "none"})
        return [loaded, unknown, await client.get("/metrics")]

    assert calls(replicas, place, tmp_path, work)[0].status_code == 403
    loaded, unknown, metrics = calls(replicas, place, tmp_path, work, ADMIN_KEY)
    assert loaded.json() == {"id": "sql", "object": "model", "loaded": True} and unknown.status_code == 404
    assert all(f'veneer:num_requests_running{{replica="{i}"}} 0.0' in metrics.text for i in range(2))


def test_a_client_that_goes_away(replicas: InProcess) -> None:
    """Leaving an answer gives the request up in the engine."""
    engine = replicas.replicas[0]._engine
    body = b'{"model": "base", "prompt": "a", "max_tokens": 200, "n": 8, "stream": true, "ignore_eos": true}'

    async def leave() -> int:
        answer = replicas.replicas[0].answer(SCOPE, body)
        for _ in range(3):
            await anext(answer)
        running = engine.metrics().running
        await answer.aclose()
        return running

    assert asyncio.run(leave()) > 0
    wait(lambda: engine.metrics().running == engine.metrics().waiting == 0)
    assert engine.metrics().free_blocks == engine.metrics().blocks


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/load_lora_adapter"])
def test_a_client_that_goes_away_while_it_asks(replicas: InProcess, path: str) -> None:
    """A request whose body breaks off goes to no replica and has no answer."""
    asked: list[Message] = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": b'{"model":', "more_body": True},
    ]
    replicas.asked.clear()
    before = [one._engine.metrics().finished for one in replicas.replicas]

    async def receive() -> Message:
        return asked.pop()

    async def send(message: Message) -> None:
        raise AssertionError(message)

    asyncio.run(Gateway(replicas, ())({**SCOPE, "path": path}, receive, send))
    assert not replicas.asked and before == [one._engine.metrics().finished for one in replicas.replicas]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": 3}', b'{"adapters": [{}]}', b'{"adapters": 3}'])
def test_a_body_without_an_adapter(body: bytes) -> None:
    """Bodies that are wrong have no adapter; the replica answers them."""
    assert adapter_of(body) == ""
