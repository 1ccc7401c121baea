"""What every rank but the master does: hold a shard, serve a ring, answer the master.

One loop in two states: out of the ring it takes orders from its inbox, in the ring it takes frames. The verbs are
called by RPC threads; they only drop an order into the inbox or read the snapshot, so they answer at any time.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from distllm.engine import host
from distllm.engine.loading import Kept, Loaded, load
from distllm.engine.orders import BEFORE_STEPS, JoinOrder, LoadOrder, Order, RestOrder, Status, StopOrder, UnloadOrder
from distllm.engine.reserve import Reserve
from distllm.model import pages
from distllm.net import frame as frames
from distllm.net.control import bury_here
from distllm.net.frame import Frame, Kind, StageTime
from distllm.net.group import AgentId
from distllm.net.node import Node
from distllm.net.wire import Wire, WireBroken

logger = logging.getLogger(__name__)


class Snapshot:
    """A worker's status, written by its loop and read by RPC threads.

    Orders are counted as they are taken and as they are carried out, so that the end of one is never taken for the end
    of the next, which may be in the inbox already.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._status = Status()
        self._progressed = time.monotonic()
        self._taken = 0
        self._carried_out = 0

    def take(self, epoch: int) -> bool:
        """An order has come; False if it is of an older epoch."""
        with self._lock:
            if epoch < self._status.epoch:
                return False
            self._taken += 1
            self._status = replace(self._status, epoch=epoch)
            self._progressed = time.monotonic()
            return True

    def carried_out(self, failure: str | None = None, *, ring_broke: bool = False) -> None:
        """The oldest order that was not carried out is, or has failed."""
        with self._lock:
            self._carried_out += 1
            self._status = replace(self._status, state="idle", failure=failure, ring_broke=ring_broke)
            self._progressed = time.monotonic()

    def note(self, **changes: object) -> None:
        """Changes some fields; doing so is progress."""
        with self._lock:
            self._status = replace(self._status, **changes)  # type: ignore[arg-type]
            self._progressed = time.monotonic()

    def read(self) -> Status:
        with self._lock:
            still = time.monotonic() - self._progressed
            status = replace(self._status, still_s=still, done=self._carried_out == self._taken)
        if not status.done:
            status = replace(status, failure=None, ring_broke=False)
        return replace(status, peak_bytes=host.peak_memory())

    def add_loaded(self, nbytes: int) -> None:
        with self._lock:
            self._status = replace(self._status, loaded_bytes=self._status.loaded_bytes + nbytes)
            self._progressed = time.monotonic()


class Worker:
    """The object of a rank that the master holds a reference to.

    Attributes:
        ring_broke: set when a ring breaks, for whoever wants to know why.
    """

    def __init__(self, rank: int, node: Node) -> None:
        self.rank = rank
        self.ring_broke = threading.Event()
        self._node = node
        self._inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._snapshot = Snapshot()
        self._loaded: Loaded | None = None
        self._kept: Kept | None = None
        self._reserve = Reserve(rank)

    # Verbs, called by the master.

    def load(self, order: LoadOrder) -> bool:
        return self._take(order, order.epoch)

    def join(self, order: JoinOrder) -> bool:
        return self._take(order, order.epoch)

    def reserve(self, order: LoadOrder) -> bool:
        """Loads another rank's part besides, whatever the loop does."""
        self._reserve.begin(order)
        return True

    def unload(self, epoch: int) -> bool:
        return self._take(UnloadOrder(epoch), epoch)

    def bury(self, dead: Sequence[AgentId]) -> bool:
        """Forgets ranks that are gone, so that others can come."""
        for each in dead:
            bury_here(each)
        return True

    def stop(self, code: int) -> bool:
        self._inbox.put(StopOrder(code))
        return True

    def status(self) -> Status:
        return replace(self._snapshot.read(), reserve=self._reserve.span, reserve_failure=self._reserve.failure)

    def rest(self) -> None:
        """Without a master: stops computing and gives its KV memory back; weights are kept for the next one.

        Raises:
            ConnectionError: the store is gone.
        """
        self._node.call_off(self._snapshot.read().epoch)
        self._inbox.put(RestOrder())

    def _take(self, order: Order, epoch: int) -> bool:
        """Drops an order into the inbox; one of an older epoch is refused."""
        taken = self._snapshot.take(epoch)
        if taken:
            self._inbox.put(order)
        return taken

    # The loop.

    def run(self) -> int:
        """Serves until it is told to stop; returns the exit code."""
        while True:
            order = self._inbox.get()
            match order:
                case StopOrder():
                    return order.code
                case LoadOrder():
                    self._do("loading", partial(self._load, order))
                case JoinOrder():
                    self._do("in the ring", partial(self._serve_ring, order))
                case UnloadOrder():
                    self._do("unloading", self._unload)
                case RestOrder():
                    self._keep()
                    self._reserve.drop()
                    pages.give_back_memory()

    def _do(self, state: str, action: Callable[[], None]) -> None:
        """Carries out an order; this is the edge at which a failure of any kind becomes a word to the master."""
        self._snapshot.note(state=state)
        try:
            action()
        except ValueError as error:
            self._snapshot.carried_out(str(error))
        except WireBroken as error:
            self._snapshot.carried_out(str(error), ring_broke=True)
            self.ring_broke.set()
        except Exception as error:
            logger.exception("rank %d failed while %s", self.rank, state)
            self._snapshot.carried_out(f"{type(error).__name__}: {error}")
        else:
            self._snapshot.carried_out()

    def _keep(self) -> None:
        """Of what is loaded, what the next order may need."""
        if self._loaded is not None:
            self._kept, self._loaded = Kept.of(self._loaded), None

    def _unload(self) -> None:
        self._loaded = self._kept = None
        self._reserve.drop()
        pages.give_back_memory()
        self._snapshot.note(loaded_bytes=0)

    def _load(self, order: LoadOrder) -> None:
        torch.set_num_threads(order.threads)
        self._snapshot.note(loaded_bytes=0)
        self._keep()
        kept, self._kept = self._kept, None
        stage = order.plan.stage_of(self.rank)
        assert stage is not None, "who is to load has a part"
        reserve = self._reserve.give(stage.span)
        self._loaded = load(order, self.rank, self._snapshot.add_loaded, kept, reserve)
        self._snapshot.note(read_bytes=self._loaded.read_bytes, held_bytes=self._loaded.runner.shard.nbytes)

    def _serve_ring(self, order: JoinOrder) -> None:
        loaded = self._loaded
        if loaded is None:
            raise WireBroken("this rank has lost its master meanwhile")
        self._snapshot.note(received=BEFORE_STEPS, finished=BEFORE_STEPS)
        wire = self._node.wire(
            order.epoch,
            position=loaded.position,
            devices=loaded.order.devices,
            receive_bytes=loaded.frame_bytes,
            deadline_s=loaded.order.deadline_s,
        )
        try:
            Station(loaded, wire, self._snapshot).serve()
        finally:
            wire.close()


class Station:
    """One stage's place in the ring of one epoch."""

    def __init__(self, loaded: Loaded, wire: Wire, snapshot: Snapshot) -> None:
        self._runner = loaded.runner
        self._wire = wire
        self._snapshot = snapshot
        self._outbox = Outbox(loaded.frame_bytes)

    def serve(self) -> None:
        """Receives, runs and sends until the epoch ends.

        Raises:
            WireBroken: the ring is gone.
        """
        while True:
            began = time.perf_counter()
            frame = frames.decode(self._wire.receive(), self._runner.shard.dtype)
            wait = time.perf_counter() - began
            if frame.kind is Kind.STEP:
                self._snapshot.note(received=frame.step.id)
                out = self._run(frame, wait)
                self._wire.send(self._outbox.write(out))
                self._snapshot.note(finished=frame.step.id)
                continue
            self._snapshot.note()
            self._wire.send(self._outbox.write(frame))
            if frame.kind is Kind.END:
                self._wire.flush()
                return

    def _run(self, frame: Frame, wait: float) -> Frame:
        result = self._runner.run(frame.step, frame.hidden)
        times = (*frame.times, StageTime(wait, result.body_seconds, result.head_seconds, self._wire.take_sent()))
        if self._runner.stage.span.head:
            tokens = tuple(result.tensor.tolist())
            return Frame(kind=Kind.TOKENS, step=frame.step, tokens=tokens, logprobs=result.logprobs, times=times)
        return replace(frame, times=times, hidden=result.tensor.cpu())


class Outbox:
    """Buffers for frames that leave; the wire may hold two at a time."""

    def __init__(self, frame_bytes: int) -> None:
        self._buffers = [torch.empty(frame_bytes, dtype=torch.uint8) for _ in range(3)]

    def write(self, frame: Frame) -> Tensor:
        self._buffers.append(self._buffers.pop(0))
        return frames.encode(frame, self._buffers[0])
