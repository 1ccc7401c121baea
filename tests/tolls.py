"""What a fault is, and what faults have cost: the words that all runs of many faults share."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from faulty import CGROUPS

WOKEN = "SIGSTOP, woken"
OUT_OF_MEMORY = {"out of memory": "memory"} if os.access(CGROUPS, os.W_OK) else {}


@dataclass(frozen=True)
class Fault:
    """What happens to which stage of the ring, and when."""

    kind: str
    phase: str
    target: str


@dataclass
class Toll:
    """What faults of one kind, phase and target have cost so far."""

    faults: int = 0
    lost: int = 0
    different: int = 0
    noticed_s: list[float] = field(default_factory=list)
    next_token_s: list[float] = field(default_factory=list)


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def table(tolls: dict[Fault, Toll]) -> Iterator[str]:
    times = "noticed, s | next token, s (median, 99 %)"
    yield f"| fault | phase | target | runs | requests lost | tokens different | {times} |"
    yield "|---|---|---|---|---|---|---|---|"
    for fault, toll in sorted(tolls.items(), key=lambda item: (item[0].kind, item[0].phase, item[0].target)):
        noticed = f"{statistics.median(toll.noticed_s):.2f}" if toll.noticed_s else ""
        after = toll.next_token_s
        came = f"{statistics.median(after):.2f}, {percentile(after, 0.99):.2f}" if after else ""
        counts = f"{toll.faults} | {toll.lost} | {toll.different}"
        yield f"| {fault.kind} | {fault.phase} | {fault.target} | {counts} | {noticed} | {came} |"
