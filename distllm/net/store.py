"""The key-value store through which ranks first meet, and the rendezvous that says where it is."""

from __future__ import annotations

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
GIVEN_UP = "given up"
# What torchrun's agents wait for at the end, in the store that they share with us.
LAST_AGENT = "torchelastic/agent/terminal_state/last_member"
POLL_S = 0.05
CONNECT_SLICE_S = 10.0
PROBE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks of a job meet.

    `job` separates jobs and restarts that share a store. `hosts_store` says that rank 0 opens the store itself, because
    no launcher did; `one_host` that all ranks are known to be on this host. `run_id` is torchrun's, if it started them.
    """

    rank: int
    world_size: int
    host: str
    port: int
    job: str
    hosts_store: bool = False
    one_host: bool = False
    run_id: str | None = None


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
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            # Knocking first: torch would print its stack for every try at a port that nobody has opened yet.
            socket.create_connection((rendezvous.host, rendezvous.port), min(PROBE_TIMEOUT_S, timeout_s)).close()
            client = TCPStore(
                rendezvous.host,
                rendezvous.port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=min(CONNECT_SLICE_S, timeout_s)),
            )
        except (RuntimeError, OSError) as error:
            if time.monotonic() > deadline:
                where = f"{rendezvous.host}:{rendezvous.port}"
                raise ValueError(
                    f"no store answers at {where} within {timeout_s:g} s; is the first node up?"
                ) from error
            time.sleep(POLL_S)
            continue
        client.set_timeout(timedelta(seconds=timeout_s))
        return PrefixStore(f"distllm/{rendezvous.job}", client)


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
            _check_given_up(store)
            time.sleep(POLL_S)
        _check_given_up(store)
    return missing


def _check_given_up(store: Store) -> None:
    if store.check([MASTER]) and store.get(MASTER) == GIVEN_UP.encode():
        raise ConnectionError("rank 0 gave up")


def choose_interface(rendezvous: Rendezvous, store: Store, wish: str | None, timeout_s: float) -> Interface:
    """Loopback if all ranks are on one host, else the wished interface or the one that routes to the master.

    Raises:
        ValueError: a rank did not say in time where it is, or the interface does not exist.
        ConnectionError: the store is gone, or rank 0 gave up.
    """
    with reached():
        store.set(f"host/{rendezvous.rank}", address.network_id())
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


def give_up(rendezvous: Rendezvous) -> None:
    """Tells ranks that wait for a master that there will be none."""
    client = connect(rendezvous, CONNECT_SLICE_S)
    with reached():
        client.set(MASTER, GIVEN_UP)
