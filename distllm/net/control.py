"""torch RPC behind objects, verbs and deadlines. All that relies on its private names stands here.

One agent serves a process for its life: torch cannot start a second one. It forms a dynamic group, whose members come
and go; a member that went must be buried by those that stay, or nobody new can join.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed.autograd as dist_autograd
from torch.distributed import PrefixStore, Store, rpc
from torch.distributed.rpc import _utils as rpc_utils
from torch.distributed.rpc import api as rpc_api

from distllm.net.address import Interface
from distllm.net.store import reached

logger = logging.getLogger(__name__)

LISTEN_S = 0.005
# Those that live bury a member that died; one that comes in its place gives them so long.
BURIAL_S = 10.0
BURIAL_POLL_S = 0.05
ANSWER_TIMEOUT_S = 2.0
TOKEN_S = 60.0  # nobody takes so long to join or leave

_MEMBERS = "names/_ALL_WORKER_INFOS"
_TOKEN = "RpcGroupManagementToken"


class PeerLost(Exception):
    """A peer did not answer: its connection is closed, or the deadline passed."""

    def __init__(self, name: str, reason: str, *, timed_out: bool) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason
        self.timed_out = timed_out


@dataclass(frozen=True, slots=True)
class AgentId:
    """How the group knows a process life; names and ids are never used twice."""

    name: str
    id: int


class JoinFailed(ConnectionError):
    """The group cannot be joined: a member that is listed does not answer."""


class Agent:
    """This process in the RPC group.

    Args:
        name: the rank, an underscore and what is this process's alone.

    Raises:
        JoinFailed: another member does not answer.
        ConnectionError: the store is gone.
    """

    def __init__(self, store: Store, name: str, interface: Interface, timeout_s: float) -> None:
        with reached():
            self.identity = AgentId(name, int(store.add("agents", 1)))
        self._token_seen = "", 0.0
        self._store = PrefixStore("rpc", store)
        self._store.set_timeout(timedelta(seconds=timeout_s))
        with reached():
            self._outlive_predecessors()
        if interface.name:
            os.environ["TP_SOCKET_IFNAME"] = interface.name
        options = rpc.TensorPipeRpcBackendOptions(
            rpc_timeout=timeout_s, init_method="tcp://unused:0", _transports=["uv"], _channels=["basic"]
        )
        dist_autograd._init(self.identity.id)
        try:
            rpc._init_rpc_backend(
                rpc.BackendType.TENSORPIPE, self._store, self.identity.name, self.identity.id, None, options
            )
        except RuntimeError as error:  # it calls every member that is listed, the dead ones too
            logger.debug("joining the group: %s", error)
            with reached():
                self._strike_off(self.identity)
            raise JoinFailed(f"cannot join the other ranks within {timeout_s:g} s; has one died?") from error

    def _outlive_predecessors(self) -> None:
        """Waits until the group has buried the processes that had this one's rank; strikes them off if it does not."""
        rank = self.identity.name.partition("_")[0]
        until = time.monotonic() + BURIAL_S
        while before := [each for each in self._listed() if each.name.partition("_")[0] == rank]:
            if time.monotonic() > until:
                for each in before:
                    self._strike_off(each)
            time.sleep(BURIAL_POLL_S)

    def bury_strays(self, known: Collection[AgentId], suspects: Collection[AgentId]) -> list[AgentId]:
        """Buries members that died before anybody knew them: as long as they are listed, nobody can join.

        Args:
            known: those that are watched otherwise.
            suspects: what the last call returned.

        Returns:
            Members that are not known; one that stays so is asked by the next call whether it is alive.

        Raises:
            ConnectionError: the store is gone.
        """
        with reached():
            strays = [each for each in self._listed() if each not in known and each != self.identity]
            for each in strays:
                if each in suspects and is_dead(each.name):
                    self.bury([each])
            self._free_old_token()
        return strays

    def _free_old_token(self) -> None:
        """One that dies while it joins or leaves may be listed nowhere, and nobody can take its turn."""
        held, since = self._token_seen
        if (now_held := self._token()) != held:
            self._token_seen = now_held, time.monotonic()
        elif held and time.monotonic() - since > TOKEN_S:
            self._free_token(held)

    def _listed(self) -> list[AgentId]:
        listed = self._store.get(_MEMBERS).decode().split(",") if self._store.check([_MEMBERS]) else []
        return [AgentId(name, int(number)) for name, _, number in (each.rpartition("-") for each in listed) if name]

    def bury(self, dead: Sequence[AgentId]) -> None:
        """Forgets members that are gone, in this process and in the group's store, so that others can join."""
        for each in dead:
            self._strike_off(each)
            bury_here(each)

    def bury_others(self) -> None:
        """Forgets every other member of the group; all of them must have ended."""
        self.bury([member for member in self._listed() if member != self.identity])
        self._free_token("")  # one that was not listed yet may hold it

    def _strike_off(self, member: AgentId) -> None:
        entry = f"{member.name}-{member.id},"
        while self._store.check([_MEMBERS]) and entry in (listed := self._store.get(_MEMBERS).decode()):
            self._store.compare_set(_MEMBERS, listed, listed.replace(entry, ""))  # others may change it meanwhile
        self._store.delete_key(f"names/{member.id}")
        self._store.delete_key(f"addrs/{member.name}")
        self._free_token(member.name)

    def _free_token(self, name: str) -> None:
        """Lets others join or leave, in place of one that ended in the middle of doing so."""
        held = self._token()
        if held and name in held:
            self._store.set(_TOKEN, "")
            self._store.set(held, "Done")  # who waits, waits for this

    def _token(self) -> str:
        """Who is joining or leaving; nothing if nobody is."""
        return self._store.get(_TOKEN).decode() if self._store.check([_TOKEN]) else ""


def bury_here(dead: AgentId) -> None:
    """Forgets a member in this process."""
    info = rpc.WorkerInfo(dead.name, dead.id)
    rpc_utils._update_group_membership(info, [], {}, False)


def leave() -> None:
    """Ends this process's agent without waiting for anybody."""
    if rpc_api._is_current_rpc_agent_set():
        rpc.shutdown(graceful=False)


class Desk:
    """Where calls from peers find the object of this process that they want: RPC calls functions, not objects."""

    def __init__(self) -> None:
        self._objects: dict[str, object] = {}
        self._lock = threading.Lock()

    def put(self, key: str, thing: object) -> None:
        with self._lock:
            self._objects[key] = thing

    def __getitem__(self, key: str) -> object:
        return self._objects[key]


_desk = Desk()


def expose(key: str, thing: object) -> None:
    """Lets peers call the methods of an object of this process."""
    _desk.put(key, thing)


def _exposed(key: str) -> object:
    return _desk[key]


def _call(key: str, verb: str, args: tuple[object, ...]) -> object:
    method: Callable[..., object] = getattr(_desk[key], verb)
    return method(*args)


# Every reference that was ever held. When one is let go, torch tells its owner so; if the owner does not answer, torch
# tells it again a second later, through a pointer to the member that burying has freed by then.
_references: list[Any] = []


class Peer:
    """A remote reference to an exposed object of another process.

    Raises:
        PeerLost: the connection is closed.
    """

    def __init__(self, identity: AgentId, key: str) -> None:
        self.identity = identity
        try:
            self._reference = rpc.remote(identity.name, _exposed, args=(key,))
        except RuntimeError as error:
            raise _lost(identity.name, error) from error
        _references.append(self._reference)

    def confirm(self, timeout_s: float) -> None:
        """Waits until the owner has told that it knows of this reference.

        Raises:
            PeerLost: it did not within the time, or its connection is closed.
        """
        deadline = time.monotonic() + timeout_s
        made = self._reference._get_future()
        while not self._reference.confirmed_by_owner():
            if made.done():
                Answer(self.identity.name, made).wait()  # raises, if making it failed
            if time.monotonic() > deadline:
                raise PeerLost(self.identity.name, "it does not answer", timed_out=True)
            time.sleep(LISTEN_S)

    def ask(self, verb: str, *args: object, timeout_s: float) -> Answer:
        """Calls a method there; the answer comes later."""
        try:
            proxy = self._reference.rpc_async(timeout=timeout_s)
            return Answer(self.identity.name, getattr(proxy, verb)(*args))
        except RuntimeError as error:
            raise _lost(self.identity.name, error) from error


class Answer:
    """What a peer will have said."""

    def __init__(self, name: str, future: Any) -> None:
        self._name = name
        self._future = future

    def wait(self) -> Any:
        """
        Raises:
            PeerLost: no answer within the call's time, or the connection is closed.
        """
        try:
            while not self._future.done():  # waiting within torch would not hear signals
                time.sleep(LISTEN_S)
            return self._future.wait()
        except RuntimeError as error:
            raise _lost(self._name, error) from error


def ask_by_name(name: str, key: str, verb: str, *args: object, timeout_s: float) -> Answer:
    """Calls a method of an exposed object of a process to which no reference is held; the answer comes later.

    Raises:
        PeerLost: the connection is closed.
    """
    try:
        return Answer(name, rpc.rpc_async(name, _call, args=(key, verb, args), timeout=timeout_s))
    except RuntimeError as error:
        raise _lost(name, error) from error


def call_by_name(name: str, key: str, verb: str, *args: object, timeout_s: float) -> Any:
    """As `ask_by_name`, and waits.

    Raises:
        PeerLost: no answer within the time, or the connection is closed.
    """
    return ask_by_name(name, key, verb, *args, timeout_s=timeout_s).wait()


def is_dead(name: str) -> bool:
    """Whether there is no process behind a name; one that is slow, or has not yet said who it is, counts as alive."""
    try:
        rpc.rpc_async(name, os.getpid, timeout=ANSWER_TIMEOUT_S).wait()
    except RuntimeError as error:
        return "unknown" not in str(error).lower() and not _lost(name, error).timed_out
    return False


def _lost(name: str, error: RuntimeError) -> PeerLost:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    timed_out = "timeout" in text.lower() or "timed out" in text.lower()
    logger.debug("%s: %s", name, text)
    return PeerLost(name, "it does not answer" if timed_out else "its connection is closed", timed_out=timed_out)
