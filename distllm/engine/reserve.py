"""Another rank's part, held beside one's own by the rank that is to take it over."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from distllm.core import Span
from distllm.engine.loading import Kept, load
from distllm.engine.orders import LoadOrder
from distllm.plan.holdings import NOTHING

logger = logging.getLogger(__name__)


class Reserve:
    """At most one such part. It is loaded beside the ring, by a thread of its own.

    Attributes:
        failure: why the last one could not be loaded.
    """

    def __init__(self, rank: int, progress: Callable[[int], None]) -> None:
        self._rank = rank
        self._progress = progress
        self._lock = threading.Lock()
        self._loads = threading.Lock()
        self._own = NOTHING
        self._kept: Kept | None = None
        self._span = NOTHING
        self.failure: str | None = None

    @property
    def span(self) -> Span:
        """What is held."""
        return self._span

    def load(self, order: LoadOrder) -> None:
        """Loads what the order's plan gives to this rank, unless it is there; any failure becomes a sentence."""
        stage = order.plan.stage_of(self._rank)
        assert stage is not None, "a reserve is a part"
        with self._loads:
            if self._span == stage.span and self._kept is not None and self._kept.fits(order):
                return
            self.drop()
            try:
                kept = Kept.of(load(order, self._rank, self._progress))
            except Exception as error:
                logger.debug("rank %d could not load a reserve", self._rank, exc_info=True)
                self.failure = str(error)
                return
            with self._lock:
                if not stage.span.overlaps(self._own):  # it may have become its own meanwhile
                    self._kept, self._span = kept, stage.span

    def give(self, own: Span) -> Kept | None:
        """This rank is to hold `own` from now on: what is held for some of it is used up."""
        with self._lock:
            self._own = own
            if not self._span.overlaps(own):
                return None
            kept, self._kept, self._span = self._kept, None, NOTHING
            return kept

    def drop(self) -> None:
        """It is not needed any more."""
        with self._lock:
            self._kept, self._span, self.failure = None, NOTHING, None
