"""The machine under the benchmark: its cores, its processor, and how much of it other programs took meanwhile."""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

CPUINFO = Path("/proc/cpuinfo")


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_model(cpuinfo: Path = CPUINFO) -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds of all cores since the start of the machine: in all, those at work, and those at work for us."""

    total: float
    busy: float
    ours: float

    @classmethod
    def read(cls) -> Self:
        """What this process and its descendants, as they are now, have used counts as ours."""
        times = psutil.cpu_times()
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        me = psutil.Process()
        ours = 0.0
        for each in (me, *me.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                used = each.cpu_times()
                ours += used.user + used.system
        return cls(total, total - times.idle - getattr(times, "iowait", 0.0), ours)

    def elsewhere(self, earlier: Clock) -> float:
        """The share of all cores that went elsewhere since: to other programs, or to other guests of the host."""
        total = self.total - earlier.total
        others = (self.busy - earlier.busy) - (self.ours - earlier.ours)
        return min(1.0, max(0.0, others / total)) if total > 0 else 0.0
