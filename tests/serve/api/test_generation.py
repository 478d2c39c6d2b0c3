"""Requests of one answer: submitted off the event loop, all or none, and ended when the client goes away."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from veneer.errors import ConfigError
from veneer.serve.api.errors import ApiError
from veneer.serve.api.generation import Generation
from veneer.serve.engine.request import GenerationRequest, TextDelta


class SlowEngine:
    """Takes requests when it is let, and may refuse one."""

    def __init__(self, refused: int = -1) -> None:
        self.refused = refused
        self.let = threading.Semaphore(0)
        self.threads: set[int] = set()
        self.submitted: list[str] = []
        self.cancelled: set[str] = set()

    def submit(self, request: GenerationRequest, receive: Any) -> None:
        self.threads.add(threading.get_ident())
        self.let.acquire()
        if len(self.submitted) == self.refused:
            raise ConfigError("grammar: the schema is too large")
        self.submitted.append(request.id)

    def cancel(self, request_id: str) -> bool:
        self.cancelled.add(request_id)
        return True


def generation(engine: Any) -> Generation:
    requests = [GenerationRequest("", (1,)) for _ in range(3)]
    return Generation(engine, requests, seconds=10, params={"grammar": "tools"})


def test_a_client_that_goes_away_while_requests_are_submitted_leaves_none() -> None:
    """The event loop goes on while the engine takes requests; those that it took by then are cancelled and no more are submitted."""
    engine = SlowEngine()

    async def run() -> None:
        submitting = asyncio.ensure_future(generation(engine).submit())
        engine.let.release()
        while not engine.submitted:
            await asyncio.sleep(0.001)
        submitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submitting
        engine.let.release(2)
        while len(engine.cancelled) < 2:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(run(), 10))
    assert len(engine.submitted) == 2 and engine.cancelled == set(engine.submitted)
    assert threading.get_ident() not in engine.threads


def test_a_refused_request_names_the_clients_parameter_and_ends_the_others() -> None:
    """The engine's grammar is the client's tools here; the requests before the refused one are cancelled."""
    engine = SlowEngine(refused=2)
    engine.let.release(3)

    async def run() -> None:
        await generation(engine).submit()

    with pytest.raises(ApiError, match=r"^tools: the schema is too large") as refused:
        asyncio.run(run())
    assert refused.value.param == "tools" and engine.cancelled == set(engine.submitted) and len(engine.submitted) == 2


@pytest.mark.parametrize("ticks", range(4))
def test_a_reader_that_is_cancelled_as_an_event_arrives_ends(ticks: int) -> None:
    """No event takes the place of the cancellation, whichever of them the loop sees first."""

    async def run() -> bool:
        answer = generation(SlowEngine())

        async def read() -> None:
            async for _ in answer.events():
                pass

        reading = asyncio.ensure_future(read())
        await asyncio.sleep(0.01)
        answer._receiver(0)(TextDelta((), "a"))
        for _ in range(ticks):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading], timeout=0.5)
        return reading.cancelled()

    assert asyncio.run(run())
