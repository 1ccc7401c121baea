"""Another rank's part, held beside one's own by the rank that is to take it over."""

from __future__ import annotations

import logging
import threading

from distllm.core import Span
from distllm.engine.loading import Kept, load
from distllm.engine.orders import LoadOrder
from distllm.plan.holdings import NOTHING

logger = logging.getLogger(__name__)


class Reserve:
    """At most one such part. It is loaded beside the ring, by a thread of its own.

    Attributes:
        span: what is held.
        failure: why the last one could not be loaded.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._lock = threading.Lock()
        self._loads = threading.Lock()
        self._kept: Kept | None = None
        self._dropped = 0
        self.span = NOTHING
        self.failure: str | None = None

    def begin(self, order: LoadOrder) -> None:
        """As `load`, and does not wait for it."""
        self.failure = None
        threading.Thread(target=self.load, args=(order,), name="distllm-reserve", daemon=True).start()

    def load(self, order: LoadOrder) -> None:
        """Loads what the order's plan gives to this rank; any failure becomes a sentence.

        What is loaded when it is not wanted any more is forgotten.
        """
        stage = order.plan.stage_of(self._rank)
        assert stage is not None, "a reserve is a part"
        with self._lock:
            self.failure, wanted = None, self._dropped
        with self._loads:
            try:
                kept, failure = Kept.of(load(order, self._rank, lambda _: None)), None
            except Exception as error:
                logger.debug("rank %d could not load a reserve", self._rank, exc_info=True)
                kept, failure = None, str(error) or type(error).__name__
        with self._lock:
            if wanted != self._dropped:
                self.failure = "it is not wanted any more"
            elif kept is None:
                self.failure = failure
            else:
                self._kept, self.span = kept, stage.span

    def give(self, own: Span) -> Kept | None:
        """This rank is to hold `own` from now on: what is held for some of it is used up, anything else is given up."""
        with self._lock:
            kept = self._kept if self.span.overlaps(own) else None
            self._forget()
            return kept

    def drop(self) -> None:
        """It is not needed any more."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._kept, self.span = None, NOTHING
        self._dropped += 1
