"""Parts that are to be held twice: kept so, beside the ring, whoever comes and goes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future

from distllm.core import EngineError, Member, ModelSizes, Plan, Span
from distllm.engine.crew import Crew
from distllm.engine.epoch import Epochs
from distllm.plan.partition import PlanWish
from distllm.plan.replicas import replicas

logger = logging.getLogger(__name__)


class Replication:
    """Has neighbours hold the parts of some ranks.

    Args:
        ranks: those whose part is to be held twice.
    """

    def __init__(self, crew: Crew, epochs: Epochs, ranks: Collection[int]) -> None:
        self._crew = crew
        self._epochs = epochs
        self._ranks = ranks
        self._under_way: Future[None] | None = None
        self._dropped = threading.Event()
        self._told: Plan | None = None
        self._failed: Plan | None = None

    def keep(self, plan: Plan, members: Sequence[Member], sizes: ModelSizes, wish: PlanWish) -> None:
        """Sees to what is missing; what could not be had is not tried again before the plan changes."""
        if not self._ranks or (self._under_way is not None and not self._under_way.done()):
            return
        ring = [member for member in members if plan.stage_of(member.rank)]
        wanted = replicas(plan, self._ranks, ring, sizes, wish)
        there = {member.rank: self._epochs.holdings.reserve_of(member) for member in ring}
        missing = {rank: span for rank, span in wanted.items() if there[rank] != span}
        if plan != self._told:
            self._told, self._failed = plan, None
            self._tell(plan, wanted)
        if not missing or plan == self._failed:
            return
        self._dropped = threading.Event()
        self._under_way = self._epochs.replicate(missing, members, self._dropped)
        self._under_way.add_done_callback(self._done)

    def drop(self) -> None:
        """The ring changes: what is under way is of no use."""
        self._dropped.set()

    def _tell(self, plan: Plan, wanted: Mapping[int, Span]) -> None:
        for rank, span in wanted.items():
            logger.info("rank %d holds %s too, to take it over", rank, span)
        for stage in plan.stages:
            if stage.rank in self._ranks and stage.span not in wanted.values():
                why = "no neighbour has room for its part too; lower engine.kv_tokens or add memory"
                logger.warning("rank %d is not held twice: %s", stage.rank, why)

    def _done(self, future: Future[None]) -> None:
        try:
            future.result()
        except (EngineError, ValueError) as error:
            if not self._dropped.is_set():
                self._failed = self._told
                logger.warning("a part is not held twice: %s", error)
        self._crew.news()
