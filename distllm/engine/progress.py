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
# Of more ranks only the slowest is shown, for it is the one that all wait for.
SHOWN_RANKS = 4


class LoadProgress:
    """A bar for the bytes that all ranks have read, on a terminal only.

    Args:
        total: bytes of the checkpoint that all ranks read together.
    """

    def __init__(self, total: int, out: TextIO | None = None, show_after_s: float = SHOW_AFTER_S) -> None:
        self._total = total
        self._bar = tqdm(
            total=total,
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
        self._read: dict[int, tuple[int, float]] = {0: (0, 0.0)}

    def add_mine(self, nbytes: int) -> None:
        """Rank 0 has read so many more; none, if it is busy with what it has read."""
        with self._lock:
            self._progressed = time.monotonic()
            self._note(0, self._read[0][0] + nbytes)
            self._show()

    def see(self, told: Mapping[int, Status]) -> None:
        """What the other ranks say."""
        with self._lock:
            for rank, status in told.items():
                self._note(rank, status.loaded_bytes)
            self._show()

    def _note(self, rank: int, nbytes: int) -> None:
        """Bytes of a rank, and the seconds until there were so many: the rate of one that is done stays."""
        if nbytes != self._read.get(rank, (0, 0.0))[0]:
            self._read[rank] = nbytes, time.monotonic() - self._began

    def _show(self) -> None:
        self._bar.n = min(sum(nbytes for nbytes, _ in self._read.values()), self._total)
        self._bar.set_postfix_str(self._ranks(), refresh=False)
        self._bar.refresh()

    def _ranks(self) -> str:
        """Each rank's bytes and rate."""
        rates = {rank: nbytes / seconds for rank, (nbytes, seconds) in sorted(self._read.items()) if seconds}
        told = [
            f"rank {rank}: {human_bytes(self._read[rank][0])}, {human_bytes(int(r))}/s" for rank, r in rates.items()
        ]
        if len(told) <= SHOWN_RANKS:
            return "; ".join(told)
        return f"slowest {told[list(rates).index(min(rates, key=lambda rank: rates[rank]))]}"

    @property
    def still_s(self) -> float:
        """Seconds since rank 0 read anything."""
        return time.monotonic() - self._progressed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
