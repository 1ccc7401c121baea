"""Ranks that load beside the ring while it runs: for a plan to come, or to take over from others at once."""

from __future__ import annotations

import logging
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

    done: Future[None]
    then: Plan | None


class Growth:
    """At most one thing is loaded ahead at a time."""

    def __init__(self, crew: Crew, epochs: Epochs) -> None:
        self._crew = crew
        self._epochs = epochs
        self._ahead: Ahead | None = None

    @property
    def under_way(self) -> bool:
        return self._ahead is not None and not self._ahead.done.done()

    def begin(self, loads: Plan, members: Sequence[Member], ranks: Collection[int], then: Plan | None) -> None:
        """Has ranks that are in no ring load what a plan of these members gives them; there is news when they have."""
        self._ahead = Ahead(self._epochs.prepare(loads, members, ranks), then)
        self._ahead.done.add_done_callback(lambda _: self._crew.news())

    def drop(self) -> None:
        """What is loaded is not waited for any more; those that do go on until they are told something else."""
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
        except (EngineError, ValueError) as error:
            logger.warning("nobody is taken in: %s", error)
            return None
        except Exception:  # the ring is well all the same
            logger.exception("nobody is taken in")
            return None
        return ahead.then
