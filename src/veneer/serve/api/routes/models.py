"""GET and DELETE /v1/models, and adapters loaded and unloaded by name with the admin key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends

from veneer.errors import ServeError, VeneerError
from veneer.serve.api.context import ApiContext, require_admin
from veneer.serve.api.errors import ApiError, invalid
from veneer.serve.api.parameters import AdapterRequest, JsonRoute
from veneer.serve.registry import ModelCard, UnknownModelError


def model_routes(context: ApiContext) -> APIRouter:
    """The routes of models."""
    router = APIRouter(route_class=JsonRoute)
    registry = context.registry

    @router.get("/v1/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_shown(context, card) for card in registry.cards()]}

    @router.get("/v1/models/{model:path}")
    def retrieve_model(model: str) -> dict[str, Any]:
        return _shown(context, registry.card(model))

    @router.delete("/v1/models/{model:path}")
    def delete_model(model: str) -> dict[str, Any]:
        try:
            registry.delete(model)
        except UnknownModelError:
            raise
        except ServeError as error:
            raise ApiError(409, str(error), param="model", code="not_deletable", headers=NO_RETRY) from None
        return {"id": model, "object": "model", "deleted": True}

    @router.post("/v1/load_lora_adapter", dependencies=[Depends(require_admin)])
    def load_adapter(parameters: AdapterRequest) -> dict[str, Any]:
        try:
            registry.load(parameters.lora_name)
        except UnknownModelError:
            raise
        except VeneerError as error:
            raise invalid(str(error), "lora_name", "adapter_not_loadable") from None
        return {"id": parameters.lora_name, "object": "model", "loaded": True}

    @router.post("/v1/unload_lora_adapter", dependencies=[Depends(require_admin)])
    def unload_adapter(parameters: AdapterRequest) -> dict[str, Any]:
        registry.unload(parameters.lora_name)
        return {"id": parameters.lora_name, "object": "model", "loaded": False}

    return router


NO_RETRY = {"x-should-retry": "false"}
"""Headers of a conflict that stays one."""


def _shown(context: ApiContext, card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.id,
        "object": "model",
        "created": card.created_at,
        "owned_by": "veneer",
        "parent": card.parent,
        "max_model_len": context.engine.context_length,
    }
