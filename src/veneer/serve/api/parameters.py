"""The parameters of requests. One that is not declared here is refused by its name.

Fields that only a hosted service can honour are declared in `NoEffect`: they are accepted, as the clients send them, and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from veneer.serve.api.errors import invalid

Integer = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Boolean = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
MAX_METADATA = 16
"""Most keys of an object's metadata."""
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=MAX_METADATA)
]


class JsonRequest(Request):
    """A request whose JSON can be written again.

    Python's parser accepts NaN, halves of surrogate pairs, integers of any size and any depth, and each of them makes an answer, the
    database or a hash fail later.
    """

    async def json(self) -> Any:
        """The body. Raises json.JSONDecodeError, or ApiError where it is nested too deeply."""
        found = orjson.loads(await self.body())
        try:
            orjson.dumps(found)
        except orjson.JSONEncodeError:
            raise invalid("the body is nested too deeply; expected at most 250 levels", None, "invalid_json") from None
        return found


class JsonRoute(APIRoute):
    """A route that reads its body as `JsonRequest` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of the route."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return strict


class RequestParameters(BaseModel):
    """A JSON object with known keys."""

    model_config = ConfigDict(extra="forbid")


class NoEffect(RequestParameters):
    """Parameters of hosted services without an effect here."""

    user: Text | None = None
    store: Boolean | None = None
    service_tier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None
    safety_identifier: Text | None = None
    verbosity: Text | None = None


class AdapterWeight(RequestParameters):
    """An adapter of a mix."""

    name: Text
    weight: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-100, le=100)] = 1.0


class StreamOptions(RequestParameters):
    """Options of a stream."""

    include_usage: Boolean = False
    include_obfuscation: Boolean = False


class SamplingParameters(NoEffect):
    """Parameters that completions and chat completions share."""

    model: Text
    adapters: list[AdapterWeight] | None = None
    stream: Boolean | None = None
    stream_options: StreamOptions | None = None
    n: Integer | None = None
    seed: Integer | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: list[Integer] | None = None
    ignore_eos: Boolean | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Integer | None = None
    min_p: Number | None = None
    max_tokens: Integer | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[Text, Number] | None = None
    metadata: Metadata | None = None


class FunctionCall(RequestParameters):
    """A call of a function; ``arguments`` are JSON."""

    name: Text
    arguments: Text


class ToolCallPart(RequestParameters):
    """A tool call in an assistant's message."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Integer | None = None


class TextPart(RequestParameters):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class ChatMessage(RequestParameters):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    tool_calls: list[ToolCallPart] | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = None
    annotations: list[Any] | None = None


class FunctionTool(RequestParameters):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Boolean | None = None


class Tool(RequestParameters):
    """A tool."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(RequestParameters):
    """The name of a function."""

    name: Text


class NamedTool(RequestParameters):
    """A tool that the model must call."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(RequestParameters):
    """A JSON schema that an answer must follow."""

    name: Text
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: Boolean | None = None


class ResponseFormat(RequestParameters):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(SamplingParameters):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Integer | None = None
    logprobs: Boolean | None = None
    top_logprobs: Integer | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Boolean | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Text | None = None


Prompts = (
    Text
    | Annotated[list[Integer], Field(min_length=1)]
    | list[Text]
    | list[Annotated[list[Integer], Field(min_length=1)]]
)


class CompletionRequest(SamplingParameters):
    """POST /v1/completions."""

    prompt: Prompts
    best_of: Integer | None = None
    echo: Boolean | None = None
    logprobs: Integer | None = None


class EmbeddingRequest(RequestParameters):
    """POST /v1/embeddings."""

    model: Text
    adapters: list[AdapterWeight] | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Integer | None = None
    user: Text | None = None


class TokenizeRequest(RequestParameters):
    """POST /v1/tokenize: a text, or a conversation with the template of the model."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: Boolean = True
    add_special_tokens: Boolean = True
    return_token_strs: Boolean = False


class DetokenizeRequest(RequestParameters):
    """POST /v1/detokenize."""

    model: Text | None = None
    tokens: list[Integer]


class AdapterRequest(RequestParameters):
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter: a registered name, never a path."""

    lora_name: Text


class Hyperparameters(RequestParameters):
    """Hyperparameters of supervised fine-tuning."""

    batch_size: Literal["auto"] | Annotated[int, Field(strict=True, ge=1, le=4096)] | None = None
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(strict=True, gt=0, le=1000)] | None = None
    n_epochs: Literal["auto"] | Annotated[int, Field(strict=True, ge=1, le=10_000)] | None = None


class SupervisedOptions(RequestParameters):
    """Options of supervised fine-tuning."""

    hyperparameters: Hyperparameters | None = None


class FineTuningMethod(RequestParameters):
    """The method of fine-tuning."""

    type: Literal["supervised"]
    supervised: SupervisedOptions | None = None


class JobRequest(RequestParameters):
    """POST /v1/fine_tuning/jobs. ``adapter`` and ``training`` take options of ``veneer train`` (`veneer.serve.jobs.options`)."""

    model: Text
    training_file: Text
    validation_file: Text | None = None
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    seed: Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None
    method: FineTuningMethod | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    adapter: dict[str, Any] | None = None
    training: dict[str, Any] | None = None


class PageQuery(RequestParameters):
    """The part of a list that is asked for."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20


class FilesQuery(RequestParameters):
    """The part of the list of files that is asked for."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None
