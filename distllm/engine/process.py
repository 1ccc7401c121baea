"""The process life of a rank that is not the master: it registers, serves, and never outlives what it serves.

The worker's loop runs beside the main thread, which is left to signals and to watching the parent and the master.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import replace

from distllm import logs
from distllm.config import ClusterConfig
from distllm.core import Member
from distllm.engine import host
from distllm.engine.allegiance import Allegiance
from distllm.engine.worker import Worker
from distllm.model import pages
from distllm.model.blueprint import preload
from distllm.net import store
from distllm.net.control import JoinFailed, PeerLost, expose
from distllm.net.node import Node
from distllm.net.store import Rendezvous

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.1
MASTER_PULSE_S = 2.0
ORPHAN_PULSE_S = 0.25
# A launcher that ends a job signals all ranks at once. Those that are well stay this long, so that the master can still
# ask who was not.
LINGER_S = 4.0
# One that is told to end while the job goes on waits so long until others have its part; launchers kill after 30.
LEAVE_S = 25.0
# A master that ends its job tells the ranks and is gone: what it said may still be on its way through this process.
LAST_WORD_S = 0.5


class Unled(Exception):
    """This rank has no master, and will have none."""


class Watch:
    """The main thread of a worker: ends the process when the job is over, however it ends.

    Args:
        orphan_deadline_s: how long to wait for another master when the last one is gone.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        allegiance: Allegiance,
        member: Member,
        worker: Worker,
        orphan_deadline_s: float,
    ) -> None:
        self._rendezvous = rendezvous
        self._allegiance = allegiance
        self._member = member
        self._worker = worker
        self._orphan_deadline_s = orphan_deadline_s
        self._orphan_since: float | None = None
        self._parent = os.getppid()
        self._terminated_at: float | None = None
        self._may_stay_s: float | None = None
        self.done = threading.Event()
        self.code = 1

    def listen(self) -> None:
        """Takes the signals: Ctrl-C is the master's to answer; SIGTERM asks it to let this rank go."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_terminate)

    def _on_terminate(self, *_: object) -> None:
        self._terminated_at = self._terminated_at or time.monotonic()

    def is_over(self) -> bool:
        """Whether this process was told to end, or its parent is gone."""
        return self._terminated_at is not None or os.getppid() != self._parent

    def wait(self) -> int:
        """Returns the exit code when the worker ends, its parent or all masters are gone, or it was told to end."""
        next_pulse = time.monotonic() + MASTER_PULSE_S
        while not self.done.wait(WATCH_INTERVAL_S):
            now = time.monotonic()
            if self._terminated_at is not None and now - self._terminated_at > self._stays_s():
                return 1
            if os.getppid() != self._parent:
                logger.warning("%s: its launcher is gone; ending", self._member)
                return 1
            if now < next_pulse and not self._worker.ring_broke.is_set():
                continue
            self._worker.ring_broke.clear()  # perhaps because the master has gone
            try:
                next_pulse = self._pulse(now)
            except Unled as end:
                if not self.done.wait(LAST_WORD_S):
                    return self._end_unled(end)
        return self.code

    def _end_unled(self, end: Unled) -> int:
        """The exit code: that of the job, if it is over, which a rank that came late has heard from nobody."""
        try:
            over = store.concluded(self._rendezvous)
        except ConnectionError:
            # One that was started again must not fail for coming too late.
            over = 0 if self._rendezvous.restarted else None
        logger.warning("%s ends: %s", self._member, end if over is None else "the job has ended meanwhile")
        return 1 if over is None else over

    def _pulse(self, now: float) -> float:
        """Looks for the master; returns when to look again.

        Raises:
            Unled: this rank has none, and will have none.
        """
        if self._orphan_since is not None:
            self._look_for_master(now, self._orphan_since)
            return now + (ORPHAN_PULSE_S if self._orphan_since is not None else MASTER_PULSE_S)
        try:
            if not self._allegiance.knows():
                raise Unled("the master does not know it")
        except PeerLost as lost:
            self._lose_master(lost, now)
            return now
        return now + MASTER_PULSE_S

    def _lose_master(self, lost: PeerLost, now: float) -> None:
        reason = f"of the master, {lost.reason}"
        if self._orphan_deadline_s <= 0:
            raise Unled(reason)
        if self.done.wait(LAST_WORD_S):
            return
        try:
            self._worker.rest()
        except ConnectionError as error:
            raise Unled(f"{reason}; {error}") from error
        logger.warning("%s waits for another master for %.0f s: %s", self._member, self._orphan_deadline_s, reason)
        self._orphan_since = now

    def _look_for_master(self, now: float, since: float) -> None:
        try:
            found = self._allegiance.renew()
            if not found and store.concluded(self._rendezvous) is not None:
                raise Unled("the job is over")
        except (ValueError, ConnectionError) as error:
            raise Unled(str(error)) from error
        if found:
            logger.warning("%s has a master again, after %.1f s", self._member, now - since)
            self._orphan_since = None
        elif now - since > self._orphan_deadline_s:
            raise Unled(f"no other master came within {self._orphan_deadline_s:g} s")

    def _stays_s(self) -> float:
        """How long after SIGTERM: until others have its part, if the master sees to that."""
        if self._may_stay_s is None:
            goes_on = self._orphan_since is None and self._allegiance.may_leave()
            self._may_stay_s = LEAVE_S if goes_on else LINGER_S
        return self._may_stay_s


def serve(rendezvous: Rendezvous, cluster: ClusterConfig, *, woken: threading.Event | None = None) -> int:
    """Registers with the master and serves it until the job ends; returns the exit code.

    Args:
        woken: what to wait for before joining, when all is imported; None joins at once.

    Raises:
        ValueError: the master cannot be reached or refuses this rank; the sentence says why.
    """
    pages.share_one_heap()
    preload()
    gc.freeze()  # what is imported stays: looking through it would hold up every change of the ring
    if woken is not None:
        woken.wait()
    try:
        node = Node(rendezvous, cluster.interface, cluster.join_timeout_s)
    except ConnectionError as error:
        # When rank 0 gives up or ends, it has said why.
        level = logging.WARNING if isinstance(error, JoinFailed) else logging.INFO
        logger.log(level, "rank %d ends: %s", rendezvous.rank, error)
        return 1
    try:
        return _serve_on(node, cluster)
    finally:
        node.leave()


def _serve_on(node: Node, cluster: ClusterConfig) -> int:
    rank = node.rendezvous.rank
    worker = Worker(rank, node)
    expose("worker", worker)
    member = replace(host.describe(rank), life=node.life)
    allegiance = Allegiance(node, member, cluster.deadline_s)
    watch = Watch(node.rendezvous, allegiance, member, worker, cluster.orphan_deadline_s)
    watch.listen()
    try:
        allegiance.pledge(cluster.join_timeout_s, unless=watch.is_over)
    except ConnectionError as error:
        logger.info("rank %d ends: %s", rank, error)
        return 1
    threading.Thread(target=_run, args=(worker, watch), name="distllm-worker", daemon=True).start()
    code = watch.wait()
    if not watch.done.is_set():
        end_process(code)  # its loop may sit in a receive that nothing can cancel
    return code


def _run(worker: Worker, watch: Watch) -> None:
    try:
        watch.code = worker.run()
    finally:
        watch.done.set()


def end_process(code: int) -> None:
    """Ends the process at once, whatever its threads wait for."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _follow_pipe(woken: threading.Event) -> None:
    """Tells of the first word on standard input; ends the process when that closes: whoever started it is gone."""
    while os.read(0, 4096):
        woken.set()
    end_process(1)


def main() -> None:
    """A rank that a program started for itself with `LLM(workers=N)`; it joins when it is woken by a line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    for name, kind in (("rank", int), ("world-size", int), ("port", int), ("host", str), ("job", str)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    for name in ("join-timeout-s", "deadline-s"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--log-level", default="WARNING")
    parser.add_argument("--log-format", default=logs.TEXT)
    given = parser.parse_args()
    logs.log_to_stderr(given.log_level, given.log_format, rank=given.rank, prefix=f"rank {given.rank}: ")
    woken = threading.Event()
    threading.Thread(target=_follow_pipe, args=(woken,), name="distllm-pipe", daemon=True).start()
    rendezvous = Rendezvous(
        rank=given.rank, world_size=given.world_size, host=given.host, port=given.port, job=given.job, one_host=True
    )
    try:
        # Without rank 0 this process ends at once.
        code = serve(
            rendezvous,
            ClusterConfig(join_timeout_s=given.join_timeout_s, deadline_s=given.deadline_s, orphan_deadline_s=0.0),
            woken=woken,
        )
    except ValueError as error:
        logger.error("%s", error)
        code = 1
    end_process(code)
