"""What rank 0 shows while ranks load: how much of the model is done, and how much and how fast on each rank."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from typing import Self, TextIO

from tqdm import tqdm

from distllm.engine.orders import Status
from distllm.plan.partition import human_bytes

SHOW_AFTER_S = 1.0
# Of more ranks only the one is shown that has read the least share of its part, for all wait for it.
SHOWN_RANKS = 4


class LoadProgress:
    """A bar for the bytes that all ranks have read, on a terminal only.

    Args:
        totals: bytes of the checkpoint that each rank reads.
    """

    def __init__(
        self, totals: Mapping[int, int], out: TextIO | None = None, show_after_s: float = SHOW_AFTER_S
    ) -> None:
        self._totals = totals
        self._bar = tqdm(
            total=sum(totals.values()),
            unit="B",
            unit_scale=True,
            desc="loading",
            delay=show_after_s,
            leave=False,
            disable=None,
            file=out or sys.stderr,
            dynamic_ncols=True,
        )
        self._lock = threading.Lock()
        self._began = self._progressed = time.monotonic()
        self._read = dict.fromkeys(totals, 0)

    def add_mine(self, nbytes: int) -> None:
        """Rank 0 has read so many more; none, if it is busy with what it has read."""
        with self._lock:
            self._progressed = time.monotonic()
            self._read[0] += nbytes
            self._show()

    def see(self, told: Mapping[int, Status]) -> None:
        """What the other ranks say."""
        with self._lock:
            self._read |= {rank: status.loaded_bytes for rank, status in told.items()}
            self._show()

    def _show(self) -> None:
        self._bar.n = min(sum(self._read.values()), self._bar.total)
        self._bar.set_postfix_str(self._ranks(), refresh=False)
        self._bar.refresh()

    def _ranks(self) -> str:
        """Bytes of each rank, and its rate since the beginning."""
        if len(self._read) <= SHOWN_RANKS:
            return "; ".join(map(self._rank, sorted(self._read)))
        return "last " + self._rank(min(self._read, key=lambda rank: self._read[rank] / max(1, self._totals[rank])))

    def _rank(self, rank: int) -> str:
        rate = self._read[rank] / max(1e-3, time.monotonic() - self._began)
        return f"rank {rank}: {human_bytes(self._read[rank])}, {human_bytes(int(rate))}/s"

    @property
    def still_s(self) -> float:
        """Seconds since rank 0 read anything."""
        return time.monotonic() - self._progressed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
