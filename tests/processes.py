"""Processes of others, which may end while they are looked at."""

from __future__ import annotations

from contextlib import suppress

import psutil


def command(process: psutil.Process) -> list[str]:
    """The words that it was started with; none if it has ended."""
    with suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
        return process.cmdline()
    return []


def child(of: psutil.Process, word: str) -> psutil.Process:
    """The one that was started with this word.

    Raises:
        StopIteration: there is none.
    """
    return next(iter(children(of, word)))


def children(of: psutil.Process, word: str) -> list[psutil.Process]:
    """Those that were started with this word and run."""
    return [each for each in of.children() if word in command(each)]


def ranks_of(of: psutil.Process) -> dict[int, psutil.Process]:
    """Those that distllm has started as ranks, by rank."""
    found = {}
    for each in of.children():
        rank = next((word for word in command(each) if word.startswith("--rank=")), None)
        if rank is not None:
            found[int(rank.removeprefix("--rank="))] = each
    return found
