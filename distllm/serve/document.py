"""The OpenAPI document: what the routes answer, and with which errors. Knows nothing of how they come by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field

Responses = dict[int | str, dict[str, Any]]

FINISH_REASONS = Literal["stop", "length", "tool_calls"]


class Told(BaseModel):
    """A part of an answer; it has these fields and no others."""

    model_config = ConfigDict(extra="forbid")


class Error(Told):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorAnswer(Told):
    """What went wrong, as OpenAI tells it."""

    error: Error


class PromptDetails(Told):
    cached_tokens: int = Field(description="tokens of the prompt that were not computed, since another began alike")


class Usage(Told):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class FunctionCall(Told):
    name: str
    arguments: str


class ToolCall(Told):
    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(Told):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class Likely(Told):
    token: str
    logprob: float
    bytes: list[int]


class LikelyToken(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(Told):
    content: list[LikelyToken]
    refusal: None


class ChatChoice(Told):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FINISH_REASONS


class ChatCompletion(Told):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(Told):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Told):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(Told):
    """The continuations of prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ListedModel(Told):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(Told):
    object: Literal["list"]
    data: list[ListedModel]


class Health(Told):
    status: Literal["ok"]


class Readiness(Told):
    status: Literal["ready", "loading"]


class Cluster(BaseModel):
    """How the ranks do; what `LLM.stats` tells comes with it once a model is loaded."""

    ready: bool
    rank0_comings: int = Field(description="how often rank 0 has come up")
    unfinished: int = Field(description="requests that are not answered yet")


TOO_LARGE = {413: "the body is too large, or its length is no number"}
SHUT = {401: "the server has API keys, and none of them was given"} | TOO_LARGE
REFUSALS = SHUT | {
    400: "the request cannot be read or answered",
    404: "the model, or the answer of Last-Event-ID, is not here",
    408: "the body did not come in time",
    409: "the Idempotency-Key was used for another request",
    429: "more answers are waited for than serve.max_queue allows",
    500: "the server failed, or the request makes rank 0 fail",
    503: "the ranks cannot answer now",
    504: "the answer takes longer than serve.request_timeout_s",
}
HEADERS = {
    "parameters": [
        {
            "name": "Idempotency-Key",
            "in": "header",
            "schema": {"type": "string"},
            "description": "what the client calls the request: it is not run twice",
        },
        {
            "name": "Last-Event-ID",
            "in": "header",
            "schema": {"type": "string"},
            "description": "the last event that a client has of a stream that broke: goes on from there",
        },
    ]
}


def _told(model: type[BaseModel], errors: Mapping[int, str], **more: Any) -> Responses:
    refused: Responses = {status: {"model": ErrorAnswer, "description": errors[status]} for status in sorted(errors)}
    return {200: {"model": model, "description": "it is told", **more}, **refused}


STREAMED = {
    "text/event-stream": {"schema": {"description": "server-sent events with stream=true: chunks, then [DONE]"}}
}

HEALTH = _told(Health, TOO_LARGE)
READY = _told(Readiness, TOO_LARGE) | {503: {"model": Readiness, "description": "rank 0 loads"}}
MODELS = _told(Models, SHUT)
CLUSTER = _told(Cluster, SHUT)
METRICS: Responses = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "in Prometheus' text format"},
    **{status: {"model": ErrorAnswer, "description": why} for status, why in sorted(SHUT.items())},
}
CHAT = _told(ChatCompletion, REFUSALS, content=STREAMED)
TEXT = _told(TextCompletion, REFUSALS, content=STREAMED)


def describe(app: FastAPI) -> None:
    """Has an app tell of itself what is true: no errors in FastAPI's own shape, and keys where there are some."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    whole = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    for path in whole["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # what cannot be read is a 400 here
            if "401" in operation["responses"]:
                operation["security"] = [{}, {"key": []}]
    components = whole["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return whole
