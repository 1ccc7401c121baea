"""What a monitoring system is told: counts and times of the front, which outlives rank 0, in Prometheus' format.

Knows no HTTP. Names of series have no client and no request in them: there are as many as ranks and kinds of things.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from distllm.core import Fault
from distllm.serve.calls import Call, usage
from distllm.serve.messages import Grown

if TYPE_CHECKING:
    from distllm.serve.exchange import Exchange
    from distllm.serve.ledger import Ledger
    from distllm.serve.rank0 import Rank0

Key = TypeVar("Key", bound=Hashable)
Outcome = Literal["stop", "length", "refused", "failed", "timeout", "left"]
"""How an answer ends: whole, for one of two reasons; not accepted; given up because of the ranks, because it took too
long, or because nobody wanted it any more."""

FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2)
REQUEST_S = (0.01, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

COUNTED = {
    "steps": "Steps that came home: passes of a batch through all stages",
    "epochs": "Rings that were formed; each loss, each newcomer and each change of the plan makes another one",
    "preemptions": "Running answers whose KV was given to older ones; they wait and go on",
    "prefix_hits": "Prompts whose beginning had its KV already",
    "prefix_tokens": "Prompt tokens whose KV was there already",
}
"""What rank 0 counts, by its name in `LLM.stats`."""

SPENT = {
    "busy_s": ("stage_busy_seconds", "Time that the rank's stage computed"),
    "wait_s": ("stage_wait_seconds", "Time that the rank's stage waited for a frame of a step"),
    "sent_bytes": ("stage_sent_bytes", "Frames that the rank's stage sent to the next one, without TCP's own bytes"),
}
"""The same of each rank, of what `LLM.stats` calls spent."""


class Growth(Generic[Key]):
    """How much counts have grown that begin anew with each life of whoever counts."""

    def __init__(self) -> None:
        self._last: dict[Key, float] = {}

    def new_life(self) -> None:
        """Who counts has been started again: what comes next is counted from 0."""
        self._last = {}

    def of(self, key: Key, count: float) -> float:
        """Since the last time, of a count as it is now; never less than 0."""
        grown = max(0, count - self._last.get(key, 0))
        self._last[key] = count
        return grown


@dataclass(slots=True)
class Timed:
    """When an answer was asked for and when its first piece came, and the tokens that came after that."""

    asked: float
    first: float | None = None
    tokens: int = 0


class Metrics:
    """All series of one server, in a registry of their own.

    Attributes:
        requests: by path and status.
        request_seconds: by path.
        stream_events: pieces of streams that were sent.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"distllm_{name}", about, labels, registry=registry)

        def histogram(name: str, about: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"distllm_{name}", about, labels, buckets=buckets, registry=registry)

        self.requests = counter("http_requests", "HTTP requests", "endpoint", "status")
        self.request_seconds = histogram(
            "http_request_seconds", "From a request's head to the end of its answer", REQUEST_S, "endpoint"
        )
        self.stream_events = counter("stream_events", "Server-sent events")
        self._answers = counter("answers", "Answers that have ended", "outcome")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts of accepted requests")
        self._completion_tokens = counter("completion_tokens", "Tokens of answers, as they come from rank 0")
        self._first_token = histogram(
            "time_to_first_token_seconds", "From a request to the first piece of each answer", FIRST_TOKEN_S
        )
        self._token = histogram(
            "time_per_output_token_seconds", "Of whole answers: mean time from one token to the next", TOKEN_S
        )
        self._faults = counter("faults", "Ranks that were lost, and rings that broke otherwise", "kind")
        self._comings = counter("rank0_comings", "Times that rank 0 has come up")
        for fault in get_args(Fault):
            self._faults.labels(fault)
        for outcome in get_args(Outcome):
            self._answers.labels(outcome)
        self._counted = {name: counter(name, about) for name, about in COUNTED.items()}
        self._spent = {key: counter(name, about, "rank", "host") for key, (name, about) in SPENT.items()}
        self._growth: Growth[tuple[str, str | int]] = Growth()
        self._hosts: dict[int, str] = {}
        self._timed: WeakKeyDictionary[Call, Timed] = WeakKeyDictionary()

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)

    def watch(self, rank0: Rank0, ledger: Ledger) -> None:
        """Looks up what is so at the moment whenever somebody asks."""

        def told(key: str) -> int:
            return rank0.stats.get(key, 0) if rank0.ready else 0

        def running() -> int:
            return min(told("running"), rank0.calls)  # what it told is a second old

        looks: dict[str, tuple[str, Callable[[], float]]] = {
            "ready": ("1 if answers are given at once, 0 while rank 0 loads", lambda: rank0.ready),
            "answers_in_flight": ("Answers that are waited for", lambda: rank0.calls),
            "answers_running": ("Those that are in steps", running),
            "answers_waiting": ("Those that are not", lambda: rank0.calls - running()),
            "kv_blocks_used": ("Blocks of KV memory that answers hold", lambda: told("kv_blocks_used")),
            "kv_blocks_kept": (
                "Blocks of KV memory that are kept of ended answers, and given up when others need them",
                lambda: told("kv_blocks_kept"),
            ),
            "kv_blocks": ("Blocks of KV memory that there are", lambda: told("kv_blocks")),
            "journal_bytes": ("What the journal takes on disk", lambda: ledger.nbytes),
        }
        for name, (about, look) in looks.items():
            Gauge(f"distllm_{name}", about, registry=self._registry).set_function(look)

    # What the front sees.

    def begun(self, calls: Iterable[Call]) -> None:
        """Somebody has asked for these."""
        now = time.monotonic()
        for call in calls:
            self._timed[call] = Timed(now)

    def accepted(self, exchange: Exchange) -> None:
        """It is in the journal, and will be answered."""
        self._prompt_tokens.inc(usage(exchange.calls, exchange.about.choices)[0])

    def grown(self, pieces: Iterable[tuple[Call, Grown]]) -> None:
        """These have come from rank 0. Times are of answers that this process has seen from the beginning."""
        now = time.monotonic()
        for call, piece in pieces:
            self._completion_tokens.inc(len(piece.tokens))
            if (timed := self._timed.get(call)) is None:
                continue
            if timed.first is None:
                timed.first = now
                self._first_token.observe(now - timed.asked)
                continue
            timed.tokens += len(piece.tokens)
            if piece.finish_reason is not None and timed.tokens:
                self._token.observe((now - timed.first) / timed.tokens)

    def ended(self, calls: Iterable[Call], outcome: Outcome) -> None:
        """No more of these will come; `outcome` is that of those that are not whole."""
        for call in calls:
            self._answers.labels(call.finish_reason or outcome).inc()

    # What becomes of rank 0, and what it tells.

    def rank0_came(self) -> None:
        """It counts from 0."""
        self._comings.inc()
        self._growth.new_life()

    def rank0_told(self, stats: Mapping[str, Any]) -> None:
        """Takes its counts; see `LLM.stats`."""
        for name, counter in self._counted.items():
            counter.inc(self._growth.of(("counted", name), stats.get(name, 0)))
        for kind, count in stats["faults"].items():
            self._faults.labels(kind).inc(self._growth.of(("faults", kind), count))
        for each in stats["ranks"]:
            if each["host"] is not None:  # else the rank has just gone
                self._place(each["rank"], each["host"])
        for each in stats["spent"]:
            rank = each["rank"]
            for key, counter in self._spent.items():
                counter.labels(str(rank), self._hosts.get(rank, "")).inc(self._growth.of((key, rank), each[key]))

    def _place(self, rank: int, host: str) -> None:
        """Where a rank is now. A rank has the series of one host, or there would be more of them with every move."""
        before = self._hosts.get(rank)
        if before is not None and before != host:
            for counter in self._spent.values():
                with suppress(KeyError):  # it had done nothing
                    counter.remove(str(rank), before)
        self._hosts[rank] = host

    def rank0_ended(self, code: int) -> None:
        """Its process has, and is started again."""
        self._faults.labels("killed" if code < 0 else "exited").inc()
