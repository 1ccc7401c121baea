"""Where ranks register with the master, and are told if they may not."""

from __future__ import annotations

import threading

from distllm.core import EngineError, Member
from distllm.engine.orders import Registration


class Registrar:
    """Takes registrations, on RPC threads."""

    def __init__(self, me: Member) -> None:
        self._me = me
        self._lock = threading.Lock()
        self._taken: dict[int, Registration] = {}
        self._refused: str | None = None

    def register(self, registration: Registration) -> str | None:
        """Returns the reason if the rank is refused."""
        member = registration.member
        theirs, mine = dict(member.versions), dict(self._me.versions)
        differing = [name for name in mine if theirs.get(name) != mine[name]]
        refusal = None
        if differing:
            name = differing[0]
            refusal = f"it has {name} {theirs.get(name)}, the master {mine[name]}; install the same version on both"
        with self._lock:
            if refusal is None and member.rank in self._taken:
                refusal = f"rank {member.rank} is {self._taken[member.rank].member} already"
            if refusal is None:
                self._taken[member.rank] = registration
            else:
                self._refused = f"{member} was refused: {refusal}"
        return refusal

    def forget(self, rank: int) -> None:
        """A rank is gone; another process may register in its place."""
        with self._lock:
            self._taken.pop(rank, None)

    def knows(self, life: str) -> bool:
        """Whether this process life belongs to the job; asking proves that the master lives."""
        with self._lock:
            return any(each.member.life == life for each in self._taken.values())

    def taken(self) -> dict[int, Registration]:
        """
        Raises:
            EngineError: a rank was refused.
        """
        with self._lock:
            if self._refused:
                raise EngineError(self._refused)
            return dict(self._taken)
