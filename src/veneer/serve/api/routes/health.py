"""GET /health, /ready, /version and /metrics, and clear answers for the routes of hosted services that are not here."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from veneer._version import __version__
from veneer.serve.api.context import ApiContext
from veneer.serve.api.errors import RETRY_AFTER, ApiError

_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
ABSENT = {
    "/v1/fine_tuning/checkpoints/{rest:path}": "permissions of checkpoints: every key of this server may use every model",
    "/v1/fine_tuning/alpha/{rest:path}": "graders: jobs are supervised",
    "/v1/uploads{rest:path}": "uploads in parts: send the file to /v1/files in one request",
    "/v1/responses{rest:path}": "responses: use /v1/chat/completions",
    "/v1/batches{rest:path}": "batches: send the requests at once, they run together",
    "/v1/moderations{rest:path}": "moderations",
    "/v1/audio/{rest:path}": "audio",
    "/v1/images/{rest:path}": "images",
}
"""Routes that clients know and this server does not have."""


def health_routes(context: ApiContext) -> APIRouter:
    """The routes of health and metrics."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        _check_engine(context)
        return PlainTextResponse("ok\n")

    @router.get("/ready")
    async def ready() -> Response:
        _check_engine(context)
        if context.draining:
            headers = {"retry-after": str(RETRY_AFTER)}
            raise ApiError(503, "the server is about to stop", code="draining", headers=headers)
        return PlainTextResponse("ready\n")

    @router.get("/version")
    @router.get("/v1/version")
    async def version() -> dict[str, Any]:
        return {"version": __version__}

    @router.get("/metrics")
    def metrics() -> Response:
        return Response(context.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, what in ABSENT.items():
        router.add_api_route(path, _absent(what), methods=_METHODS, include_in_schema=False)
    return router


def _check_engine(context: ApiContext) -> None:
    if context.engine.failure:  # its text may tell more than those without a key shall know
        raise ApiError(
            503, "the engine has failed, as the server's log tells; restart the server", code="engine_failed"
        )


def _absent(what: str) -> Any:
    async def absent(request: Request) -> Response:
        raise ApiError(501, f"this server has no {what}", code="not_implemented")

    return absent
