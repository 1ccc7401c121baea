"""When a rank that was lost may hold a part again: at once after one loss, later and later after several.

Pure: time is an argument, in seconds of any clock that goes forward.
"""

from __future__ import annotations

from collections.abc import Hashable

MEMORY_S = 600.0
"""Losses that are longer ago do not count."""
FIRST_S, MOST_S = 5.0, 300.0
"""How long a rank is kept out after its second loss, doubled by each further one, and at most."""


class Losses:
    """Which places have lost their process, and when."""

    def __init__(self) -> None:
        self._times: dict[Hashable, list[float]] = {}

    def add(self, place: Hashable, now: float) -> None:
        """The process at a place is lost."""
        self._times[place] = [*self._recent(place, now), now]

    def count(self, place: Hashable, now: float) -> int:
        """How often that was so lately."""
        return len(self._recent(place, now))

    def out_until(self, place: Hashable, now: float) -> float:
        """When a process at this place may hold a part; not later than now if it may already."""
        recent = self._recent(place, now)
        if len(recent) < 2:
            return now
        return max(now, recent[-1] + min(MOST_S, FIRST_S * 2.0 ** (len(recent) - 2)))

    def _recent(self, place: Hashable, now: float) -> list[float]:
        return [time for time in self._times.get(place, []) if time > now - MEMORY_S]
