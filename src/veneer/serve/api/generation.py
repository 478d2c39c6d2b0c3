"""Requests to the engine from the event loop, with their events in one queue."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.concurrency import run_in_threadpool

from veneer.errors import ConfigError, ServeError, VeneerError
from veneer.serve.api.errors import invalid
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.request import Event, Finished, GenerationRequest, Usage


class RequestTimeoutError(ServeError):
    """An answer that takes longer than a limit."""


@dataclass(frozen=True)
class UsageSum:
    """Token counts of an answer: prompts count once, whatever their choices."""

    prompt: int
    completion: int
    cached: int

    @classmethod
    def of(cls, usages: Sequence[Usage], choices: int) -> UsageSum:
        """The sum over requests, of which ``choices`` each share a prompt."""
        prompts = usages[::choices]
        return cls(
            sum(usage.prompt_tokens for usage in prompts),
            sum(usage.completion_tokens for usage in usages),
            sum(usage.cached_tokens for usage in prompts),
        )

    def as_dict(self) -> dict[str, Any]:
        """As clients read it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Generation:
    """The requests of one answer. Whoever submits them calls `cancel` at the end, which ends those that still run."""

    def __init__(
        self, engine: Engine, requests: Sequence[GenerationRequest], *, seconds: float, params: Mapping[str, str]
    ) -> None:
        """Create the requests.

        Args:
            engine: the engine.
            requests: the requests; they get ids of their own.
            seconds: maximum time until the last event.
            params: the client's names of what the engine calls prompt, grammar and mix.
        """
        tag = secrets.token_hex(8)
        self.requests = [replace(request, id=f"{tag}-{i}") for i, request in enumerate(requests)]
        self.finished: dict[int, Finished] = {}
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._until = self._loop.time() + seconds
        self._params = params
        self._submitted = 0
        self._cancelled = False

    async def submit(self) -> None:
        """Submit the requests, in a thread: to compile a grammar takes time, and adapters may be locked.

        Raises:
            ApiError: the engine cannot honour a parameter; names it.
            VeneerError: whatever else `Engine.submit` raises. None of the requests runs then.
        """
        try:
            await run_in_threadpool(self._submit)
        except ConfigError as error:
            self.cancel()
            name, _, problem = str(error).partition(": ")
            param = self._params.get(name)
            raise invalid(str(error) if param is None else f"{param}: {problem}", param) from None
        except BaseException:
            self.cancel()
            raise

    def _submit(self) -> None:
        for number, request in enumerate(self.requests):
            self._engine.submit(request, self._receiver(number))
            self._submitted = number + 1
            if self._cancelled:  # by a client that went away in the meantime
                self.cancel()
                return

    def cancel(self) -> None:
        """End the requests that still run."""
        self._cancelled = True
        for number, request in enumerate(self.requests[: self._submitted]):
            if number not in self.finished:
                self._engine.cancel(request.id)

    def _receiver(self, number: int) -> Any:
        def receive(event: Event) -> None:  # on the engine's thread
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        return receive

    async def events(self, *, quiet: float | None = None) -> AsyncIterator[tuple[int, Event] | None]:
        """(number of the request, event) until all have finished.

        Args:
            quiet: yield None after so many seconds without an event.

        Raises:
            RequestTimeoutError: the time is over.
        """
        while len(self.finished) < len(self.requests):
            left = self._until - self._loop.time()
            try:
                # Not wait_for(), which takes an event in place of the cancellation that comes with it.
                async with asyncio.timeout(left if quiet is None else min(left, quiet)):
                    number, event = await self._events.get()
            except TimeoutError:
                if self._loop.time() >= self._until:
                    raise RequestTimeoutError("the answer took too long and was cut") from None
                yield None
                continue
            if isinstance(event, Finished):
                self.finished[number] = event
            yield number, event

    def usage(self, choices: int) -> UsageSum:
        """Token counts of the finished requests."""
        return UsageSum.of([self.finished[number].usage for number in sorted(self.finished)], choices)


def failure(event: Finished) -> VeneerError | None:
    """The error of a request that did not end by itself, or None."""
    if event.reason == "error":
        return event.error or ServeError("the engine could not answer the request")
    if event.reason == "cancelled":
        return ServeError("the request was cancelled, since the server stops")
    return None
