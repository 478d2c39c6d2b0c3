"""Errors as clients see them: ``{"error": {message, type, param, code}}`` with a status.

Whatever a route raises becomes one of these. A cause that is not a ``VeneerError`` is a defect; the client learns the request's id only.
"""

from __future__ import annotations

import logging
import re
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from veneer.errors import AdapterError, ConfigError, DataError, EngineBusyError, ServeError, VeneerError
from veneer.serve.jobs.options import RequestError
from veneer.serve.registry import UnknownModelError

_log = logging.getLogger(__name__)
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
RETRY_AFTER = 1
"""Seconds after which a client may send a refused request again."""


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The envelope."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


class ClientGoneError(Exception):
    """The client closed the connection, so nobody waits for the answer."""


class BrokenAnswerError(Exception):
    """An answer that began cannot be completed; the connection is cut."""


def invalid(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """A request that cannot be honoured because of one parameter."""
    return ApiError(400, message, param=param, code=code)


def not_found(what: str, name: str, param: str = "id") -> ApiError:
    """A name or id that nothing has."""
    shown = name if len(name) <= 80 else f"{name[:77]}..."
    return ApiError(404, f"there is no {what} {shown!r}", param=param, code="not_found")


def as_api_error(error: BaseException, request_id: str = "") -> ApiError:
    """The answer to an exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownModelError):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, RequestError):
        return invalid(str(error), error.param, error.code)
    if isinstance(error, EngineBusyError):
        return ApiError(429, str(error), code="engine_busy", headers={"retry-after": str(RETRY_AFTER)})
    if isinstance(error, ServeError):
        return ApiError(503, str(error), code="unavailable", headers={"retry-after": str(RETRY_AFTER)})
    if isinstance(error, (ConfigError, DataError, AdapterError)):
        return invalid(str(error), None)
    if isinstance(error, VeneerError):
        return ApiError(500, str(error), code="server_error")
    if isinstance(error, OSError) or (
        isinstance(error, sqlite3.OperationalError) and re.search("full|disk I/O", str(error))
    ):
        reason = getattr(error, "strerror", None) or str(error)
        return ApiError(507, f"the server cannot write to its disk: {reason}; free some space on it", code="disk")
    _log.error("request %s failed", request_id, exc_info=error)
    return ApiError(
        500, f"the server had an error; its log has the details of request {request_id}", code="server_error"
    )


def install(app: FastAPI) -> None:
    """Answer every exception of an application with an envelope."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error, request.scope.get("request_id", "")).response()

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, ApiError):  # raised while FastAPI read the body
            return error.__cause__.response()
        if error.status_code == 404:
            text, code = f"there is no route {request.method} {request.url.path}", "not_found"
        elif error.status_code == 405:
            text, code = f"{request.url.path} does not accept {request.method}", "method_not_allowed"
        else:
            text, code = str(error.detail), "invalid_request"
        return ApiError(error.status_code, text, code=code, headers=error.headers).response()

    async def not_valid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _first_problem(error).response()

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    for left in (ClientGoneError, ClientDisconnect):
        app.add_exception_handler(left, gone)
    for kind in (ApiError, VeneerError, OSError, sqlite3.Error, Exception):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, not_valid)


def _first_problem(error: RequestValidationError) -> ApiError:
    """The first problem of a request whose types are wrong, with the name of the parameter."""
    problems = [(_parameter(detail["loc"]), detail) for detail in error.errors()]
    param, found = problems[0]
    name = param or "the body"
    if found["type"] == "extra_forbidden":
        return invalid(f"unknown parameter {name}; it is not supported", param, "unknown_parameter")
    if found["type"] == "missing":
        return invalid(f"{name} is missing", param, "missing_parameter")
    if found["type"] == "json_invalid":
        return invalid("the body is not valid JSON", None, "invalid_json")
    messages = [
        re.sub(r"^Input should be |^Value error, ", "", detail["msg"]) for other, detail in problems if other == param
    ]
    return invalid(f"{name}: expected {' or '.join(dict.fromkeys(messages))}", param)


def _parameter(location: Sequence[int | str]) -> str | None:
    """The name of a parameter, without the parts that name members of unions."""
    keys = [str(key) for key in location if key not in ("body", "query", "path")]
    known = [
        key
        for key in keys
        if re.fullmatch(r"[a-z_0-9]{1,64}", key) and key not in ("str", "int", "float", "bool", "none")
    ]
    return ".".join(known) or None
