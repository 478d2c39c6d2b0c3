"""The application in front of replicas: it checks keys and limits, and passes each request on to a replica.

Requests that name one adapter are kept together, so that its weights and prefixes are there already. A replica that is lost before its
answer began costs nothing: the request goes to another one. An answer that had begun ends with an error and a cut connection.

This file does not import Ray.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import suppress
from typing import Any, Protocol

import orjson
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from veneer.serve.api.connection import while_connected
from veneer.serve.api.errors import RETRY_AFTER, ApiError, BrokenAnswerError, ClientGoneError
from veneer.serve.api.event_stream import data

_ATTEMPTS = 3
_TRAINING = ("/v1/files", "/v1/fine_tuning")
_LOAD, _UNLOAD, _METRICS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/metrics"
_PARTS = frozenset(
    (
        *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers"),
        *("client", "server", "role", "caller", "request_id"),
    )
)
"""Parts of a request's scope that a replica gets."""


class ReplicaLostError(Exception):
    """A replica ended before it had answered."""


class Replicas(Protocol):
    """Replicas that answer requests."""

    def answer(self, scope: Scope, body: bytes, adapter: str) -> AsyncIterator[Message]:
        """The messages of one replica's answer; one that has ``adapter`` is preferred. Raises ReplicaLostError."""

    async def answer_each(self, scope: Scope, body: bytes) -> dict[str, tuple[int, bytes]]:
        """{replica: (status, body)} of all replicas' answers. Raises ReplicaLostError."""


class Gateway:
    """Passes requests on. It stands behind a `Guard`, which answers the errors that it raises."""

    def __init__(self, replicas: Replicas, base_names: Collection[str]) -> None:
        """``base_names``: models that have no adapter, whose requests go to any replica."""
        self._replicas = replicas
        self._base_names = frozenset(base_names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        path = scope["path"]
        if path.startswith(_TRAINING):
            raise ApiError(
                501, "replicas train nothing; start a server without --cluster for jobs", code="not_implemented"
            )
        if path == _UNLOAD:
            text = "replicas unload nothing; take the adapter out of the folder and start the application again"
            raise ApiError(501, text, code="not_implemented")
        body = await _read(receive)
        if body is None:
            return
        forwarded = {name: value for name, value in scope.items() if name in _PARTS}
        if path in (_LOAD, _METRICS):
            await (await self._from_each(forwarded, body))(scope, receive, send)
            return
        with suppress(ClientGoneError):
            await while_connected(receive, self._pass_on(forwarded, body, send))

    async def _pass_on(self, scope: Scope, body: bytes, send: Send) -> None:
        adapter = adapter_of(body) if scope["method"] == "POST" else ""
        adapter = "" if adapter in self._base_names else adapter
        for _ in range(_ATTEMPTS):
            streams = complete = started = False
            try:
                async for message in self._replicas.answer(scope, body, adapter):
                    if message["type"] == "http.response.start":
                        streams = (b"content-type", b"text/event-stream") in _types(message)
                    complete = message["type"] == "http.response.body" and not message.get("more_body", False)
                    await send(message)
                    started = True
            except ReplicaLostError:
                if not started:
                    continue
                if streams:
                    await send({"type": "http.response.body", "body": data(_lost().body()), "more_body": True})
            if not complete:
                raise BrokenAnswerError
            return
        raise _lost()

    async def _from_each(self, scope: Scope, body: bytes) -> Response:
        """The answer to a request that all replicas have to answer."""
        try:
            answers = await self._replicas.answer_each(scope, body)
        except ReplicaLostError:
            raise _lost() from None
        found = {name: content for name, (status, content) in answers.items() if status == 200}
        if len(found) < len(answers) or not answers:
            status, content = next(answer for answer in answers.values() if answer[0] != 200) if answers else (503, b"")
            return Response(content, status, media_type="application/json")
        if scope["path"] == _METRICS:
            return Response(merged_metrics(found), media_type="text/plain; version=0.0.4; charset=utf-8")
        return Response(next(iter(found.values())), media_type="application/json")


def adapter_of(body: bytes) -> str:
    """The name by which requests are kept together: the model, or the first adapter of a mix; empty if there is none."""
    try:
        asked = orjson.loads(body)
        names = [entry["name"] for entry in asked.get("adapters") or ()] or [asked.get("model")]
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError):
        return ""  # the replica answers with the error
    return names[0] if isinstance(names[0], str) else ""


def merged_metrics(texts: Mapping[str, bytes]) -> bytes:
    """The metrics of all replicas in one text, with the replica as a label."""

    class Merged(Collector):
        def collect(self) -> Any:
            families: dict[str, Metric] = {}
            for replica, text in texts.items():
                for family in text_string_to_metric_families(text.decode()):
                    made = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                    for sample in family.samples:
                        made.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
            return families.values()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Merged())
    return generate_latest(registry)


def _lost() -> ApiError:
    headers = {"retry-after": str(RETRY_AFTER)}
    return ApiError(503, "the replica of this request ended; send it again", code="replica_lost", headers=headers)


def _types(message: Message) -> list[tuple[bytes, bytes]]:
    """The content type among the headers, without its parameters."""
    return [(name, value.split(b";")[0]) for name, value in message["headers"] if name == b"content-type"]


async def _read(receive: Receive) -> bytes | None:
    """The body of a request; None if the client goes away before it has sent all of it."""
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)


async def _lifespan(receive: Receive, send: Send) -> None:
    for event in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{event}.complete"})
