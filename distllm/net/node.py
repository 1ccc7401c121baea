"""This process in the network: its interface, its RPC agent and its way into rings."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from torch.distributed import Store

from distllm.net import control, store
from distllm.net.address import Interface, loopback
from distllm.net.control import Agent
from distllm.net.group import AgentId
from distllm.net.store import Rendezvous
from distllm.net.wire import Wire, call_off

CONNECT_TIMEOUT_S = 60.0
RECONNECT_TIMEOUT_S = 5.0
LATE_JOIN_TIMEOUT_S = 20.0


class Node:
    """One process life's place in a job; torch allows one for each process, so it is kept.

    Attributes:
        succeeds: it is rank 0, and the job had another one before.
        has_begun: all ranks of the job have been there already.

    Args:
        interface: name of the network interface to use between hosts; None finds it.
        join_timeout_s: longest wait for the other ranks.

    Raises:
        ValueError: the store cannot be reached or opened, the interface does not exist, or ranks are missing.
        ConnectionError: the store is gone, rank 0 gave up, or another rank died meanwhile.
    """

    def __init__(self, rendezvous: Rendezvous, interface: str | None, join_timeout_s: float) -> None:
        self.rendezvous = rendezvous
        self.life = uuid.uuid4().hex[:12]
        # Rank 0 of a launcher without a store keeps it open for the job by holding on to it.
        self._served = store.serve(rendezvous) if rendezvous.hosts_store and rendezvous.rank == 0 else None
        # What a process that was started again does not find at once was there, and is gone.
        connect_s = RECONNECT_TIMEOUT_S if rendezvous.restarted else CONNECT_TIMEOUT_S
        self.store: Store = store.connect(rendezvous, min(connect_s, join_timeout_s))
        self.interface: Interface = (
            loopback()
            if rendezvous.one_host
            else store.choose_interface(rendezvous, self.store, interface, join_timeout_s)
        )
        with store.reached():
            self.succeeds = rendezvous.rank == 0 and bool(self.store.check([store.MASTER]))
        self.has_begun = store.has_begun(self.store)
        name = f"rank{rendezvous.rank}_{self.life}"
        # One that joins a job while another of its ranks dies waits for that in vain, and keeps others from joining.
        timeout_s = min(join_timeout_s, LATE_JOIN_TIMEOUT_S) if self.has_begun else join_timeout_s
        rpc_store = store.connect(rendezvous, CONNECT_TIMEOUT_S)
        self.agent = Agent(rpc_store, name, self.interface, timeout_s, succeeds=self.succeeds)

    @property
    def identity(self) -> AgentId:
        return self.agent.identity

    def lead(self) -> None:
        """Says that this process is the master, once it can be called.

        Raises:
            ConnectionError: the store is gone.
        """
        store.announce(self.rendezvous, self.store, self.identity.name, self.interface)

    def begin(self) -> None:
        """Says that all ranks are there that the job was started with.

        Raises:
            ConnectionError: the store is gone.
        """
        with store.reached():
            self.store.set(store.BEGUN, "")

    def master(self) -> str | None:
        """The name of the agent that said last that it is the master; it may be gone.

        Raises:
            ConnectionError: the store is gone, or rank 0 gave up.
        """
        return store.master(self.store)

    def new_epoch(self) -> int:
        """A number that no epoch of this job has had.

        Raises:
            ConnectionError: the store is gone.
        """
        with store.reached():
            return int(self.store.add("epochs", 1))

    def wire(self, epoch: int, *, position: int, devices: Sequence[str], receive_bytes: int, deadline_s: float) -> Wire:
        """Joins the ring of an epoch.

        Raises:
            WireBroken: it did not form within the deadline, or was called off.
        """
        return Wire(
            self.store,
            epoch,
            self.interface,
            position=position,
            devices=devices,
            receive_bytes=receive_bytes,
            deadline_s=deadline_s,
        )

    def call_off(self, epoch: int) -> None:
        """Lets nobody wait for the ring of an epoch any more.

        Raises:
            ConnectionError: the store is gone.
        """
        with store.reached():
            call_off(self.store, epoch)

    def leave(self) -> None:
        """Ends the agent; the process cannot come back."""
        control.leave()
