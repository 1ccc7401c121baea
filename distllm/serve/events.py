"""What happened to the server and its ranks, as the live page tells it: the newest of it, in memory alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from distllm.engine import chronicle

Kind = (
    chronicle.Kind
    | Literal[
        "started",  # the server, or rank 0
        "ready",  # the model is loaded
        "ended",  # rank 0
        "failed",  # a request
    ]
)
KEPT = 200


@dataclass(frozen=True, slots=True)
class Event:
    """One of them. Ids count from 1; `time` is in seconds since 1970."""

    id: int
    time: float
    kind: Kind
    text: str


class Events:
    """The newest of what the front has seen itself, and of what rank 0 tells of the ranks."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=KEPT)
        self._count = 0
        self._heard = 0

    def add(self, kind: Kind, text: str, at: float | None = None) -> None:
        """Something has happened, now if no time is given."""
        self._count += 1
        self._events.append(Event(self._count, time.time() if at is None else at, kind, text))

    def hear(self, happenings: Iterable[Mapping[str, Any]]) -> None:
        """What rank 0 tells again and again of the ranks; what it told before is left out."""
        for each in happenings:
            if each["number"] > self._heard:
                self._heard = each["number"]
                self.add(each["kind"], each["text"], each["time"])

    def forget_rank0(self) -> None:
        """There will be another rank 0, which counts from the beginning."""
        self._heard = 0

    def told(self) -> list[dict[str, object]]:
        """As plain values, the oldest first."""
        return [asdict(each) for each in self._events]
