"""Server-sent events. A stream that fails says so and is cut: it never looks complete."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from veneer.serve.api.connection import while_connected
from veneer.serve.api.errors import BrokenAnswerError, ClientGoneError, as_api_error

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
PING_SECONDS = 15.0
"""Seconds of silence after which a comment keeps the connection alive."""


def data(value: object) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


class EventStream(Response):
    """A response whose body is made while it is sent; it ends as soon as the client goes away."""

    media_type = "text/event-stream"

    def __init__(
        self, request: Request, first: bytes, rest: AsyncIterator[bytes], *, finish: Callable[[], object]
    ) -> None:
        """Create a response.

        Args:
            request: the request.
            first: sent at once. By then the request has been accepted, so that errors before it have their own status.
            rest: the other events.
            finish: called at the end, however it comes.
        """
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._request = request
        self._first = first
        self._rest = rest
        self._finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            with suppress(ClientGoneError):
                await while_connected(self._request.receive, self._send(scope, send))
        finally:
            self._finish()

    async def _send(self, scope: Scope, send: Send) -> None:
        async def body(piece: bytes) -> None:
            await send({"type": "http.response.body", "body": piece, "more_body": True})

        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await body(self._first)
            async for piece in self._rest:
                await body(piece)
        except Exception as error:
            problem = as_api_error(error, scope.get("request_id", ""))
            await body(data(problem.body()))
            raise BrokenAnswerError from None
        await send({"type": "http.response.body", "body": b"", "more_body": False})
