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
from datetime import timedelta
from typing import Any

import torch.distributed.autograd as dist_autograd
from torch.distributed import PrefixStore, Store, rpc
from torch.distributed.rpc import _utils as rpc_utils
from torch.distributed.rpc import api as rpc_api

from distllm.net.address import Interface
from distllm.net.group import AgentId, Group
from distllm.net.store import reached

logger = logging.getLogger(__name__)

LISTEN_S = 0.005
ANSWER_TIMEOUT_S = 2.0


class PeerLost(Exception):
    """A peer did not answer: its connection is closed, or the deadline passed."""

    def __init__(self, name: str, reason: str, *, timed_out: bool) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason
        self.timed_out = timed_out


class JoinFailed(ConnectionError):
    """The group cannot be joined: a member that is listed does not answer."""


class Agent:
    """This process in the RPC group.

    Args:
        name: the rank, an underscore and what is this process's alone.
        succeeds: it is the master, in place of one before.

    Raises:
        JoinFailed: another member does not answer.
        ConnectionError: the store is gone.
    """

    def __init__(self, store: Store, name: str, interface: Interface, timeout_s: float, *, succeeds: bool) -> None:
        with reached():
            self.identity = AgentId(name, int(store.add("agents", 1)))
        members = PrefixStore("rpc", store)
        members.set_timeout(timedelta(seconds=timeout_s))
        with reached():
            self._group = Group(members, self.identity)
            self._group.make_way(succeeds)
        if interface.name:
            os.environ["TP_SOCKET_IFNAME"] = interface.name
        options = rpc.TensorPipeRpcBackendOptions(
            rpc_timeout=timeout_s, init_method="tcp://unused:0", _transports=["uv"], _channels=["basic"]
        )
        dist_autograd._init(self.identity.id)
        try:
            rpc._init_rpc_backend(
                rpc.BackendType.TENSORPIPE, members, self.identity.name, self.identity.id, None, options
            )
        except RuntimeError as error:  # it calls every member that is listed, the dead ones too
            logger.debug("joining the group: %s", error)
            with reached():
                self._group.strike_off(self.identity)
            raise JoinFailed(f"cannot join the other ranks within {timeout_s:g} s; has one died?") from error

    def others(self) -> list[AgentId]:
        """The other members.

        Raises:
            ConnectionError: the store is gone.
        """
        with reached():
            return [each for each in self._group.listed() if each != self.identity]

    def is_listed(self) -> bool:
        """Whether this process is a member; others may have struck it off.

        Raises:
            ConnectionError: the store is gone.
        """
        with reached():
            return self.identity in self._group.listed()

    def answer(self) -> None:
        """Tells a new master, before it joins, that this process lives.

        Raises:
            ConnectionError: the store is gone.
        """
        with reached():
            self._group.answer()

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
        strays = [each for each in self.others() if each not in known]
        with reached():
            for each in strays:
                if each in suspects and is_dead(each.name):
                    self.bury([each])
            self._group.free_old_token()
        return strays

    def bury(self, dead: Sequence[AgentId]) -> None:
        """Forgets members that are gone, in this process and in the group's store, so that others can join."""
        for each in dead:
            self._group.strike_off(each)
            bury_here(each)

    def bury_others(self) -> None:
        """Forgets every other member of the group; all of them must have ended."""
        self.bury(self.others())
        self._group.free_token("")  # one that was not listed yet may hold it


def bury_here(dead: AgentId) -> None:
    """Forgets a member in this process."""
    info = rpc.WorkerInfo(dead.name, dead.id)
    rpc_utils._update_group_membership(info, [], {}, False)


def bury_by_name(name: str) -> None:
    """Forgets a member in this process.

    Raises:
        RuntimeError: there is none of that name.
    """
    bury_here(AgentId(name, rpc.get_worker_info(name).id))


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
    return _invoke(_desk[key], verb, args)


def _call_owned(reference: Any, verb: str, args: tuple[object, ...]) -> object:
    return _invoke(reference.local_value(), verb, args)


def _invoke(thing: object, verb: str, args: tuple[object, ...]) -> object:
    method: Callable[..., object] = getattr(thing, verb)
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
        # Not by the reference's own `rpc_async`: it goes through callbacks in Python, and what is raised in them torch
        # swallows. An interrupt would be lost there, and the answer with it.
        asked = (self._reference, verb, args)
        try:
            return Answer(self.identity.name, rpc.rpc_async(self.identity.name, _call_owned, asked, timeout=timeout_s))
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
            # torch's future keeps the error; if that kept this frame, and so the future, neither would ever be freed.
            raise _lost(self._name, error) from error.with_traceback(None)


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
