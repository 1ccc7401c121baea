"""The master's step loop: requests in, steps round the ring, tokens out.

One thread owns the scheduler, rank 0's shard and the wire; callers meet it in its inbox and in their sinks.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from distllm.core import EngineError, Plan, Step
from distllm.engine.delivery import Delivery
from distllm.engine.pace import Pace
from distllm.engine.pipeline import Done, Pipeline
from distllm.engine.stats import Stats
from distllm.net.wire import WireBroken
from distllm.plan.blocks import BlockPool
from distllm.plan.partition import counted
from distllm.plan.scheduler import Scheduler

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 10.0


class Rings(Protocol):
    """Who makes the rings that the master runs; see `Job`."""

    def on_news(self, notify: Callable[[], None]) -> None: ...
    def next_plan(self) -> Plan | None: ...
    def change(self, plan: Plan, pipeline: Pipeline) -> Pipeline: ...
    def recover(self, broken: Exception, pipeline: Pipeline, since: float) -> Pipeline: ...


@dataclass(frozen=True, slots=True)
class Cancel:
    """The caller of a request does not want it any more."""

    request: int


@dataclass(frozen=True, slots=True)
class News:
    """Ranks have come, want to go, or are ready for a new plan."""


class Master:
    """Runs the requests of one model on one pipeline until it is closed or the pipeline breaks.

    Attributes:
        failure: why it has ended; None while it runs.
    """

    def __init__(self, pipeline: Pipeline, scheduler: Scheduler, prompt_chunk: int, rings: Rings) -> None:
        self.pipeline = pipeline
        self._rings = rings
        self._scheduler = scheduler
        self._pace = Pace(prompt_chunk, pipeline.deadline_s)
        scheduler.set_prompt_chunk(self._pace.chunk)
        self._inbox: queue.SimpleQueue[Delivery | Cancel | News | None] = queue.SimpleQueue()
        self._deliveries: dict[int, Delivery] = {}
        self._closing = False
        self._news = True
        self._next_plan: Plan | None = None
        self._broken_at: float | None = None
        self._lock = threading.Lock()
        self.failure: EngineError | None = None
        self._end_heard: Callable[[], None] = lambda: None
        self.stats = Stats()
        rings.on_news(lambda: self._inbox.put(News()))
        self._thread = threading.Thread(target=self._run, name="distllm-master", daemon=True)
        self._thread.start()

    def load(self) -> dict[str, object]:
        """What waits, runs and is held now."""
        scheduler = self._scheduler
        return {
            "requests": scheduler.waiting + scheduler.running,
            "running": scheduler.running,
            "kv_blocks": self.pipeline.kv_blocks,
            "kv_blocks_used": scheduler.kv_blocks_used,
            "kv_blocks_kept": scheduler.kv_blocks_kept,
            "prefix_hits": scheduler.prefix_hits,
            "prefix_tokens": scheduler.prefix_tokens,
            "preemptions": scheduler.preemptions,
        }

    def submit(self, delivery: Delivery) -> None:
        """Queues a request; its pieces, or the error that ends it, go to its sink.

        Raises:
            EngineError: the engine has ended.
        """
        with self._lock:
            if self.failure is not None:
                raise self.failure
            self._inbox.put(delivery)

    def on_end(self, told: Callable[[], None]) -> None:
        """Has somebody told, from the engine's thread, when the engine has ended; at once if it has."""
        with self._lock:
            self._end_heard = told
            ended = self.failure is not None
        if ended:
            told()

    def cancel(self, request: int) -> None:
        """Ends a request early; its sink hears no more."""
        self._inbox.put(Cancel(request))

    def close(self) -> None:
        """Ends the epoch; what runs is given up."""
        self._inbox.put(None)
        self._thread.join(END_TIMEOUT_S + self.pipeline.deadline_s)
        self.pipeline.free()

    def _run(self) -> None:
        """The thread; this is the edge at which whatever ended the engine is told to every caller."""
        try:
            end = self._serve()
        except Exception as error:
            logger.exception("the master failed")
            end = EngineError(f"rank 0 failed: {type(error).__name__}: {error}")
        with self._lock:
            self.failure = end
            told = self._end_heard
        for delivery in (*self._deliveries.values(), *self._drain()):
            delivery.fail(end)
        self._deliveries.clear()
        told()

    def _serve(self) -> EngineError:
        """Runs until the engine is closed, or the ring breaks and cannot be replaced, and says which."""
        while True:
            torch.set_num_threads(self.pipeline.threads)
            try:
                try:
                    with self.pipeline:
                        self._loop()
                except WireBroken as broken:
                    self._go_on(broken)
                    continue
                if self._closing:
                    return EngineError("the engine is closed")
                self._change()
            except EngineError as end:
                return end

    def _go_on(self, broken: WireBroken) -> None:
        """A new ring in place of a broken one; every request waits again, with the tokens that it has.

        Raises:
            EngineError: there is none to be had.
        """
        began = time.monotonic()
        self._broken_at = self._broken_at or began
        self._next_plan = None
        self.pipeline = self._rings.recover(broken, self.pipeline, self._broken_at)
        self._rewind(f"the ring broke ({broken})")
        requests = counted(self._scheduler.waiting, "request")
        logger.warning("going on with %s after %.1f s", requests, time.monotonic() - began)
        self._news = True  # of those that came meanwhile

    def _change(self) -> None:
        """A new ring with ranks that have come, in place of one that has ended well.

        Raises:
            EngineError: a rank is lost meanwhile, and there is no ring without it.
        """
        began = time.monotonic()
        plan, self._next_plan = self._next_plan, None
        assert plan is not None, "the loop ends for a plan, or because it is closed"
        self.pipeline = self._rings.change(plan, self.pipeline)
        self._rewind("the plan has changed")
        logger.info("%s waited %.1f s", counted(self._scheduler.waiting, "request"), time.monotonic() - began)
        self._news = True

    def _rewind(self, reason: str) -> None:
        """Every request waits for the new ring; those that have more tokens than it has room for end."""
        pool, steps = BlockPool(self.pipeline.kv_blocks), self.pipeline.steps_in_flight
        for request in self._scheduler.rewind(pool, steps_in_flight=steps):
            room = f"there is KV room for {self.pipeline.kv_tokens} tokens left, and this request has more"
            self._deliveries.pop(request).fail(EngineError(f"{reason}; {room}"))
        self.stats.new_epoch()

    def _drain(self) -> Sequence[Delivery]:
        waiting = []
        while not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, Delivery):
                waiting.append(item)
        return waiting

    def _loop(self) -> None:
        while True:
            self._accept()
            if self._news and not self._closing:
                self._news = False
                self._next_plan = self._rings.next_plan()
                while self._next_plan and self.pipeline.in_flight:
                    self._collect()
            if self._closing or self._next_plan:
                return
            if (step := self._scheduler.next_step()) is not None:
                self.pipeline.send(self._constrained(step))
            elif self.pipeline.in_flight:
                self._collect()
            elif not self._scheduler.has_work:
                self._idle()

    def _accept(self) -> None:
        while not self._inbox.empty():
            self._take(self._inbox.get())

    def _idle(self) -> None:
        """Waits for work; from time to time a pulse shows that every stage is there."""
        try:
            self._take(self._inbox.get(timeout=self.pipeline.pulse_s))
        except queue.Empty:
            self.pipeline.pulse()
            self._broken_at = None

    def _take(self, item: Delivery | Cancel | News | None) -> None:
        match item:
            case None:
                self._closing = True
            case News():
                self._news = True
            case Cancel():
                if self._deliveries.pop(item.request, None) is not None:
                    self._scheduler.finish(item.request)
            case Delivery():
                if not self._scheduler.has_work:
                    self._broken_at = None
                self._deliveries[item.request.id] = item
                self._scheduler.add(item.request)

    def _collect(self) -> None:
        done = self.pipeline.receive()
        self._broken_at = None
        self.stats.add(tokens=len(done.tokens), ranks=self.pipeline.ranks, times=done.times, seconds=done.seconds)
        self._mind_the_deadline(done)
        sampled = [row.request for row in done.step.rows if row.samples]
        logprobs = {sampled[place]: logprob for place, logprob in done.logprobs}
        for commit in self._scheduler.commit(done.step.id, done.tokens):
            delivery = self._deliveries[commit.request]
            logprob = logprobs.get(commit.request)
            stopped = delivery.push(commit.token, commit.finish_reason, logprob, reused=commit.reused)
            if stopped:
                self._scheduler.finish(commit.request)
            if stopped or commit.finish_reason is not None:
                del self._deliveries[commit.request]

    def _constrained(self, step: Step) -> Step:
        """The step with what the grammars of its requests allow."""
        sampling = [row.request for row in step.rows if row.samples]
        masks = {request: mask for request in sampling if (mask := self._deliveries[request].allowed())}
        if not masks:
            return step
        return replace(step, rows=tuple(replace(row, allowed=masks.get(row.request, b"")) for row in step.rows))

    def _mind_the_deadline(self, done: Done) -> None:
        if done.step.has_prompt and self._pace.see(done.step.tokens, done.seconds):
            logger.warning("a step took %.1f s; prompts now go in chunks of %d", done.seconds, self._pace.chunk)
        self._scheduler.set_prompt_chunk(self._pace.chunk)
