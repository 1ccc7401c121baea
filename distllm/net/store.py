"""The key-value store through which ranks first meet, and the rendezvous that says where it is."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from distllm.net import address
from distllm.net.address import Interface

logger = logging.getLogger(__name__)

MASTER = "master"
INTERFACE = "interface"
BEGUN = "begun"
# What a process that was not started with the job needs to know of it.
NOTICE = "distllm/notice"
GIVEN_UP = "given up"
# What torchrun's agents wait for at the end, in the store that they share with us.
LAST_AGENT = "torchelastic/agent/terminal_state/last_member"
POLL_S = 0.05
CONNECT_SLICE_S = 10.0
PROBE_TIMEOUT_S = 2.0
CONCLUDED_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks of a job meet.

    `job` separates jobs and restarts that share a store. `hosts_store` says that rank 0 opens the store itself, because
    no launcher did; `one_host` that all ranks are known to be on this host. `run_id` is torchrun's, if it started them;
    `restarted` that it has started this process again.
    """

    rank: int
    world_size: int
    host: str
    port: int
    job: str
    hosts_store: bool = False
    one_host: bool = False
    run_id: str | None = None
    restarted: bool = False


def serve_on_loopback() -> tuple[Store, int]:
    """A store for the ranks of this host, on a free port of loopback only."""
    listener = socket.create_server((address.LOOPBACK, 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        address.LOOPBACK,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        use_libuv=True,
    )
    return store, port


def serve(rendezvous: Rendezvous) -> Store:
    """Opens the store of a job whose launcher has none, on the address that the ranks were told.

    Raises:
        ValueError: the port is taken, or the address is not one of this host.
    """
    try:
        listener = socket.create_server((rendezvous.host, rendezvous.port))
    except OSError as error:
        where, reason = f"{rendezvous.host}:{rendezvous.port}", os.strerror(error.errno) if error.errno else error
        raise ValueError(
            f"cannot listen on {where}: {reason}; set MASTER_ADDR and MASTER_PORT to a free port"
        ) from error
    port = listener.getsockname()[1]
    return TCPStore(
        rendezvous.host,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        use_libuv=True,
    )


def connect(rendezvous: Rendezvous, timeout_s: float) -> Store:
    """A client of its own for each use: a blocking wait on a shared one would hold up the others.

    Raises:
        ValueError: nobody answers there within the time.
    """
    return PrefixStore(f"distllm/{rendezvous.job}", _client(rendezvous.host, rendezvous.port, timeout_s))


def _client(host: str, port: int, timeout_s: float) -> TCPStore:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            # Knocking first: torch would print its stack for every try at a port that nobody has opened yet.
            socket.create_connection((host, port), min(PROBE_TIMEOUT_S, timeout_s)).close()
            client = TCPStore(
                host,
                port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=min(CONNECT_SLICE_S, timeout_s)),
            )
        except (RuntimeError, OSError) as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"no store answers at {host}:{port} within {timeout_s:g} s; is the first node up?"
                ) from error
            time.sleep(POLL_S)
            continue
        client.set_timeout(timedelta(seconds=timeout_s))
        return client


def announce(rendezvous: Rendezvous, store: Store, name: str, interface: Interface) -> None:
    """Says who the master is, to those that were started with the job and to those that come later.

    Raises:
        ConnectionError: the store is gone.
    """
    client = _client(rendezvous.host, rendezvous.port, CONNECT_SLICE_S)
    with reached():
        store.set(f"host/{rendezvous.rank}", address.network_id())
        store.set(INTERFACE, interface.address)
        store.set(MASTER, name)
        client.set(NOTICE, json.dumps({"job": rendezvous.job, "world_size": rendezvous.world_size}))


def newcomer(address: str, timeout_s: float) -> Rendezvous:
    """A new rank's way into a job that runs.

    Args:
        address: HOST:PORT of the job's store, that is what its ranks were given as the master's address and port.

    Raises:
        ValueError: this is no address, or no job runs there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"cluster.join={address}: give HOST:PORT, the master's address and port of the job")
    client = _client(host.strip("[]"), int(port), timeout_s)
    with reached():
        if not client.check([NOTICE]):
            raise ValueError(f"cluster.join={address}: no job of distllm has come up there; does rank 0 run?")
        told = json.loads(client.get(NOTICE))
        rank = told["world_size"] - 1 + client.add(f"{NOTICE}/{told['job']}/newcomers", 1)
    return Rendezvous(rank=rank, world_size=told["world_size"], host=host.strip("[]"), port=int(port), job=told["job"])


@contextmanager
def reached() -> Iterator[None]:
    """Around calls of a store.

    Raises:
        ConnectionError: it is gone, and with it whoever serves it.
    """
    try:
        yield
    except RuntimeError as error:
        logger.debug("the store: %s", error)
        raise ConnectionError("the job's store is gone; has the launcher on the first host ended?") from error


def wait_for(store: Store, keys: Sequence[str], timeout_s: float) -> list[str]:
    """Waits until keys are set, in slices, so that signals are heard; returns those that are still missing.

    Raises:
        ConnectionError: the store is gone, or rank 0 gave up.
    """
    deadline = time.monotonic() + timeout_s
    with reached():
        while (missing := [key for key in keys if not store.check([key])]) and time.monotonic() < deadline:
            master(store)
            time.sleep(POLL_S)
        master(store)
    return missing


def has_begun(store: Store) -> bool:
    """Whether all ranks of a job have been there.

    Raises:
        ConnectionError: the store is gone.
    """
    with reached():
        return bool(store.check([BEGUN]))


def master(store: Store) -> str | None:
    """Who said last that it is the master; None if nobody has.

    Raises:
        ConnectionError: the store is gone, or rank 0 gave up.
    """
    with reached():
        if not store.check([MASTER]):
            return None
        name: str = store.get(MASTER).decode()
    if name == GIVEN_UP:
        raise ConnectionError("rank 0 gave up")
    return name


def choose_interface(rendezvous: Rendezvous, store: Store, wish: str | None, timeout_s: float) -> Interface:
    """Loopback if all ranks are on one host, else the wished interface or the one that routes to the master.

    Raises:
        ValueError: a rank did not say in time where it is, the interface does not exist, or the job runs on another
            host and listens on its loopback only.
        ConnectionError: the store is gone, or rank 0 gave up.
    """
    with reached():
        store.set(f"host/{rendezvous.rank}", address.network_id())
        announced = store.get(INTERFACE).decode() if store.check([INTERFACE]) else None
        if announced == address.LOOPBACK:
            if store.get("host/0").decode() == address.network_id():
                return address.loopback()
            raise ValueError(
                "all ranks of the job are on one host and listen on its loopback only; for ranks of other hosts to "
                "join later, start it with cluster.interface=NAME"
            )
    if announced is not None and wish is None:
        return address.routing_to(rendezvous.host, rendezvous.port)
    if wish is not None:
        return address.named(wish)
    keys = [f"host/{rank}" for rank in range(rendezvous.world_size)]
    if missing := wait_for(store, [*keys], timeout_s):
        absent = [int(key.removeprefix("host/")) for key in missing]
        raise ValueError(f"ranks {absent} did not start within {timeout_s:g} s; is the job running on every host?")
    with reached():
        hosts = {store.get(key) for key in keys}
    if len(hosts) == 1:
        return address.loopback()
    return address.routing_to(rendezvous.host, rendezvous.port)


def release_launchers(rendezvous: Rendezvous) -> None:
    """Ends the wait of torchrun's agents for one another, when a job has ended well without some of them.

    An agent whose rank has ended waits up to five minutes for those of the others, which may be gone.
    """
    if rendezvous.run_id is None:
        return
    with suppress(RuntimeError):  # it has ended already, and the wait with it
        client = TCPStore(
            rendezvous.host,
            rendezvous.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=CONNECT_SLICE_S),
        )
        PrefixStore(rendezvous.run_id, client).set(LAST_AGENT, "")


def conclude(rendezvous: Rendezvous, code: int) -> None:
    """Says that the job is over, so that a launcher that starts its ranks again does so in vain."""
    if rendezvous.run_id is not None:
        with suppress(ValueError, RuntimeError):  # the launcher has ended, and will start nothing
            _client(rendezvous.host, rendezvous.port, CONCLUDED_TIMEOUT_S).set(_concluded(rendezvous), str(code))


def concluded(rendezvous: Rendezvous) -> int | None:
    """The exit code of a job that is over; None if it is not, or nobody can tell because no torchrun has started it.

    Raises:
        ConnectionError: the store is gone.
    """
    if rendezvous.run_id is None:
        return None
    key = _concluded(rendezvous)
    try:
        client = _client(rendezvous.host, rendezvous.port, CONCLUDED_TIMEOUT_S)
    except ValueError as error:
        raise ConnectionError(str(error)) from error
    with reached():
        return int(client.get(key)) if client.check([key]) else None


def _concluded(rendezvous: Rendezvous) -> str:
    return f"distllm/concluded/{rendezvous.run_id}"


def give_up(rendezvous: Rendezvous) -> None:
    """Tells ranks that wait for a master that there will be none."""
    client = connect(rendezvous, CONNECT_SLICE_S)
    with reached():
        client.set(MASTER, GIVEN_UP)
