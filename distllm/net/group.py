"""The members of the RPC group as the job's store has them, in torch's private words, and which of them live.

Who joins is made known to every member that is listed, so a dead one keeps everybody out until it is struck off. To
call it is no way to find out: that has to wait until one has joined.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import Store

from distllm.net import address

# Those that live bury a member that died; one that comes in its place gives them so long.
BURIAL_S = 10.0
# Those that have lost their master answer whoever comes in its place within so long.
ROLL_CALL_S = 10.0
POLL_S = 0.05
TOKEN_S = 60.0  # nobody takes so long to join or leave

_MEMBERS = "names/_ALL_WORKER_INFOS"
_TOKEN = "RpcGroupManagementToken"
_ROLL_CALL = "roll call"


@dataclass(frozen=True, slots=True)
class AgentId:
    """How the group knows a process life; names and ids are never used twice.

    The name is the rank, an underscore and what is this process's alone.
    """

    name: str
    id: int

    @property
    def rank(self) -> str:
        return self.name.partition("_")[0]


class Group:
    """What one process sees and says of the group.

    Every method raises RuntimeError if the store is gone.
    """

    def __init__(self, store: Store, me: AgentId) -> None:
        self._store = store
        self._me = me
        self._answered = 0
        self._token_seen = "", 0.0
        store.set(f"process/{me.name}", json.dumps(_process()))

    def listed(self) -> list[AgentId]:
        """Those that have joined and were not struck off."""
        listed = self._store.get(_MEMBERS).decode().split(",") if self._store.check([_MEMBERS]) else []
        return [AgentId(name, int(number)) for name, _, number in (each.rpartition("-") for each in listed) if name]

    def strike_off(self, member: AgentId) -> None:
        """Lets others join in spite of a member that is gone."""
        entry = f"{member.name}-{member.id},"
        while self._store.check([_MEMBERS]) and entry in (listed := self._store.get(_MEMBERS).decode()):
            self._store.compare_set(_MEMBERS, listed, listed.replace(entry, ""))  # others may change it meanwhile
        self._store.delete_key(f"names/{member.id}")
        self._store.delete_key(f"addrs/{member.name}")
        self.free_token(member.name)

    def make_way(self, succeeds: bool) -> None:
        """Before joining: strikes off whoever is dead, as far as this process is the one to know.

        Those are members that were on this host. Who had this one's rank is buried by those that live, or struck off
        after a while. A master that succeeds another one asks who lives, and takes the rest for dead.
        """
        for each in self.listed():
            if self._has_ended(each):
                self.strike_off(each)
        if succeeds:
            for each in self._before_me() + self._silent():
                self.strike_off(each)
        until = time.monotonic() + BURIAL_S
        while before := self._before_me():
            if time.monotonic() > until:
                for each in before:
                    self.strike_off(each)
            time.sleep(POLL_S)

    def _before_me(self) -> list[AgentId]:
        return [each for each in self.listed() if each.rank == self._me.rank and each != self._me]

    def _has_ended(self, member: AgentId) -> bool:
        """Whether a member was a process of this host that is no more."""
        key = f"process/{member.name}"
        if not self._store.check([key]):
            return False
        host, pid, started = json.loads(self._store.get(key))
        return bool(host == _process()[0]) and _started(pid) != started

    def _silent(self) -> list[AgentId]:
        """Members that do not answer a roll call."""
        asked = [each for each in self.listed() if each.rank != self._me.rank]
        number = int(self._store.add(_ROLL_CALL, 1))
        until = time.monotonic() + ROLL_CALL_S
        while silent := [each for each in asked if not self._store.check([_answer(number, each)])]:
            if time.monotonic() > until:
                break
            time.sleep(POLL_S)
        return silent

    def answer(self) -> None:
        """Answers the newest roll call, once."""
        number = int(self._store.add(_ROLL_CALL, 0))
        if number > self._answered:
            self._answered = number
            self._store.set(_answer(number, self._me), "")

    def free_token(self, name: str) -> None:
        """Lets others join or leave, in place of one that ended in the middle of doing so."""
        held = self._token()
        if held and name in held:
            self._store.set(_TOKEN, "")
            self._store.set(held, "Done")  # who waits, waits for this

    def free_old_token(self) -> None:
        """One that dies while it joins or leaves may be listed nowhere, and nobody can take its turn."""
        held, since = self._token_seen
        if (now_held := self._token()) != held:
            self._token_seen = now_held, time.monotonic()
        elif held and time.monotonic() - since > TOKEN_S:
            self.free_token(held)

    def _token(self) -> str:
        """Who is joining or leaving; nothing if nobody is."""
        return self._store.get(_TOKEN).decode() if self._store.check([_TOKEN]) else ""


def _answer(number: int, member: AgentId) -> str:
    return f"{_ROLL_CALL}/{number}/{member.name}"


def _process() -> tuple[str, int, int | None]:
    """This process: its host (and what numbers its pids), its pid, and when it was started."""
    host = f"{address.boot_id()}/{os.readlink('/proc/self/ns/pid')}"
    return host, os.getpid(), _started(os.getpid())


def _started(pid: int) -> int | None:
    """When a process was started, in ticks since its host was, whatever its clock says; None if it runs no more."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])
