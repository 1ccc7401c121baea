"""How many prompt tokens a step may take, so that no honest step comes near the deadline.

Found by trying: the first chunk is small, and the next ones grow while the ring is quick enough. A model and machines
that are too slow for the configured chunk are so never taken for hung ones.
"""

from __future__ import annotations

FIRST_CHUNK = 16
GROWTH = 4.0
# A step may take this share of the deadline on its way round the ring.
SHARE = 0.25


class Pace:
    """
    Args:
        most: tokens of a chunk, at most.
        deadline_s: a rank that makes no progress for so long has hung.
    """

    def __init__(self, most: int, deadline_s: float) -> None:
        self._most = most
        self._allowed_s = SHARE * deadline_s
        self.chunk = min(most, FIRST_CHUNK)

    def see(self, tokens: int, seconds: float) -> bool:
        """Takes how long a step with prompt tokens was on its way; True if chunks have to shrink.

        A step with fewer tokens than a chunk says nothing about larger ones.
        """
        ratio = min(GROWTH, self._allowed_s / max(seconds, 1e-9))
        fitting = max(1, int(tokens * ratio))
        shrinks = ratio < 1 and fitting < self.chunk
        if shrinks or tokens >= self.chunk:
            self.chunk = min(self._most, fitting)
        return shrinks
