"""Ranks that load beside the ring while it runs: for a plan to come, or to take over from others at once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from distllm.core import EngineError, Member, Plan
from distllm.engine.cluster import Verdict
from distllm.engine.crew import Crew
from distllm.engine.epoch import Epochs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is loaded; `then` is the plan to change to when it is, None if there is none."""

    loads: Plan
    done: Future[None]
    then: Plan | None
    dropped: threading.Event


class Growth:
    """At most one thing is loaded ahead at a time."""

    def __init__(self, crew: Crew, epochs: Epochs) -> None:
        self._crew = crew
        self._epochs = epochs
        self._ahead: Ahead | None = None
        self._failed: Plan | None = None

    @property
    def under_way(self) -> bool:
        return self._ahead is not None and not self._ahead.done.done()

    def begin(self, loads: Plan, members: Sequence[Member], ranks: Collection[int], then: Plan | None) -> None:
        """Has ranks that are in no ring load what a plan of these members gives them; there is news when they have."""
        dropped = threading.Event()
        self._ahead = Ahead(loads, self._epochs.prepare(loads, members, ranks, dropped), then, dropped)
        self._ahead.done.add_done_callback(lambda _: self._crew.news())

    def has_failed(self, plan: Plan) -> bool:
        """Whether rank 0 could not have this plan loaded the last time: it would not be otherwise now."""
        return plan == self._failed

    def drop(self) -> None:
        """What is loaded is not waited for any more; those that do go on until they are told something else."""
        if self._ahead is not None:
            self._ahead.dropped.set()
        self._ahead = None

    def ready(self) -> Plan | None:
        """The plan to change to, if those that it waited for have loaded; one that could not is left out."""
        if self._ahead is None or not self._ahead.done.done():
            return None
        ahead, self._ahead = self._ahead, None
        try:
            ahead.done.result()
        except Verdict as verdict:
            self._crew.bury(verdict)
            return None
        except (EngineError, ValueError) as error:  # the ring is well all the same
            self._failed = ahead.loads
            logger.warning("nobody is taken in: %s", error)
            return None
        return ahead.then
