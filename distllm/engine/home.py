"""What a process keeps between models: its node in the network, and the ranks that a launcher gave it.

torch allows one RPC agent in a process life, so the second model of a process uses the first one's.
"""

from __future__ import annotations

import atexit
import sys
from contextlib import ExitStack, suppress
from dataclasses import replace

from distllm.config import ClusterConfig
from distllm.core import EngineError
from distllm.engine.cluster import Cluster
from distllm.engine.local import LocalRanks
from distllm.net import address, control, store
from distllm.net.node import Node
from distllm.net.store import Rendezvous


class Home:
    """The one of this process is `home`."""

    def __init__(self) -> None:
        self._ends_at_exit = False
        self._store: object = None  # kept open by being held
        self._node: Node | None = None
        self._promised: Rendezvous | None = None
        self._launched: Cluster | None = None
        self._summoned: LocalRanks | None = None
        self._busy = False

    def summon(self, config: ClusterConfig) -> None:
        """Has the ranks come that `start` will want: they have as much to import as this process, and do so meanwhile.

        Whoever calls this calls `start` with the same configuration, or `send_away`.

        Raises:
            ValueError, EngineError: there is no place for them to meet; the sentence says why.
        """
        if config.workers > 1 and self._summoned is None and not self._busy:
            self._end_at_exit()
            self._summoned = self._local_ranks(config)

    def send_away(self) -> None:
        """Ends those that were summoned and that nobody has wanted."""
        summoned, self._summoned = self._summoned, None
        if summoned is not None:
            summoned.kill()

    def start(self, config: ClusterConfig) -> Cluster:
        """Starts `config.workers` ranks in all on this host, this process being rank 0.

        Raises:
            ValueError, EngineError: they do not come up, or serve another model; the sentence says why.
        """
        self._end_at_exit()
        self._take()
        with ExitStack() as on_error:
            on_error.callback(self.release)
            node = self._local_node(config)
            local, self._summoned = self._summoned or self._local_ranks(config), None
            on_error.callback(node.agent.bury_others)
            on_error.callback(local.end)
            local.wake()
            cluster = _cluster(node, local, config.workers, config)
            on_error.pop_all()
        return cluster

    def _local_ranks(self, config: ClusterConfig) -> LocalRanks:
        return LocalRanks(
            replace(self._local_node(config).rendezvous, world_size=config.workers),
            join_timeout_s=config.join_timeout_s,
            deadline_s=config.deadline_s,
            restarts=config.restarts,
        )

    def _local_node(self, config: ClusterConfig) -> Node:
        if self._node is None:
            self._store, port = store.serve_on_loopback()
            rendezvous = Rendezvous(
                rank=0, world_size=config.workers, host=address.LOOPBACK, port=port, job="local", one_host=True
            )
            self._node = _joined(rendezvous, config)
        return self._node

    def meet(self, rendezvous: Rendezvous) -> None:
        """Promises the ranks of a launcher that they will be led, or told that they will not."""
        self._end_at_exit()
        self._promised = self._promised or rendezvous

    def lead(self, rendezvous: Rendezvous, config: ClusterConfig) -> Cluster:
        """The ranks that a launcher started; they stay until this process ends.

        Raises:
            ValueError, EngineError: they do not come up, or serve another model; the sentence says why.
        """
        self._end_at_exit()
        if self._launched is None:
            if self._node is not None:
                raise EngineError("the ranks of the launcher did not come up the first time; start the job again")
            self._node = _joined(rendezvous, config)
            self._launched = _cluster(self._node, None, rendezvous.world_size, config)
        self._take()
        return self._launched

    def _take(self) -> None:
        if self._busy:
            raise ValueError("an LLM of this process has its ranks open; close it before another one is opened")
        self._busy = True

    def release(self) -> None:
        """The ranks may serve another model."""
        self._busy = False

    def hold(self) -> None:
        """This process is told to end: ranks that are told so too need not hand over what they have."""
        if self._launched is not None:
            self._launched.lets_go(False)

    def dismiss(self, code: int | None = None) -> None:
        """Ends the launched ranks, with an exit code that says how this process ends."""
        promised, self._promised = self._promised, None
        if promised is None:
            return
        if self._launched is not None:
            failed = getattr(sys, "last_value", None) is not None
            code = int(failed) if code is None else code
            self._launched.stop(code)
            if code == 0 and self._launched.lost_ranks:
                store.release_launchers(promised)
        elif not promised.hosts_store:
            with suppress(ValueError, ConnectionError):  # the store is gone, and they will notice that
                store.give_up(promised)

    def _end_at_exit(self) -> None:
        if not self._ends_at_exit:
            self._ends_at_exit = True
            atexit.register(self._end)

    def _end(self) -> None:
        self.dismiss()
        control.leave()


def _joined(rendezvous: Rendezvous, config: ClusterConfig) -> Node:
    try:
        return Node(rendezvous, config.interface, config.join_timeout_s)
    except ConnectionError as error:
        raise EngineError(str(error)) from error


def _cluster(node: Node, local: LocalRanks | None, ranks: int, config: ClusterConfig) -> Cluster:
    return Cluster(node, local, ranks, join_timeout_s=config.join_timeout_s, deadline_s=config.deadline_s)


home = Home()
