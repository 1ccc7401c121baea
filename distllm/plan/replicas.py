"""Parts that a second rank holds as well, so that it can take them over at once. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from distllm.core import Member, ModelSizes, Plan, Span, Stage
from distllm.plan.partition import PlanWish


def replicas(
    plan: Plan, ranks: Collection[int], members: Sequence[Member], sizes: ModelSizes, wish: PlanWish
) -> Mapping[int, Span]:
    """What ranks of the plan should hold besides their own part, by rank: the part of a neighbour.

    That is the rank before in the ring, or the one after if that has no room; a rank takes one part.

    Args:
        ranks: those whose part is to be held twice; others of the plan are no matter.
        members: those of the plan.
    """
    there = {member.rank: member for member in members}
    found: dict[int, Span] = {}
    for place, stage in enumerate(plan.stages):
        if stage.rank not in ranks:
            continue
        for other in _neighbours(plan.stages, place):
            member = there[other.rank]
            room = member.memory_bytes - other.weight_bytes - other.kv_bytes - wish.workspace_bytes
            if other.rank not in found and room >= sizes.on(member).weight_bytes(stage.span):
                found[other.rank] = stage.span
                break
    return found


def _neighbours(stages: Sequence[Stage], place: int) -> Iterator[Stage]:
    if place > 0:
        yield stages[place - 1]
    if place + 1 < len(stages):
        yield stages[place + 1]
