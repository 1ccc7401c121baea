"""The ring as the master uses it: steps in, tokens out, rank 0's own stage included.

Knows steps, not requests. With one stage there is no wire; all else is the same.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from distllm.core import Logprob, Step
from distllm.engine import inquest
from distllm.engine.cluster import Cluster, Verdict
from distllm.engine.loading import Loaded
from distllm.engine.worker import Outbox
from distllm.model.runner import Runner
from distllm.net import frame as frames
from distllm.net.frame import Frame, Kind, StageTime
from distllm.net.wire import Wire

PULSES_PER_DEADLINE = 4
# A rank that dies while the ring is idle is noticed at the next pulse, however long the deadline.
PULSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Done:
    """A step that came home, with what each stage spent on it and the seconds since it left.

    `logprobs` are of some of the tokens, by their places among them.
    """

    step: Step
    tokens: tuple[int, ...]
    logprobs: tuple[tuple[int, Logprob], ...]
    times: tuple[StageTime, ...]
    seconds: float


class Pipeline:
    """One epoch of one model, seen from rank 0. Leaving it as a context ends the epoch on every rank.

    Attributes:
        ranks: of the stages, in ring order.
    """

    def __init__(self, loaded: Loaded, wire: Wire | None, cluster: Cluster | None) -> None:
        self._runner: Runner | None = loaded.runner
        self._dtype = loaded.runner.shard.dtype
        self.ranks = [stage.rank for stage in loaded.order.plan.stages]
        self._wire = wire
        self._cluster = cluster
        self._outbox = Outbox(loaded.frame_bytes)
        self._flying: deque[tuple[Step, StageTime, float]] = deque()
        self._home: deque[Done] = deque()
        self._last_step = -1
        self.epoch = loaded.order.epoch
        self.threads = loaded.order.threads
        engine = loaded.order.engine
        self.kv_tokens = loaded.order.plan.kv_tokens
        self.kv_blocks = loaded.order.plan.kv_tokens // engine.block_tokens
        # More steps than the ring has stages would stand still.
        self.steps_in_flight = min(engine.steps_in_flight or len(self.ranks), len(self.ranks))
        self.deadline_s = loaded.order.deadline_s
        self.read_bytes = loaded.read_bytes
        self.held_bytes = loaded.runner.shard.nbytes
        self.pulse_s = min(PULSE_S, self.deadline_s / PULSES_PER_DEADLINE) if wire else None

    @property
    def in_flight(self) -> int:
        return len(self._flying) + len(self._home)

    def send(self, step: Step) -> None:
        """Runs rank 0's part of a step and sends it on.

        Raises:
            WireBroken: the ring is gone.
        """
        began = time.perf_counter()
        assert self._runner is not None, "the epoch has ended"
        result = self._runner.run(step, None)
        sent = self._wire.take_sent() if self._wire else 0
        spent = StageTime(0.0, result.body_seconds, result.head_seconds, sent)
        if self._wire is None:
            seconds = time.perf_counter() - began
            self._home.append(Done(step, tuple(result.tensor.tolist()), result.logprobs, (spent,), seconds))
            return
        frame = Frame(kind=Kind.STEP, step=step, times=(spent,), hidden=result.tensor.cpu())
        self._wire.send(self._outbox.write(frame))
        self._flying.append((step, spent, began))

    def receive(self) -> Done:
        """The oldest step in flight, when it comes home.

        Raises:
            WireBroken: the ring is gone.
        """
        if self._wire is None:
            return self._home.popleft()
        step, _, began = self._flying.popleft()
        waited = time.perf_counter()
        frame = self._next_frame()
        now = time.perf_counter()
        assert frame.step.id == step.id, f"step {frame.step.id} came home before step {step.id}"
        self._last_step = step.id
        times = (replace(frame.times[0], wait=now - waited), *frame.times[1:])
        return Done(step, frame.tokens, frame.logprobs, times, now - began)

    def pulse(self) -> None:
        """Sends a sign of life round the idle ring and waits for it.

        Raises:
            WireBroken: the ring is gone.
        """
        if self._wire is not None:
            self._wire.send(self._outbox.write(Frame(kind=Kind.PULSE)))
            self._next_frame()

    def _next_frame(self) -> Frame:
        assert self._wire is not None
        return frames.decode(self._wire.receive(), self._dtype)

    def verdict(self, broken: Exception) -> Verdict:
        """Who broke the ring."""
        assert self._cluster is not None, "one rank alone has no ring to break"
        return inquest.verdict(self._cluster, broken, self.ranks, self._last_step)

    def free(self) -> None:
        """Forgets what rank 0 ran the epoch with, after it has ended."""
        self._runner = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets the steps in flight come home, then sends the end round; after an error just closes."""
        if self._wire is None:
            return
        try:
            if kind is None:
                while self._flying:
                    self.receive()
                self._wire.send(self._outbox.write(Frame(kind=Kind.END)))
                self._next_frame()
        finally:
            self._wire.close()
