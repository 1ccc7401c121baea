"""OpenAI's API over HTTP: requests into calls of rank 0, their pieces into answers or events."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.routing import Route

from distllm.serve import answers, document, page, tools
from distllm.serve.access import CLIENT_GONE
from distllm.serve.answers import Answer
from distllm.serve.calls import Call, Deadly, Refusal, TooLate, Unavailable
from distllm.serve.exchange import About, Exchange, Exchanges, Full
from distllm.serve.messages import Prompt
from distllm.serve.schema import ChatRequest, CompletionRequest, Generation

DEADLY = "rank0_died"
KEEP_ALIVE_S = 15.0
RETRY_AFTER_S = 1


class Problem(Exception):
    """An answer other than 200, in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Server:
    """What the routes share.

    Args:
        model: the name that the model is asked for by.
    """

    def __init__(self, exchanges: Exchanges, *, model: str) -> None:
        self.exchanges = exchanges
        self.model = model
        self.began = int(time.time())

    @property
    def ready(self) -> bool:
        """Whether requests are answered at once."""
        return self.exchanges.rank0.ready

    def models(self) -> dict[str, Any]:
        listed = {"id": self.model, "object": "model", "created": self.began, "owned_by": "distllm"}
        return {"object": "list", "data": [listed]}

    def cluster(self) -> dict[str, Any]:
        """The ranks, what they hold and how they spend their time, and what is asked of them."""
        rank0 = self.exchanges.rank0
        now = {"model": self.model, "ready": rank0.ready, "rank0_comings": rank0.comings}
        now |= {"unfinished": self.exchanges.count, "in_flight": self.exchanges.in_flight()}
        told = {name: value for name, value in rank0.stats.items() if name != "happenings"}  # they are among the events
        return now | told | {"events": rank0.events.told()}

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        messages = tools.told([message.plain() for message in asked.messages], asked.usable_tools)
        return await self._answer(asked, "chat", [messages], request)

    async def complete(self, asked: CompletionRequest, request: Request) -> Response:
        return await self._answer(asked, "text", _prompts(asked.prompt), request)

    async def _answer(self, asked: Generation, shape: str, prompts: Sequence[Prompt], request: Request) -> Response:
        if asked.model != self.model:
            why = f"there is no model {asked.model!r} here, but {self.model!r}"
            raise Problem(404, why, param="model", code="model_not_found")
        if asked.stream_options is not None and not asked.stream:
            raise Problem(400, "stream_options are for stream=true", param="stream_options")
        client = request.scope["client_name"]
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        about = About(
            shape=shape,
            created=int(time.time()),
            client=client,
            digest=hashlib.sha256(await request.body()).hexdigest(),
            stream=bool(asked.stream),
            usage=usage,
            tools=bool(asked.usable_tools),
            choices=asked.n or 1,
        )
        heard: list[int] = []
        if (last := request.headers.get("last-event-id")) is not None:
            exchange, heard = self._resumed(last, about)
        else:
            exchange = self._begun(asked, about, prompts, request.headers.get("idempotency-key"))
        request.scope["exchange"] = exchange
        return await self._told(exchange, heard or [0] * len(exchange.calls), request)

    def _resumed(self, last: str, about: About) -> tuple[Exchange, list[int]]:
        """What a stream was of that broke, and what its client has of it."""
        name, _, counts = last.partition(":")
        exchange = self.exchanges.find(name)
        heard = [int(count) for count in counts.split(",") if count.isdecimal() and len(count) < 10]
        if exchange is None or exchange.about.client != about.client or len(heard) != len(exchange.calls):
            raise Problem(404, "Last-Event-ID: there is no such answer, or not any more", code="not_found")
        if any(count > len(call.pieces) for count, call in zip(heard, exchange.calls, strict=True)):
            raise Problem(400, "Last-Event-ID: is of more than has been told")
        return exchange, heard

    def _begun(self, asked: Generation, about: About, prompts: Sequence[Prompt], key: str | None) -> Exchange:
        """A new exchange, unless its client has given the key before."""
        if key:
            key = json.dumps([about.client, key])
            before = self.exchanges.find_key(key)
            if before is not None and before.about.digest != about.digest:
                raise Problem(409, "Idempotency-Key: was used for another request", code="idempotency_key_reused")
            if before is not None:
                return before
        name = f"{answers.SHAPES[about.shape].prefix}-{uuid.uuid4().hex}"
        calls: list[Call] = []
        try:
            params = asked.params()
        except (ValueError, RecursionError) as error:
            raise Problem(400, f"the request cannot be read: {error}") from error
        if (count := len(prompts) * about.choices) > self.exchanges.most_calls:
            raise Problem(400, f"{count} answers are asked for at once; here are {self.exchanges.most_calls} at most")
        for prompt in prompts:
            for choice in range(about.choices):  # they differ by their seeds
                seed = None if params.seed is None else (params.seed + choice) % 2**63
                calls.append(Call(f"{name}/{len(calls)}", about.client, prompt, replace(params, seed=seed)))
        exchange = Exchange(name, about, calls, key or None)
        self.exchanges.begin(exchange)
        return exchange

    async def _told(self, exchange: Exchange, heard: list[int], request: Request) -> Response:
        about = exchange.about
        shape = answers.SHAPES[about.shape]
        answer = shape(exchange.name, self.model, about)
        if about.stream:
            with suppress(TimeoutError), self.exchanges.followed(exchange):
                await asyncio.wait_for(asyncio.shield(exchange.accepted), KEEP_ALIVE_S)
            events = self._events(exchange, answer, heard)
            headers = {"Cache-Control": "no-cache", "X-Last-Event-ID": _event_id(exchange, heard)}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        with self.exchanges.followed(exchange):
            whole = asyncio.create_task(_whole(exchange))
            leaving = asyncio.create_task(_gone(request))
            try:
                await asyncio.wait((whole, leaving), return_when=asyncio.FIRST_COMPLETED)
                if not whole.done():
                    raise Problem(CLIENT_GONE, "the client has gone")
                whole.result()
                return JSONResponse(answer.whole(exchange.calls))
            finally:
                whole.cancel()
                leaving.cancel()

    async def _events(self, exchange: Exchange, answer: Answer, heard: list[int]) -> AsyncIterator[str]:
        """Server-sent events: the pieces of all answers as they come."""
        with self.exchanges.followed(exchange):
            try:
                for place, count in enumerate(heard):
                    for chunk in answer.begin(place) if count == 0 else ():
                        yield _event(chunk)
                    for piece in exchange.calls[place].pieces[:count]:
                        answer.chunk(place, piece)  # what it has told already, it goes on from
                async for each in exchange.pieces(heard, KEEP_ALIVE_S):
                    if each is None:
                        yield ": the ranks are at it\n"  # with an empty line, OpenAI's client takes it for an event
                        continue
                    place, piece = each
                    heard[place] += 1
                    yield _event(answer.chunk(place, piece), _event_id(exchange, heard))
                if exchange.about.usage:
                    yield _event(answer.usage_chunk(exchange.calls))
                yield "data: [DONE]\n\n"
            except (Refusal, Unavailable) as error:
                yield _event(_problem(error).body())


async def _whole(exchange: Exchange) -> None:
    await asyncio.shield(exchange.accepted)
    await exchange.whole()


async def _gone(request: Request) -> None:
    """Until whoever asked goes away."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


def _event_id(exchange: Exchange, heard: Sequence[int]) -> str:
    """That of the last event of a client that has so many pieces of each answer."""
    return f"{exchange.name}:{','.join(map(str, heard))}"


def _event(chunk: dict[str, Any], name: str | None = None) -> str:
    data = f"data: {json.dumps(chunk)}\n\n"
    return data if name is None else f"id: {name}\n{data}"


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> Sequence[Prompt]:
    if isinstance(given, str) or all(isinstance(each, int) for each in given):
        return [given]  # type: ignore[list-item]
    return given  # type: ignore[return-value]


def _problem(error: Exception) -> Problem:
    if isinstance(error, Refusal):
        return Problem(400, str(error))
    if isinstance(error, TooLate):
        return Problem(504, str(error), code="timeout")
    if isinstance(error, Deadly):
        return Problem(500, str(error), code=DEADLY)
    return Problem(503, str(error))


def make_app(server: Server) -> FastAPI:
    """The routes."""
    app = FastAPI(
        title="distllm",
        summary="OpenAI's API on the machines you have",
        docs_url=None,  # it would load its page from elsewhere
        redoc_url=None,
    )

    document.describe(app)
    page.add_to(app)

    @app.get("/health", summary="Does the front live?", operation_id="health", responses=document.HEALTH)
    async def health() -> Any:
        return {"status": "ok"}

    @app.get("/ready", summary="Are answers given at once?", operation_id="ready", responses=document.READY)
    async def ready() -> JSONResponse:
        if server.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "loading"}, 503, {"Retry-After": str(RETRY_AFTER_S)})

    @app.get("/v1/models", summary="The one that is served", operation_id="models", responses=document.MODELS)
    async def models() -> Any:
        return server.models()

    @app.get("/v1/cluster", summary="How the ranks do", operation_id="cluster", responses=document.CLUSTER)
    async def cluster() -> Any:
        return server.cluster()

    @app.get(
        "/metrics",
        summary="Counts and times, for Prometheus",
        operation_id="metrics",
        response_class=Response,
        responses=document.METRICS,
    )
    async def metrics() -> Response:
        return Response(server.exchanges.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post(
        "/v1/chat/completions",
        summary="Answers a conversation",
        operation_id="chat",
        response_model=None,
        responses=document.CHAT,
        openapi_extra=document.HEADERS,
    )
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await server.chat(asked, request)

    @app.post(
        "/v1/completions",
        summary="Continues prompts",
        operation_id="complete",
        response_model=None,
        responses=document.TEXT,
        openapi_extra=document.HEADERS,
    )
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        return await server.complete(asked, request)

    @app.exception_handler(Problem)
    async def told(_: Request, problem: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
        if problem.status in (429, 503):
            headers = {"Retry-After": str(RETRY_AFTER_S)}
        if problem.code == DEADLY:
            headers = {"X-Should-Retry": "false"}  # OpenAI's client would try again
        return JSONResponse(problem.body(), problem.status, headers)

    @app.exception_handler(Refusal)
    @app.exception_handler(Unavailable)
    async def refused(request: Request, error: Exception) -> JSONResponse:
        return await told(request, _problem(error))

    @app.exception_handler(Full)
    async def full(request: Request, error: Full) -> JSONResponse:
        return await told(request, Problem(429, f"{error}; try again soon", code="rate_limit_exceeded"))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return await told(request, Problem(400, f"{where}: {first['msg']}" if where else first["msg"], param=where))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:  # the server logs it
        return await told(request, Problem(500, f"the server failed: {type(error).__name__}"))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        return await told(request, Problem(error.status_code, str(error.detail)), error.headers)

    return app


def paths(app: FastAPI) -> list[str]:
    """Those of the routes."""
    return [route.path for route in app.routes if isinstance(route, Route)]
