"""The master's view of the other ranks: who has registered, what each is doing, and who is to blame.

Speaks to them by the verbs of the worker, always with a deadline. Knows nothing of requests.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import psutil

from distllm.core import EngineError, Fault, Member
from distllm.engine import host
from distllm.engine.loading import Loaded
from distllm.engine.local import LocalRanks
from distllm.engine.orders import Status, finished_in_words, in_words
from distllm.engine.registrar import Registered, Registrar
from distllm.engine.shares import Shares
from distllm.net.control import Answer, PeerLost, ask_by_name, call_by_name, expose
from distllm.net.group import AgentId
from distllm.net.node import Node

logger = logging.getLogger(__name__)

POLL_S = 0.1
ORDER_TIMEOUT_S = 10.0  # an order is only dropped into an inbox, but it lists every tensor of the model
VERDICT_TIMEOUT_S = 1.0
ENDING_S = 0.2  # from a closed connection to the end of its process
WATCH_S = 2.0
# A rank that lost its master registers with the next one at once; one that died with it must be started first.
SUCCESSION_S = 20.0


class Verdict(EngineError):
    """Why a ring broke, or did not form: in words, and as kinds of faults.

    `lost` are the ranks without which the job has to go on, if it can.
    """

    def __init__(self, sentence: str, *faults: Fault, lost: Iterable[int] = ()) -> None:
        super().__init__(sentence)
        self.faults = faults
        self.lost = frozenset(lost)


class CannotLoad(Verdict):
    """A rank is well but cannot have what the plan gives to it: a file is missing there, or broken."""


class Cluster:
    """All ranks of a job, as rank 0 sees them.

    Attributes:
        ring: ranks whose end breaks a ring, or is noticed by who waits for them.
        world_size: of the ranks that the job was started with.
        lost_ranks: how many have gone since the beginning.

    Raises:
        EngineError: a rank did not register in time, ended before, or was refused.
    """

    def __init__(
        self, node: Node, local: LocalRanks | None, world_size: int, *, join_timeout_s: float, deadline_s: float
    ) -> None:
        self.node = node
        self._local = local
        self._me = replace(host.describe(0), life=node.life)
        self._deadline_s = deadline_s
        self._order_s = min(ORDER_TIMEOUT_S, deadline_s)
        self.world_size = world_size
        self._registrar = Registrar(self._me, local.came if local else lambda _: None)
        self.on_news = self._registrar.on_news
        expose("master", self._registrar)
        with _store_needed():
            node.lead()
        self._others = self._gather(world_size, join_timeout_s)
        with _store_needed():
            node.begin()
        self._shares = Shares()
        if node.succeeds:
            # Who came first has seen how much memory its host has without the model.
            for member in sorted(self.members.values(), key=lambda member: member.started):
                self._shares.welcome([member])
        else:
            self._shares.welcome(self.members.values())
        self.lost_ranks = 0
        self.ring: Collection[int] = ()
        self._gone: dict[AgentId, PeerLost] = {}
        self._silent: dict[AgentId, float] = {}
        self._calls = threading.Lock()  # torch does not take it well if a member is buried that is being called
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="distllm-watch", daemon=True).start()

    def _watch(self) -> None:
        """Looks after those whose death breaks no ring: ranks without a part, and ones that never registered."""
        strays: list[AgentId] = []
        while not self._ended.wait(WATCH_S):
            taken = self._registrar.taken()
            known = [other.identity for other in (*taken.values(), *dict(self._others).values())]
            try:
                with self._calls:
                    strays = self.node.agent.bury_strays(known, strays)
            except ConnectionError:
                return
            for rank, other in taken.items():
                if rank in self.ring:
                    self._silent.pop(other.identity, None)
                else:
                    self._look_at(other)

    def _look_at(self, other: Registered) -> None:
        try:
            with self._calls:
                other.peer.ask("status", timeout_s=VERDICT_TIMEOUT_S).wait()
            self._silent.pop(other.identity, None)
            self._gone.pop(other.identity, None)
        except PeerLost as lost:
            since = self._silent.setdefault(other.identity, time.monotonic())
            if not lost.timed_out or time.monotonic() - since > self._deadline_s:
                self._gone[other.identity] = lost
                self._registrar.news()

    def gone(self) -> dict[int, PeerLost]:
        """Ranks whose process has ended or hangs, as far as it was noticed outside of the ring, or was replaced."""
        taken = self._registrar.taken()
        found = {}
        for rank, other in self._others.items():
            if (lost := self._gone.get(other.identity)) is not None:
                found[rank] = lost
            elif taken.get(rank) is not other:
                found[rank] = PeerLost(other.identity.name, "another process has come in its place", timed_out=False)
        return found

    def lets_go(self, may_go: bool) -> None:
        """Whether ranks may leave before the job ends."""
        self._registrar.lets_go = may_go

    def leavers(self) -> list[Member]:
        """Those that want to."""
        lives = self._registrar.leaving()
        return [member for member in self.members.values() if member.life in lives]

    @property
    def members(self) -> dict[int, Member]:
        """Those that are there, by rank."""
        others = dict(self._others)  # other threads ask too
        return {0: self._me} | {rank: each.member for rank, each in sorted(others.items())}

    def _gather(self, world_size: int, timeout_s: float) -> dict[int, Registered]:
        """All ranks that the job was started with; a master that succeeds another goes on with those that come soon."""
        wanted = set(range(1, world_size))
        deadline = time.monotonic() + timeout_s
        soon = time.monotonic() + min(timeout_s, SUCCESSION_S)
        while missing := wanted - self._registrar.taken().keys():
            if self.node.succeeds:
                self._drop_dead()
            else:
                self._registrar.check()
                self._check_joining(wanted, self._registrar.taken())
            if self.node.succeeds and self.node.has_begun and time.monotonic() > soon:
                logger.warning("going on without ranks %s, which did not come again", sorted(missing))
                break
            if time.monotonic() > deadline:
                raise EngineError(f"ranks {sorted(missing)} did not register within {timeout_s:g} s; did they start?")
            time.sleep(POLL_S / 2)
        if not self.node.succeeds:
            self._registrar.check()
        return self._registrar.taken()

    def _drop_dead(self) -> None:
        """Ranks that registered with a new master may die like others, and keep others from joining until buried."""
        for other in self._registrar.taken().values():
            try:
                call_by_name(other.identity.name, "worker", "status", timeout_s=VERDICT_TIMEOUT_S)
            except PeerLost as lost:
                if not lost.timed_out:
                    logger.warning("%s is lost: %s", other.member, lost.reason)
                    self._registrar.forget(other.member.life)
                    self.node.agent.bury([other.identity])

    def admit(self) -> list[Member]:
        """Takes in the processes that have registered since; one that comes in place of another when that is buried."""
        came = {rank: each for rank, each in self._registrar.taken().items() if rank not in self._others}
        self._others |= came
        for newcomer in came.values():
            logger.info("%s has come", newcomer.member)
        newcomers = [each.member for each in came.values()]
        self._shares.welcome(newcomers)
        return newcomers

    def _check_joining(self, wanted: Iterable[int], taken: Mapping[int, Registered]) -> None:
        """A rank that dies while others still join keeps them from it, so it must be named at once."""
        if self._local:
            for rank in sorted(wanted):
                if ended := self._local.ended(rank):
                    raise EngineError(f"rank {rank} {ended} before {'all' if rank in taken else 'it'} registered")
            return
        for registration in taken.values():
            name = registration.identity.name
            try:
                call_by_name(name, "worker", "status", timeout_s=VERDICT_TIMEOUT_S)
            except PeerLost as lost:
                if not lost.timed_out:
                    raise EngineError(f"{registration.member} is lost: {lost.reason}") from lost

    def shared_out(self, memory_fraction: float) -> list[Member]:
        """Members by rank, with what each may use of its host."""
        return self._shares.of(self.members.values(), memory_fraction)

    def new_epoch(self) -> int:
        """A number that no epoch of this job has had.

        Raises:
            EngineError: the job's store is gone.
        """
        with _store_needed():
            return self.node.new_epoch()

    def call_off(self, epoch: int) -> None:
        """Lets nobody wait for a ring that will not form."""
        with _store_needed():
            self.node.call_off(epoch)

    def order(self, verb: str, orders: Mapping[int, object]) -> None:
        """Gives each rank its order.

        Raises:
            EngineError: a rank did not take it; names it.
        """
        for rank, answer in self._ask(verb, orders, self._order_s).items():
            if isinstance(answer, PeerLost):
                raise self.lost({rank: answer}, {})
            if answer is not True:
                raise EngineError(f"{self.members[rank]} does not {verb}: it has an order of a newer epoch")

    def reserve(self, orders: Mapping[int, object]) -> None:
        """Has ranks of the ring load another's part besides. None is given up for it.

        Raises:
            EngineError: one did not take it.
        """
        for rank, answer in self._ask("reserve", orders, self._order_s).items():
            if isinstance(answer, PeerLost):
                raise EngineError(f"rank {rank}: {answer.reason}")

    def forget(self) -> None:
        """Tells all ranks to unload; one that does not hear it is found out by the next order."""
        with suppress(EngineError):  # without a store there will be no next order
            self._ask("unload", dict.fromkeys(self._others, self.new_epoch()), VERDICT_TIMEOUT_S)

    def _ask(self, verb: str, arguments: Mapping[int, object], timeout_s: float) -> dict[int, object]:
        """Calls a verb of several ranks at once: each one's answer, or the PeerLost that came instead."""
        asked: dict[int, Answer | PeerLost] = {}
        for rank, argument in arguments.items():
            other = self._others.get(rank)
            if other is None:
                asked[rank] = PeerLost(f"rank {rank}", "it was given up", timed_out=False)
                continue
            try:
                asked[rank] = other.peer.ask(verb, *(() if argument is None else (argument,)), timeout_s=timeout_s)
            except PeerLost as lost:
                asked[rank] = lost
        return {rank: _heard(answer) for rank, answer in asked.items()}

    def statuses(self, ranks: Iterable[int], timeout_s: float) -> dict[int, Status | PeerLost]:
        """What each rank says of itself now."""
        said = self._ask("status", dict.fromkeys(ranks), timeout_s)
        return {rank: answer for rank, answer in said.items() if isinstance(answer, Status | PeerLost)}

    def wait_done(
        self,
        epoch: int,
        ranks: Iterable[int],
        *,
        still_s: float,
        deadline_s: float,
        seen: Callable[[dict[int, Status]], None],
        unless: Future[Loaded] | None = None,
    ) -> None:
        """Waits until the ranks have carried out their orders.

        Args:
            still_s: longest time that a rank may make no progress.
            deadline_s: longest time that a rank may not answer.
            seen: called with what the ranks say, for progress bars.
            unless: what rank 0 does meanwhile; if it fails, there is no point in waiting.

        Raises:
            EngineError: a rank is lost, stands still or failed; names it. Or it has been told something newer.
        """
        waiting = set(ranks)
        told: dict[int, Status] = {}
        while waiting and not (unless and unless.done() and unless.exception()):
            for rank, status in self.statuses(waiting, deadline_s).items():
                if isinstance(status, PeerLost):
                    raise self.lost({rank: status}, {})
                told[rank] = status
                if status.epoch > epoch:
                    raise EngineError(f"{self.members[rank]} has an order of a newer epoch")
                if status.failure:
                    raise CannotLoad(f"{self.members[rank]}: {status.failure}", "cannot_load", lost=[rank])
                if status.epoch == epoch and status.done:
                    waiting.discard(rank)
                elif status.still_s > still_s:
                    raise Verdict(
                        f"{self.members[rank]} stands still while {status.state} for {status.still_s:.0f} s",
                        "hung",
                        lost=[rank],
                    )
            seen(told)
            if waiting:
                time.sleep(POLL_S)

    def attend(self, ranks: Sequence[int], until: Future[Any]) -> None:
        """Waits for what rank 0 does together with these ranks, as long as all of them are there.

        Raises:
            EngineError: a rank is lost or failed; names it.
        """
        while not until.done():
            for rank, status in self.statuses(ranks, VERDICT_TIMEOUT_S).items():
                if isinstance(status, Status):
                    if failure := self.failure(rank, status):
                        raise failure
                elif not status.timed_out:  # one that is only slow has until the deadline
                    raise self.lost({rank: status}, {})
            wait([until], timeout=POLL_S)

    def failure(self, rank: int, status: Status) -> Verdict | None:
        """What went wrong within the rank itself, if anything."""
        if not status.failure or status.ring_broke:
            return None
        sentence = f"{self.members[rank]} failed in {in_words(status.received)}: {status.failure}"
        return Verdict(sentence, "failed", lost=[rank])

    def lost(self, silent: Mapping[int, PeerLost], finished: Mapping[int, int]) -> Verdict:
        """The verdict on ranks that do not answer; those that hang on this host are killed."""
        sentences: list[str] = []
        faults: list[Fault] = []
        for rank, peer in sorted(silent.items()):
            ended = self._local.ended(rank, 0.0 if peer.timed_out else ENDING_S) if self._local else None
            killed = ", so the master killed it" if peer.timed_out and not ended and self._kill(rank) else ""
            step = f"; {finished_in_words(finished[rank])}" if rank in finished else ""
            sentences.append(f"{self.members[rank]} is lost: {ended or peer.reason}{killed}{step}")
            faults.append(self._fault(rank, peer, ended=ended is not None))
        return Verdict("; ".join(sentences), *faults, lost=silent)

    def _fault(self, rank: int, peer: PeerLost, *, ended: bool) -> Fault:
        """What is wrong with a rank that does not answer; `ended` is a child of this process that has."""
        if ended:
            return "killed" if self._local and self._local.was_killed(rank) else "exited"
        if not peer.timed_out:
            return "disconnected"
        return "hung" if self.members[rank].boot_id == self._me.boot_id else "unreachable"

    def bury(self, ranks: Iterable[int]) -> None:
        """Goes on without some ranks: ends them where it can, and has all others forget them, so that others can come.

        One that is alive but out of reach finds that its master does not know it any more, and ends.
        """
        pids = {rank: self.members[rank].pid for rank in ranks}
        for rank in pids:
            self._kill(rank)
        self._forget(pids)
        if self._local:
            for rank, pid in pids.items():
                self._local.replace(rank, pid)

    def let_go(self, ranks: Iterable[int]) -> None:
        """Ends ranks that have no part any more, and want to."""
        ranks = list(ranks)
        self._ask("stop", dict.fromkeys(ranks, 0), VERDICT_TIMEOUT_S)
        for rank in ranks:
            logger.info("%s has left", self.members[rank])
        self._forget(ranks)

    def _forget(self, ranks: Iterable[int]) -> None:
        gone: list[AgentId] = []
        for rank in ranks:
            other = self._others.pop(rank)
            self._registrar.forget(other.member.life)
            self._shares.dismiss(other.member)
            gone.append(other.identity)
            self._silent.pop(other.identity, None)
            self._gone.pop(other.identity, None)
        self.lost_ranks += len(gone)
        if gone:
            with self._calls:
                self.node.agent.bury(gone)
            self._ask("bury", dict.fromkeys(self._others, gone), VERDICT_TIMEOUT_S)

    def _kill(self, rank: int) -> bool:
        """Kills a process of this host, if it is certainly that one."""
        member = self.members[rank]
        same_host = (member.boot_id, member.pid_namespace) == (self._me.boot_id, self._me.pid_namespace)
        try:
            if not same_host or abs(psutil.Process(member.pid).create_time() - member.started) > 0.01:
                return False
            os.kill(member.pid, signal.SIGKILL)
        except (psutil.Error, ProcessLookupError, PermissionError):
            return False
        return True

    def stop(self, code: int) -> None:
        """Ends all other ranks with this exit code; those that do not answer are left to their own watch."""
        self._ended.set()
        told: list[Answer | PeerLost] = []
        for other in self._registrar.taken().values():
            try:
                told.append(ask_by_name(other.identity.name, "worker", "stop", code, timeout_s=VERDICT_TIMEOUT_S))
            except PeerLost as lost:
                told.append(lost)
        for answer in told:
            _heard(answer)
        if self._local:
            self._local.end()
            with self._calls:
                self.node.agent.bury_others()


@contextmanager
def _store_needed() -> Iterator[None]:
    try:
        yield
    except ConnectionError as error:
        raise EngineError(str(error)) from error


def _heard(answer: Answer | PeerLost) -> object:
    try:
        return answer if isinstance(answer, PeerLost) else answer.wait()
    except PeerLost as lost:
        logger.debug("no answer: %s", lost)
        return lost.with_traceback(None)  # as a value it keeps no frames, and what rings have in them, alive
