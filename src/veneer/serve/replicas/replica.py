"""One replica: a base with its adapters, an engine, and the routes of the server without a socket.

This file does not import Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

from starlette.types import ASGIApp, Message, Scope

from veneer.errors import ServeError
from veneer.serve.api.app import create_routes
from veneer.serve.limits import ServeLimits
from veneer.serve.loading import EngineOptions, load_engine
from veneer.serve.server import ServeOptions, open_context

_AHEAD = 256
"""Messages of an answer that wait to be taken."""


class Replica:
    """Answers requests that a `Gateway` has checked. Its state is of its own and ends with it."""

    def __init__(self, options: EngineOptions) -> None:
        """Load the base and the adapters.

        Raises:
            VeneerError: the base cannot be loaded or served.
            ServeError: an adapter cannot be loaded.
        """
        with ExitStack() as stack:
            state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="veneer-replica-")))
            base, bank, self._engine = load_engine(options)
            place = ServeOptions(state=state, adapters=options.adapters)
            context, problems = open_context(stack, base, bank, self._engine, place, ServeLimits())
            if problems:
                raise ServeError("; ".join(f"{name}: {problem}" for name, problem in problems.items()))
            self._app: ASGIApp = create_routes(context)
            self._stack = stack.pop_all()
        self._engine.start()

    def close(self) -> None:
        """Stop the engine."""
        self._engine.stop()
        self._stack.close()

    def check_health(self) -> None:
        """Raise ServeError if the engine has failed."""
        if self._engine.failure:
            raise ServeError(self._engine.failure)

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """The messages of the answer to one request; leaving the iteration gives the request up."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue(_AHEAD)
        asked: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not asked:
                await asyncio.Event().wait()  # a client that is gone cancels the task
            return asked.pop()

        async def run() -> None:
            try:
                await self._app(scope, receive, messages.put)
            finally:
                await messages.put(None)

        task = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            task.cancel()
            while not messages.empty():
                messages.get_nowait()  # the end of a task that is cancelled needs room
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    async def whole_answer(self, scope: Scope, body: bytes) -> tuple[int, bytes]:
        """(status, body) of the answer to one request."""
        status, content = 500, b""
        async for message in self.answer(scope, body):
            status = message.get("status", status)
            content += message.get("body", b"")
        return status, content
