"""How log lines look on standard error, for people or as JSON for machines, and which HTTP request they are about."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

TEXT, JSON = "text", "json"

_request: ContextVar[str | None] = ContextVar("request", default=None)


@contextmanager
def about(request: str) -> Iterator[None]:
    """Lines that are logged meanwhile, here and by tasks that begin here, are about this request."""
    before = _request.set(request)
    try:
        yield
    finally:
        _request.reset(before)


class TextLines(logging.Formatter):
    """A sentence, behind a prefix; the request that it is about in brackets."""

    def __init__(self, prefix: str) -> None:
        super().__init__(f"{prefix}%(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        line = super().formatMessage(record)
        return line if (request := _request.get()) is None else f"{line} [{request}]"


class JsonLines(logging.Formatter):
    """One JSON object a line. What a record was given as `fields`, by `extra`, is part of it.

    Args:
        rank: of this process, if it is one.
    """

    def __init__(self, rank: int | None) -> None:
        super().__init__()
        self._whose = {"pid": os.getpid()} if rank is None else {"pid": os.getpid(), "rank": rank}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._whose,
        }
        if (request := _request.get()) is not None:
            line["request"] = request
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(level: str, form: str, *, rank: int | None, prefix: str = "") -> None:
    """Sets logging up, once in a process: lines of distllm from `level` on, of others from warnings on.

    Args:
        form: TEXT or JSON.
        rank: of this process, if it is one.
        prefix: of lines of text.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(rank) if form == JSON else TextLines(prefix))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(form == JSON)
    logging.getLogger("distllm").setLevel(level.upper())


def form() -> str:
    """The one that this process logs in."""
    return JSON if any(isinstance(each.formatter, JsonLines) for each in logging.getLogger().handlers) else TEXT


def complain(sentence: str) -> None:
    """Tells the user why something ends, whatever is logged."""
    if form() == JSON:
        logging.getLogger("distllm").error("%s", sentence)
    else:
        print(f"distllm: error: {sentence}", file=sys.stderr)


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """What a line of JSON has besides its sentence: `logger.info("...", extra=fields(path=...))`."""
    return {"fields": values}
