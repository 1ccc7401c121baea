"""Which address of this host the others reach, and what makes two processes share a host."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface of this host and its address."""

    name: str
    address: str


def _addresses() -> list[Interface]:
    families = (socket.AF_INET, socket.AF_INET6)
    found = [
        Interface(name, entry.address.split("%")[0])
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in families
    ]
    return sorted(found, key=lambda each: ":" in each.address)


def loopback() -> Interface:
    """The loopback interface, for ranks that are all on one host."""
    return next((each for each in _addresses() if each.address == LOOPBACK), Interface("lo", LOOPBACK))


def named(name: str) -> Interface:
    """
    Raises:
        ValueError: this host has no such interface, or it has no address.
    """
    for each in _addresses():
        if each.name == name:
            return each
    known = sorted({each.name for each in _addresses()})
    raise ValueError(
        f"cluster.interface={name}: this host has no such interface with an address; it has {', '.join(known)}"
    )


def routing_to(host: str, port: int) -> Interface:
    """The interface over which this host sends to another one; nothing is sent.

    Raises:
        ValueError: the name does not resolve, or there is no route.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            address = probe.getsockname()[0].split("%")[0]
    except OSError as error:
        raise ValueError(f"no route to the master at {host}:{port} ({error}); is --master-addr right?") from error
    return next((each for each in _addresses() if each.address == address), Interface("", address))


def network_id() -> str:
    """The same for two processes if loopback connects them: same boot of the same kernel, same network namespace."""
    return f"{boot_id()}/{os.readlink('/proc/self/ns/net')}"


def boot_id() -> str:
    """The same for all processes of a host from its start to its end."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
