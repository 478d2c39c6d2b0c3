"""POST /v1/embeddings: the mean of the final states of each input, scaled to length 1."""

from __future__ import annotations

import base64
import struct
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from veneer.errors import ServeError
from veneer.serve.api.connection import while_connected
from veneer.serve.api.context import ApiContext
from veneer.serve.api.errors import invalid
from veneer.serve.api.generation import Generation, failure
from veneer.serve.api.parameters import EmbeddingRequest, JsonRoute
from veneer.serve.api.routes.completions import prompt_ids
from veneer.serve.engine.request import Finished, GenerationRequest, SamplingParams


def embedding_routes(context: ApiContext) -> APIRouter:
    """The route of embeddings."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/embeddings")
    async def embeddings(request: Request, parameters: EmbeddingRequest) -> Response:
        if parameters.dimensions is not None:
            raise invalid(
                "dimensions: the length of embeddings cannot be chosen", "dimensions", "unsupported_parameter"
            )
        mix = await run_in_threadpool(context.mix_of, parameters.model, parameters.adapters)
        prompts = await run_in_threadpool(prompt_ids, context, parameters.input, "input")
        asked = [GenerationRequest("", ids, mix, SamplingParams(max_tokens=0), embed=True) for ids in prompts]
        generation = Generation(
            context.engine,
            asked,
            seconds=context.limits.request_seconds,
            params={"prompt": "input", "mix": "adapters"},
        )
        vectors = await while_connected(request.receive, _vectors(context, generation))
        entries = [
            {"object": "embedding", "index": i, "embedding": _encoded(vector, parameters.encoding_format)}
            for i, vector in enumerate(vectors)
        ]
        total = sum(map(len, prompts))
        usage = {"prompt_tokens": total, "total_tokens": total}
        return JSONResponse({"object": "list", "data": entries, "model": parameters.model, "usage": usage})

    return router


async def _vectors(context: ApiContext, generation: Generation) -> list[tuple[float, ...]]:
    try:
        await generation.submit()
        async for numbered in generation.events():
            if numbered is not None and isinstance(numbered[1], Finished):
                context.metrics.finished(numbered[1])
                if (error := failure(numbered[1])) is not None:
                    raise error
    finally:
        generation.cancel()
    found = []
    for number in range(len(generation.requests)):
        vector = generation.finished[number].embedding
        if vector is None:
            raise ServeError("the engine returned no embedding for this model")
        found.append(vector)
    return found


def _encoded(vector: tuple[float, ...], form: str | None) -> Any:
    """A list of numbers, or base64 of little-endian float32, which clients ask for by default."""
    if form == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return list(vector)
