"""The key-value store through which ranks first meet, and the rendezvous that says where it is."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from distllm.net import address
from distllm.net.address import Interface


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks of a job meet.

    `job` separates jobs and restarts that share a store. `hosts_store` says that rank 0 opens the store itself, because
    no launcher did; `one_host` that all ranks are known to be on this host.
    """

    rank: int
    world_size: int
    host: str
    port: int
    job: str
    hosts_store: bool = False
    one_host: bool = False


def serve_on_loopback() -> tuple[TCPStore, int]:
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


def serve(rendezvous: Rendezvous) -> TCPStore:
    """Opens the store of a job whose launcher has none, on the address that the ranks were told.

    Raises:
        ValueError: the port is taken, or the address is not one of this host.
    """
    try:
        listener = socket.create_server((rendezvous.host, rendezvous.port))
    except OSError as error:
        where = f"{rendezvous.host}:{rendezvous.port}"
        raise ValueError(
            f"cannot listen on {where}: {error.strerror}; set MASTER_ADDR and MASTER_PORT to a free port"
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
    where = f"{rendezvous.host}:{rendezvous.port}"
    try:
        client = TCPStore(
            rendezvous.host,
            rendezvous.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"no store answers at {where} within {timeout_s:g} s; is the first node up?") from error
    return PrefixStore(f"distllm/{rendezvous.job}", client)


def choose_interface(rendezvous: Rendezvous, store: Store, wish: str | None, timeout_s: float) -> Interface:
    """Loopback if all ranks are on one host, else the wished interface or the one that routes to the master.

    Raises:
        ValueError: a rank did not say in time where it is, or the interface does not exist.
    """
    if wish is not None:
        return address.named(wish)
    store.set(f"host/{rendezvous.rank}", address.network_id())
    keys = [f"host/{rank}" for rank in range(rendezvous.world_size)]
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError as error:
        absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise ValueError(
            f"ranks {absent} did not start within {timeout_s:g} s; is the job running on every host?"
        ) from error
    if len({store.get(key) for key in keys}) == 1:
        return address.loopback()
    return address.routing_to(rendezvous.host, rendezvous.port)
