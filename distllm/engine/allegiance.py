"""To which master a rank belongs: the one that it registered with, or one that came in its place."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress

from distllm.core import Member
from distllm.engine.orders import Registration
from distllm.net.control import PeerLost, bury_by_name, call_by_name
from distllm.net.node import Node

logger = logging.getLogger(__name__)

POLL_S = 0.05
REGISTER_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 2.0


class Allegiance:
    """That of one rank.

    Args:
        deadline_s: longest time that the master may not answer.
    """

    def __init__(self, node: Node, member: Member, deadline_s: float) -> None:
        self._node = node
        self._member = member
        self._deadline_s = deadline_s
        self._master = ""

    def pledge(self, timeout_s: float, unless: Callable[[], bool]) -> None:
        """Registers with the master; if the last one is dead, with the next.

        Args:
            unless: whether this process is to end.

        Raises:
            ValueError: there is none in time, or it refuses this rank; the sentence says why.
            ConnectionError: the store is gone, rank 0 gave up, or this process is to end.
        """
        until = time.monotonic() + timeout_s
        why = f"rank 0 did not come up within {timeout_s:g} s"
        while time.monotonic() < until:
            if unless():
                raise ConnectionError("it was told to")
            name = self._node.master()
            if name is not None and name != self._master:
                try:
                    self._register(name)
                    return
                except PeerLost as lost:
                    if not lost.timed_out:
                        self._master = name
                    why = f"rank {self._member.rank} could not register: of the master, {lost.reason}"
                    logger.debug("%s", why)
            self._node.agent.answer()
            time.sleep(POLL_S)
        raise ValueError(why)

    def _register(self, name: str) -> None:
        registration = Registration(self._member, self._node.identity)
        refusal = call_by_name(name, "master", "register", registration, timeout_s=REGISTER_TIMEOUT_S)
        if refusal:
            raise ValueError(f"{self._member} was refused: {refusal}")
        self._master = name

    def knows(self) -> bool:
        """Whether the master knows this rank; if not, it has given it up.

        Raises:
            PeerLost: the master is gone, or hangs.
        """
        known = call_by_name(self._master, "master", "knows", self._member.life, timeout_s=self._deadline_s)
        return bool(known)

    def may_leave(self) -> bool:
        """Whether the master will see to it that others take this rank's part."""
        try:
            return bool(call_by_name(self._master, "master", "leave", self._member.life, timeout_s=ANSWER_TIMEOUT_S))
        except PeerLost:
            return False

    def renew(self) -> bool:
        """Registers with another master, if there is one now, or finds that the old one is back.

        Raises:
            ValueError: it refuses this rank.
            ConnectionError: the store is gone, rank 0 gave up, or this rank was taken for dead.
        """
        self._node.agent.answer()
        before, name = self._master, self._node.master()
        if name is None or name == before:
            return self._is_back()
        try:
            self._register(name)
        except PeerLost as lost:
            logger.debug("%s", lost)
            if not self._node.agent.is_listed():
                raise ConnectionError("it was taken for dead by another master") from lost
            return False
        with suppress(RuntimeError):  # it was buried already
            bury_by_name(before)
        return True

    def _is_back(self) -> bool:
        try:
            known = call_by_name(self._master, "master", "knows", self._member.life, timeout_s=ANSWER_TIMEOUT_S)
        except PeerLost as lost:
            logger.debug("%s", lost)
            return False
        if not known:
            raise ConnectionError("the master does not know it")
        return True
