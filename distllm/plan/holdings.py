"""What each process holds by the last orders that it had: its own part, and another's that it could take over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from distllm.core import Member, Plan, Span
from distllm.plan.replan import Held, held_by

NOTHING = Span(0, 0)


class Holdings:
    """Those of one model, by process life."""

    def __init__(self) -> None:
        self._own: dict[str, Span] = {}
        self._reserves: dict[str, Span] = {}

    def load(self, plan: Plan, members: Iterable[Member]) -> None:
        """Members hold what a plan gives them from now on; a reserve is used up by that, or given up."""
        spans = held_by(plan)
        for member in members:
            if member.rank in spans:
                self._own[member.life] = spans[member.rank]
                self._reserves.pop(member.life, None)

    def add(self, reserves: Mapping[int, Span], members: Iterable[Member]) -> None:
        """Members hold a part of another's besides, by rank."""
        self._reserves |= {member.life: reserves[member.rank] for member in members if member.rank in reserves}

    def reserve_of(self, member: Member) -> Span:
        """What a member could take over; an empty span if that is nothing."""
        return self._reserves.get(member.life, NOTHING)

    def of(self, members: Iterable[Member]) -> Held:
        """All that members hold, for those that hold something."""
        return {member.rank: self._all_of(member) for member in members if member.life in self._own}

    def _all_of(self, member: Member) -> Span:
        own, reserve = self._own[member.life], self.reserve_of(member)
        touch = max(own.start, reserve.start) <= min(own.stop, reserve.stop)
        return own if reserve.is_empty or not touch else own.joined(reserve)
