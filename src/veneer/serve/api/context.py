"""State that the routes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request

from veneer.serve.api.errors import ApiError, invalid
from veneer.serve.api.metrics import ServeMetrics
from veneer.serve.api.parameters import AdapterWeight
from veneer.serve.api.prompts import PromptRenderer
from veneer.serve.api.token_names import TokenNames
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.request import Mix
from veneer.serve.jobs.queue import JobQueue
from veneer.serve.limits import ServeLimits
from veneer.serve.registry import ModelRegistry, UnknownModelError
from veneer.serve.store.files import FileStore
from veneer.serve.store.jobs import JobStore

if TYPE_CHECKING:
    from veneer.models.load import Base


@dataclass
class ApiContext:
    """The parts of a server that answer requests. ``draining``: it is about to stop."""

    base: Base
    tokenizer: Any
    engine: Engine
    registry: ModelRegistry
    prompts: PromptRenderer
    token_names: TokenNames
    files: FileStore
    jobs: JobStore
    queue: JobQueue
    limits: ServeLimits
    metrics: ServeMetrics
    draining: bool = False

    def mix_of(self, model: str, adapters: list[AdapterWeight] | None) -> Mix:
        """The mix that a request asks for: its model, or the weighted adapters if it gives some, for which the model is the base.

        Raises:
            ApiError: a name is unknown or given twice, or both the model and the list name adapters.
        """
        mix = self.registry.mix_of(model)
        if adapters is None:
            return mix
        if mix:
            raise invalid(
                f"adapters: the model is {model!r} already; give the base {self.registry.base_id!r} as the model of a mix",
                "adapters",
            )
        if len(adapters) > self.limits.max_adapters:
            raise invalid(f"adapters: expected at most {self.limits.max_adapters}, found {len(adapters)}", "adapters")
        weights: dict[str, float] = {}
        for i, entry in enumerate(adapters):
            if entry.name in weights:
                raise invalid(
                    f"adapters: {entry.name!r} is given twice; give it once with one weight", f"adapters.{i}.name"
                )
            weights[entry.name] = entry.weight
            try:
                if not self.registry.mix_of(entry.name):
                    raise invalid(f"adapters: {entry.name!r} is the base, which every mix has", f"adapters.{i}.name")
            except UnknownModelError as error:
                raise ApiError(404, str(error), param=f"adapters.{i}.name", code="model_not_found") from None
        return self.registry.mix(weights)


def require_admin(request: Request) -> None:
    """Raise ApiError unless the request has the admin key."""
    if request.scope.get("role") != "admin":
        raise ApiError(403, "this needs the admin key (VENEER_ADMIN_KEY)", code="admin_key_needed")
