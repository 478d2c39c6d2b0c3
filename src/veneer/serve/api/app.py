"""The application: all routes behind the guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import FastAPI
from starlette.types import ASGIApp

from veneer._version import __version__
from veneer.serve.api import errors
from veneer.serve.api.context import ApiContext
from veneer.serve.api.guard import Guard
from veneer.serve.api.routes.chat import chat_routes
from veneer.serve.api.routes.completions import completion_routes
from veneer.serve.api.routes.embeddings import embedding_routes
from veneer.serve.api.routes.files import file_routes
from veneer.serve.api.routes.fine_tuning import fine_tuning_routes
from veneer.serve.api.routes.health import health_routes
from veneer.serve.api.routes.models import model_routes
from veneer.serve.api.routes.tokens import token_routes
from veneer.serve.keys import Keys

ROUTES = (
    health_routes,
    model_routes,
    chat_routes,
    completion_routes,
    embedding_routes,
    token_routes,
    file_routes,
    fine_tuning_routes,
)


def create_routes(context: ApiContext) -> FastAPI:
    """The application without its guard."""
    app = FastAPI(
        title="Veneer",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    for routes in ROUTES:
        app.include_router(routes(context))
    errors.install(app)
    return app


def create_app(context: ApiContext, keys: Keys, *, hosts: Callable[[], Sequence[str]], any_address: bool) -> ASGIApp:
    """The application.

    Args:
        context: the parts of the server.
        keys: the keys that are accepted.
        hosts: the host names with ports under which the server is reached, in lower case.
        any_address: also accept every IP address as host.
    """
    return Guard(
        create_routes(context),
        keys=keys,
        limits=context.limits,
        hosts=hosts,
        any_address=any_address,
        answered=context.metrics.answered,
    )
