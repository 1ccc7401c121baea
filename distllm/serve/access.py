"""Who asked for what and what came of it: an id for each request, a line in the log, counts. The outermost layer."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distllm import logs
from distllm.serve.calls import usage
from distllm.serve.metrics import Metrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from distllm.serve.exchange import Exchange

logger = logging.getLogger(__name__)

CLIENT_GONE = 499  # nginx's; nobody reads it
OTHER = "other"
LONGEST_PATH = 200
SANE = re.compile(rb"[\x21-\x7e]{1,128}")


@dataclass(slots=True)
class Told:
    """What of an answer has been sent; as long as nothing of it has, whoever asked may have gone."""

    status: int = CLIENT_GONE
    streams: bool = False
    whole: bool = False


class Access:
    """Counts and logs requests, and gives each an id: the client's `X-Request-Id`, or one of ours.

    A route that answers by an exchange says so in `scope["exchange"]`.

    Args:
        endpoints: the paths that are counted by their names.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, endpoints: Collection[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._endpoints = frozenset(endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, told, began = _request_id(scope["headers"]), Told(), time.monotonic()

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                told.status = message["status"]
                headers = list(message.get("headers", ()))
                told.streams = any(
                    name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
                )
                message = {**message, "headers": [*headers, (b"x-request-id", request.encode())]}
            elif message["type"] == "http.response.body":
                told.whole = not message.get("more_body", False)
                if told.streams and message.get("body"):
                    self._metrics.stream_events.inc()
            await send(message)

        with logs.about(request):
            try:
                await self._app(scope, receive, tell)
            finally:
                status = told.status if told.whole else CLIENT_GONE
                self._note(scope, status, time.monotonic() - began)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        endpoint = scope["path"] if scope["path"] in self._endpoints else OTHER
        self._metrics.requests.labels(endpoint, str(status)).inc()
        self._metrics.request_seconds.labels(endpoint).observe(seconds)
        method, path = scope["method"], scope["raw_path"].decode("ascii", "replace")[:LONGEST_PATH]
        line = {"method": method, "path": path, "status": status, "seconds": round(seconds, 3)}
        tokens = ""
        exchange: Exchange | None = scope.get("exchange")
        if exchange is not None:
            prompt, completion = usage(exchange.calls, exchange.about.choices)
            tokens = f", {prompt} + {completion} tokens"
            line |= {"answer": exchange.name, "prompt_tokens": prompt, "completion_tokens": completion}
        logger.info("%s %s: %d after %.3f s%s", method, path, status, seconds, tokens, extra=logs.fields(**line))


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    return given.decode("ascii") if SANE.fullmatch(given) else f"req-{uuid.uuid4().hex}"
