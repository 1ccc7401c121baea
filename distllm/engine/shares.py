"""What each rank may use of its host: memory, cores and GPUs are shared out among the ranks that are there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from distllm.core import Member


class Shares:
    """Hosts as they were found when their first ranks came: what later ones find free has been taken by those."""

    def __init__(self) -> None:
        self._free: dict[str, int] = {}
        self._devices: dict[tuple[str, str], str] = {}

    def welcome(self, members: Iterable[Member]) -> None:
        """Ranks that come together; each gets the first GPU of its host that nobody has."""
        known = set(self._free)
        for member in members:
            if member.boot_id not in known:
                free = self._free.get(member.boot_id, member.memory_bytes)
                self._free[member.boot_id] = min(free, member.memory_bytes)
            taken = {device for (host, _), device in self._devices.items() if host == member.boot_id}
            gpus = (f"cuda:{index}" for index in range(member.gpus))
            self._devices[_process(member)] = next((gpu for gpu in gpus if gpu not in taken), "cpu")

    def dismiss(self, member: Member) -> None:
        """One that is gone; the others keep what they have."""
        del self._devices[_process(member)]

    def of(self, members: Iterable[Member], memory_fraction: float) -> list[Member]:
        """These members, by rank, with what each may use."""
        by_host: dict[str, list[Member]] = {}
        for member in members:
            by_host.setdefault(member.boot_id, []).append(member)
        shares = [
            replace(
                member,
                memory_bytes=int(self._free[host] * memory_fraction) // len(together),
                cores=max(1, member.cores // len(together)),
                device=self._devices[_process(member)],
            )
            for host, together in by_host.items()
            for member in together
        ]
        return sorted(shares, key=lambda member: member.rank)


def _process(member: Member) -> tuple[str, str]:
    return member.boot_id, member.life
