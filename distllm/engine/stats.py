"""Where the time of the steps goes, added up as they come home."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from distllm.net.frame import StageTime


@dataclass(slots=True)
class StageTotals:
    """Seconds that one stage has spent in all, and the bytes that it has sent."""

    wait: float = 0.0
    body: float = 0.0
    head: float = 0.0
    sent: int = 0

    def add(self, time_: StageTime) -> None:
        self.wait += time_.wait
        self.body += time_.body
        self.head += time_.head
        self.sent += time_.sent


@dataclass(slots=True)
class Stats:
    """Counts since the start; `tokens` were sampled, `busy_s` are the seconds in which steps were under way.

    `stages` are those of this epoch, `ranks` what each rank has spent in all epochs.
    """

    steps: int = 0
    tokens: int = 0
    busy_s: float = 0.0
    last_home: float = 0.0
    stages: list[StageTotals] = field(default_factory=list)
    ranks: dict[int, StageTotals] = field(default_factory=dict)

    def new_epoch(self) -> None:
        """Stages are others from now on."""
        self.stages = []

    def add(self, *, tokens: int, ranks: Sequence[int], times: Sequence[StageTime], seconds: float) -> None:
        """Takes a step that has come home now, `seconds` after it left; `ranks` are those of the stages."""
        now = time.perf_counter()
        self.busy_s += min(seconds, now - self.last_home)
        self.last_home = now
        self.steps += 1
        self.tokens += tokens
        self.stages = self.stages or [StageTotals() for _ in times]
        for totals, rank, time_ in zip(self.stages, ranks, times, strict=True):
            totals.add(time_)
            self.ranks.setdefault(rank, StageTotals()).add(time_)
