"""Where ranks register with the master, at the beginning or later, and are told if they may not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from distllm.core import EngineError, Member
from distllm.engine.orders import Registration
from distllm.net.control import Peer, PeerLost, call_by_name
from distllm.net.group import AgentId

CONFIRM_TIMEOUT_S = 20.0
PREDECESSOR_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Registered:
    """A rank that has registered, and the master's reference to it."""

    member: Member
    identity: AgentId
    peer: Peer


class Registrar:
    """Takes registrations, on RPC threads.

    A process may register for a rank whose process before has ended: it is there from then on, and the one before is
    not known any more.

    Attributes:
        lets_go: whether ranks may leave before the job ends.

    Args:
        came: called with the rank of each process that registers.
    """

    def __init__(self, me: Member, came: Callable[[int], None]) -> None:
        self._me = me
        self._came = came
        self._lock = threading.Lock()
        self._taken: dict[int, Registered] = {}
        self._refused: str | None = None
        self._leaving: frozenset[str] = frozenset()
        self.lets_go = True
        self._notify: Callable[[], None] = lambda: None

    def on_news(self, notify: Callable[[], None]) -> None:
        """Calls this from now on when somebody has registered or wants to go, from any thread."""
        self._notify = notify

    def news(self) -> None:
        """Something has happened to those that are here."""
        self._notify()

    def register(self, registration: Registration) -> str | None:
        """Returns the reason if the rank is refused."""
        member, identity = registration.member, registration.identity
        holder = self.taken().get(member.rank)
        if holder is not None and holder.identity == identity:
            return None  # it has not heard the first answer
        refusal = self._differs(member) or _still_there(holder)
        if refusal is None:
            try:
                peer = Peer(identity, "worker")
                # torch prints its stack if a rank ends before it has heard of a reference to it.
                peer.confirm(CONFIRM_TIMEOUT_S)
            except PeerLost as lost:
                refusal = f"the master cannot call it: {lost.reason}"
        with self._lock:
            if refusal is None and (other := self._taken.get(member.rank)) is not holder:
                refusal = f"{other.member if other else 'another process'} was faster"
            if refusal is None:
                self._taken[member.rank] = Registered(member, identity, peer)
            else:
                self._refused = f"{member} was refused: {refusal}"
        if refusal is None:
            self._came(member.rank)
            self._notify()
        return refusal

    def _differs(self, member: Member) -> str | None:
        theirs, mine = dict(member.versions), dict(self._me.versions)
        name = next((name for name in mine if theirs.get(name) != mine[name]), None)
        if name is None:
            return None
        return f"it has {name} {theirs.get(name)}, the master {mine[name]}; install the same version on both"

    def leave(self, life: str) -> bool:
        """A process wants to go; True if it should wait until it is told to."""
        if not self.lets_go or not self.knows(life):
            return False
        with self._lock:
            self._leaving |= {life}
        self._notify()
        return True

    def leaving(self) -> frozenset[str]:
        """Lives of those that want to go."""
        return self._leaving

    def forget(self, life: str) -> None:
        """A process is gone; another one may register in its place."""
        with self._lock:
            self._taken = {rank: each for rank, each in self._taken.items() if each.member.life != life}
            self._leaving -= {life}

    def knows(self, life: str) -> bool:
        """Whether this process life belongs to the job; asking proves that the master lives."""
        with self._lock:
            return any(each.member.life == life for each in self._taken.values())

    def taken(self) -> dict[int, Registered]:
        """Those that are registered now."""
        with self._lock:
            return dict(self._taken)

    def check(self) -> None:
        """
        Raises:
            EngineError: a rank was refused.
        """
        with self._lock:
            if self._refused:
                raise EngineError(self._refused)


def _still_there(holder: Registered | None) -> str | None:
    """Why nobody may come in place of a process: it answers, or only does not answer in time."""
    if holder is None:
        return None
    try:
        call_by_name(holder.identity.name, "worker", "status", timeout_s=PREDECESSOR_TIMEOUT_S)
    except PeerLost as lost:
        if not lost.timed_out:
            return None
    return f"rank {holder.member.rank} is {holder.member} already"
