"""The ranks that a model can be given to: who is there, how fast each is, who goes, and who was lost too often."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from distllm import logs
from distllm.core import Fault, Member, Plan, Span
from distllm.engine import host
from distllm.engine.chronicle import Chronicle
from distllm.engine.cluster import Cluster, Verdict
from distllm.engine.options import Options
from distllm.plan.membership import Losses

logger = logging.getLogger(__name__)


class Crew:
    """The ranks of one job over its life.

    Attributes:
        verdicts: why rings broke so far, and which ranks were lost.
        faults: how often each kind of fault was behind that.
        chronicle: verdicts, and who came and left, with times.
        holders: lives of those that have a part, and which.

    Args:
        cluster: the other ranks; None if this process is alone.
    """

    def __init__(self, cluster: Cluster | None, options: Options) -> None:
        self._cluster = cluster
        self._options = options
        self._speeds: dict[str, float] = {}
        self._losses = Losses()
        self._notify: Callable[[], None] = lambda: None
        self._told: set[str] = set()
        self.verdicts: list[str] = []
        self.faults: Counter[Fault] = Counter()
        self.chronicle = Chronicle()
        self.holders: Mapping[str, Span] = {}

    def on_news(self, notify: Callable[[], None]) -> None:
        """Calls this from now on, from any thread, when somebody has come, wants to go, or may have a part again."""
        self._notify = notify
        if self._cluster is not None:
            self._cluster.on_news(notify)

    def news(self) -> None:
        """There is something to look at."""
        self._notify()

    def everybody(self) -> list[Member]:
        """Those that are there now, and what each may use."""
        fraction, quantization = self._options.plan.memory_fraction, self._options.quantization
        if self._cluster is None:
            me = host.describe(0)
            members = [replace(me, memory_bytes=int(me.memory_bytes * fraction))]
        else:
            members = self._cluster.shared_out(fraction)
        return [
            replace(
                member,
                quantizes=quantization.on(member.rank),
                speed=self._speeds.get(member.life, member.speed),
            )
            for member in members
        ]

    def trusted(self) -> list[Member]:
        """Those that may have a part: not who wants to go, nor who was lost again and again and has none now."""
        now = time.monotonic()
        leavers = {member.life for member in self.leavers()}
        return [
            member
            for member in self.everybody()
            if member.life not in leavers
            and (member.life in self.holders or self._losses.out_until(_place(member), now) <= now)
        ]

    def leavers(self) -> list[Member]:
        """Those that want to go."""
        return self._cluster.leavers() if self._cluster else []

    def learn(self, members: Iterable[Member]) -> None:
        """How fast these were measured to be."""
        self._speeds |= {member.life: member.speed for member in members}

    def is_measured(self, members: Sequence[Member]) -> bool:
        return all(member.life in self._speeds for member in members)

    def bury(self, verdict: Verdict) -> None:
        """Goes on without those that are lost; a place that loses its rank again and again is kept out for a while."""
        assert self._cluster is not None, "one rank alone loses nobody"
        logger.warning("%s", verdict, extra=logs.fields(faults=verdict.faults))
        self.verdicts.append(str(verdict))
        self.faults.update(verdict.faults)
        lost = [self._cluster.members[rank] for rank in verdict.lost]
        self.chronicle.lost({member: self.holders.get(member.life) for member in lost}, str(verdict))
        now = time.monotonic()
        for rank in verdict.lost:
            member = self._cluster.members[rank]
            place = _place(member)
            self._losses.add(place, now)
            if (out_s := self._losses.out_until(place, now) - now) > 0:
                count = self._losses.count(place, now)
                logger.warning("rank %d was lost %d times; who comes back gets no part for %.0f s", rank, count, out_s)
                timer = threading.Timer(out_s, self.news)
                timer.daemon = True
                timer.start()
        self._cluster.bury(verdict.lost)

    def look_around(self, ring: Collection[int]) -> None:
        """Takes in those that have come, and buries those that are gone, unless it is for a ring to break."""
        assert self._cluster is not None, "one rank alone has no others"
        for rank, reason in self._cluster.gone().items():
            if rank not in ring:
                self.bury(self._cluster.lost({rank: reason}, {}))
        for newcomer in self._cluster.admit():
            self.chronicle.joined(newcomer)

    def tell_of_spares(self, plan: Plan) -> None:
        """Says once of each rank that has no part that it has none."""
        for member in self.everybody():
            if plan.stage_of(member.rank) is None and member.life not in self._told:
                self._told.add(member.life)
                logger.info("%s holds nothing for now", member)

    def let_go(self, plan: Plan) -> None:
        """Ends those that want to go and have no part any more."""
        gone = [member for member in self.leavers() if plan.stage_of(member.rank) is None]
        if gone:
            assert self._cluster is not None, "one rank alone has nobody to let go"
            self._cluster.let_go(member.rank for member in gone)
        for member in gone:
            self.chronicle.note("left", f"{member} has left")


def _place(member: Member) -> tuple[str, int]:
    """What a process that comes back shares with the one before."""
    return member.boot_id, member.rank
