"""uvicorn with the time limits that it does not have: slow headers, slow readers, too many connections."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from veneer.errors import ConfigError
from veneer.serve.limits import ServeLimits

MAX_CONNECTIONS = 8192
_SEND_BYTES = 128 << 10
"""Bytes that the system buffers for a client that does not read; its default is megabytes for each."""
_HEADER_BYTES = 64 << 10
_QUIET = ("Exception in ASGI application", "ASGI callable returned without completing response", "Invalid HTTP request")
"""Messages of uvicorn about connections that are cut on purpose, or by a client."""


def timed_protocol(limits: ServeLimits) -> type[H11Protocol]:
    """uvicorn's protocol with limits on the time that a client takes."""

    class TimedProtocol(H11Protocol):
        """Cuts connections whose headers do not arrive, and those that do not read."""

        _headers_due: asyncio.TimerHandle | None = None
        _reading_due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > MAX_CONNECTIONS:
                transport.abort()
                return
            self._wait_for_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE:
                self._wait_for_headers()
            else:
                self._headers_due = _cancelled(self._headers_due)

        def _wait_for_headers(self) -> None:
            if self._headers_due is None:
                self._headers_due = self.loop.call_later(limits.header_seconds, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reading_due = self.loop.call_later(limits.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._reading_due = _cancelled(self._reading_due)

        def connection_lost(self, exc: Exception | None) -> None:
            self._headers_due = _cancelled(self._headers_due)
            self._reading_due = _cancelled(self._reading_due)
            super().connection_lost(exc)

    return TimedProtocol


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """None, after cancelling the timer if there is one."""
    if timer is not None:
        timer.cancel()
    return None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the port is in use, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)  # its connections have it too
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is in use; choose another one with --port, or 0 for a free one"
            ) from None
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}"
        ) from None
    return listener


class HttpServer(uvicorn.Server):
    """A uvicorn server for one application."""

    def __init__(self, app: ASGIApp, limits: ServeLimits, *, drain_seconds: float, on_exit: Callable[[], None]) -> None:
        """``on_exit`` is called when the server begins to stop."""
        config = uvicorn.Config(
            app,
            http=timed_protocol(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=max(1, round(drain_seconds)),
            h11_max_incomplete_event_size=_HEADER_BYTES,
        )
        super().__init__(config)
        self._on_exit = on_exit
        logging.getLogger("uvicorn.error").addFilter(_not_quiet)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running answers end, and close."""
        self._on_exit()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM begin to stop, a second cuts running answers. uvicorn's own form ends the process before jobs are saved."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to stop, and at the second signal cut running answers."""
        self.force_exit = self.should_exit
        self.should_exit = True


def _not_quiet(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_QUIET)
