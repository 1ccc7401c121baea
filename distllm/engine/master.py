"""The master's step loop: requests in, steps round the ring, tokens out.

One thread owns the scheduler, rank 0's shard and the wire; callers meet it in its inbox and in their sinks.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from distllm.core import EngineError
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

Recover = Callable[[Exception, Pipeline, float], Pipeline]
"""Makes a new ring in place of a broken one; the last is the time of the first break after which nothing came home."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """The caller of a request does not want it any more."""

    request: int


class Master:
    """Runs the requests of one model on one pipeline until it is closed or the pipeline breaks."""

    def __init__(self, pipeline: Pipeline, scheduler: Scheduler, prompt_chunk: int, recover: Recover) -> None:
        self.pipeline = pipeline
        self._recover = recover
        self._scheduler = scheduler
        self._pace = Pace(prompt_chunk, pipeline.deadline_s)
        scheduler.set_prompt_chunk(self._pace.chunk)
        self._inbox: queue.SimpleQueue[Delivery | Cancel | None] = queue.SimpleQueue()
        self._deliveries: dict[int, Delivery] = {}
        self._closing = False
        self._broken_at: float | None = None
        self._lock = threading.Lock()
        self._failure: EngineError | None = None
        self.stats = Stats()
        self._thread = threading.Thread(target=self._run, name="distllm-master", daemon=True)
        self._thread.start()

    def load(self) -> dict[str, object]:
        """What waits, runs and is held now."""
        scheduler = self._scheduler
        return {
            "requests": scheduler.waiting + scheduler.running,
            "kv_blocks_used": scheduler.kv_blocks_used,
            "preemptions": scheduler.preemptions,
        }

    def submit(self, delivery: Delivery) -> None:
        """Queues a request; its pieces, or the error that ends it, go to its sink.

        Raises:
            EngineError: the engine has ended.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._inbox.put(delivery)

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
            self._failure = end
        for delivery in (*self._deliveries.values(), *self._drain()):
            delivery.fail(end)
        self._deliveries.clear()

    def _serve(self) -> EngineError:
        """Runs until the engine is closed, or the ring breaks and cannot be replaced, and says which."""
        while True:
            torch.set_num_threads(self.pipeline.threads)
            try:
                with self.pipeline:
                    self._loop()
                return EngineError("the engine is closed")
            except WireBroken as broken:
                try:
                    self._go_on(broken)
                except EngineError as end:
                    return end

    def _go_on(self, broken: WireBroken) -> None:
        """A new ring in place of a broken one; every request waits again, with the tokens that it has.

        Raises:
            EngineError: there is none to be had.
        """
        began = time.monotonic()
        self._broken_at = self._broken_at or began
        self.pipeline = self._recover(broken, self.pipeline, self._broken_at)
        pool, steps = BlockPool(self.pipeline.kv_blocks), self.pipeline.steps_in_flight
        for request in self._scheduler.rewind(pool, steps_in_flight=steps):
            room = f"there is KV room for {self.pipeline.kv_tokens} tokens left, and this request has more"
            self._deliveries.pop(request).fail(EngineError(f"the ring broke ({broken}); {room}"))
        self.stats.new_epoch()
        requests = counted(self._scheduler.waiting, "request")
        logger.warning("going on with %s after %.1f s", requests, time.monotonic() - began)

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
            if self._closing:
                return
            if (step := self._scheduler.next_step()) is not None:
                self.pipeline.send(step)
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

    def _take(self, item: Delivery | Cancel | None) -> None:
        match item:
            case None:
                self._closing = True
            case Cancel():
                if self._deliveries.pop(item.request, None) is not None:
                    self._scheduler.finish(item.request)
            case Delivery():
                self._deliveries[item.request.id] = item
                self._scheduler.add(item.request)

    def _collect(self) -> None:
        done = self.pipeline.receive()
        self._broken_at = None
        self.stats.add(tokens=len(done.tokens), times=done.times, seconds=done.seconds)
        self._mind_the_deadline(done)
        for commit in self._scheduler.commit(done.step.id, done.tokens):
            delivery = self._deliveries[commit.request]
            stopped = delivery.push(commit.token, commit.finish_reason)
            if stopped:
                self._scheduler.finish(commit.request)
            if stopped or commit.finish_reason is not None:
                del self._deliveries[commit.request]

    def _mind_the_deadline(self, done: Done) -> None:
        if done.step.has_prompt and self._pace.see(done.step.tokens, done.seconds):
            logger.warning("a step took %.1f s; prompts now go in chunks of %d", done.seconds, self._pace.chunk)
        self._scheduler.set_prompt_chunk(self._pace.chunk)
