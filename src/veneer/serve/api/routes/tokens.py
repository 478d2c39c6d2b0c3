"""POST /v1/tokenize and /v1/detokenize, GET /tokenizer_info (also under the names that vLLM and lm-eval use)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from veneer.serve.api.context import ApiContext
from veneer.serve.api.errors import invalid
from veneer.serve.api.parameters import DetokenizeRequest, JsonRoute, TokenizeRequest
from veneer.serve.api.routes.chat import adapter_template


def token_routes(context: ApiContext) -> APIRouter:
    """The routes of the tokenizer."""
    router = APIRouter(route_class=JsonRoute)
    tokenizer = context.tokenizer

    @router.post("/v1/tokenize")
    @router.post("/tokenize")
    def tokenize(parameters: TokenizeRequest) -> dict[str, Any]:
        if (parameters.prompt is None) == (parameters.messages is None):
            raise invalid("prompt or messages: give one of them", "prompt")
        if len(parameters.prompt or "") > context.limits.max_prompt_characters:
            raise invalid(f"prompt: expected at most {context.limits.max_prompt_characters:,} characters", "prompt")
        mix = context.registry.mix_of(parameters.model) if parameters.model is not None else ()
        if parameters.messages is not None:
            template = adapter_template(context, mix)
            prompt = parameters.add_generation_prompt
            ids = context.prompts.chat(parameters.messages, parameters.tools, template=template, prompt=prompt).ids
        else:
            ids = context.prompts.text(parameters.prompt or "", begin=parameters.add_special_tokens)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": context.engine.context_length, "tokens": list(ids)}
        if parameters.return_token_strs:
            found["token_strs"] = [context.token_names(token)[0] for token in ids]
        return found

    @router.post("/v1/detokenize")
    @router.post("/detokenize")
    def detokenize(parameters: DetokenizeRequest) -> dict[str, Any]:
        vocabulary = context.engine.vocabulary
        wrong = next((token for token in parameters.tokens if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise invalid(f"tokens: expected tokens from 0 to {vocabulary - 1}, found {wrong}", "tokens")
        return {"prompt": tokenizer.decode(parameters.tokens, skip_special_tokens=False)}

    @router.get("/v1/tokenizer_info")
    @router.get("/tokenizer_info")
    def tokenizer_info() -> dict[str, Any]:
        template = context.prompts.source(None) if context.prompts.chats else None
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": len(tokenizer),
            "model_max_length": context.engine.context_length,
            "max_model_len": context.engine.context_length,
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "pad_token": tokenizer.pad_token,
            "unk_token": tokenizer.unk_token,
            "chat_template": template,
        }

    return router
