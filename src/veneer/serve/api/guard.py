"""The layer before every route: request ids, the checks of host, origin and key, limits on bodies, one line of log.

A page in a browser can reach a server on the loopback interface. It cannot set the Host header and has no key: a request is answered only
under a host name that is this server's, from no other origin, and with a key, on every route but the two for health.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veneer.serve.api.errors import ApiError, BrokenAnswerError, as_api_error
from veneer.serve.keys import Keys
from veneer.serve.limits import ServeLimits

_log = logging.getLogger("veneer.serve.access")
OPEN_ROUTES = ("/health", "/ready")
"""Routes that need no key; they tell nothing but whether the server lives."""
UPLOADS = ("/v1/files",)
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Guard:
    """Checks requests and hands them on. Answers of the application get the id of their request."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        limits: ServeLimits,
        hosts: Callable[[], Sequence[str]],
        any_address: bool,
        answered: Callable[[int], None],
    ) -> None:
        """Put the checks before an application.

        Args:
            app: the application.
            keys: the keys that are accepted.
            limits: limits on bodies.
            hosts: the host names, with ports and in lower case, under which the server is reached.
            any_address: also allow every IP address as host.
            answered: called with the status of each answer.
        """
        self._app = app
        self._keys = keys
        self._limits = limits
        self._hosts = hosts
        self._any_address = any_address
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, complete = time.monotonic(), 0, False
        request_id = scope["request_id"] = _request_id(scope)

        async def with_id(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            elif message["type"] == "http.response.body":
                complete = not message.get("more_body", False)
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._limited(scope, receive), with_id)
        except Exception as error:
            # An answer that began is left incomplete, so that the server cuts the connection.
            if not status:
                await as_api_error(error, request_id).response()(scope, receive, with_id)
            elif not complete and not isinstance(error, BrokenAnswerError):
                _log.error("%s was cut", request_id, exc_info=error)
        finally:
            self._answered(status)
            _log.info(
                "%s %s %s %d %.3f s", request_id, scope["method"], scope["path"], status, time.monotonic() - began
            )

    def _check(self, scope: Scope) -> None:
        """Raise ApiError for a request of another host, another origin or without a key."""
        host = _single(scope, b"host")
        if host is None or not self._own_host(host):
            raise ApiError(
                421,
                "the Host header is not that of this server; add the name with --allow-host NAME",
                code="wrong_host",
            )
        origin = _single(scope, b"origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError(403, "requests from pages of other origins are refused", code="wrong_origin")
        if scope["path"] in OPEN_ROUTES:
            return
        scheme, _, key = (_single(scope, b"authorization") or "").partition(" ")
        role = self._keys.role(key.strip()) if scheme.lower() == "bearer" else None
        if role is None:
            raise ApiError(
                401,
                "a key is needed: send the header Authorization: Bearer KEY"
                if not key
                else "the key in the Authorization header is not one of this server",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        scope["role"], scope["caller"] = role, self._keys.caller(key.strip())
        length = _single(scope, b"content-length") or "0"
        if not length.isdecimal() or int(length) > self._max_bytes(scope):
            raise _too_large(self._max_bytes(scope))
        if _single(scope, b"content-encoding") not in (None, "identity"):
            raise ApiError(415, "compressed bodies are not accepted", code="unsupported_encoding")

    def _own_host(self, host: str) -> bool:
        if host.lower() in self._hosts():
            return True
        if not self._any_address:
            return False
        try:
            ipaddress.ip_address(urlsplit(f"//{host}").hostname or "")
        except ValueError:
            return False
        return True

    def _max_bytes(self, scope: Scope) -> int:
        """Maximum size of the body of a request; an upload has some bytes for the form around the file."""
        uploads = scope["path"] in UPLOADS and scope["method"] == "POST"
        return self._limits.max_file_bytes + (1 << 16) if uploads else self._limits.max_body_bytes

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """Receive at most so many bytes, and wait for each part only so long."""
        most, total, whole = self._max_bytes(scope), 0, False

        async def limited() -> Message:
            nonlocal total, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(self._limits.body_seconds):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    "the body of the request did not arrive in time",
                    code="timeout",
                    headers={"connection": "close"},
                ) from None
            if message["type"] == "http.disconnect":
                whole = True
                return message
            total += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if total > most:
                raise _too_large(most)
            return message

        return limited


def _too_large(most: int) -> ApiError:
    # The rest of the body is not read, so the connection cannot be used again.
    return ApiError(
        413,
        f"the request is too large: expected at most {most:,} bytes",
        code="too_large",
        headers={"connection": "close"},
    )


def _request_id(scope: Scope) -> str:
    given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


def _single(scope: Scope, name: bytes) -> str | None:
    """The value of a header, or None. Raises ApiError if it is given twice, since two readers could take different ones."""
    found: list[Any] = [value for key, value in scope["headers"] if key == name]
    if len(found) > 1:
        raise ApiError(400, f"the header {name.decode()} is given {len(found)} times", code="repeated_header")
    return found[0].decode("latin-1") if found else None
