"""A faster plan for those that are there, where it is worth the move: after a measurement, or when ranks have come.

Pure functions. Ranks keep their order in the ring, since what they hold lies in that order; one that holds nothing
yet may take any place in it but the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distllm.core import Member, ModelSizes, Plan, Span
from distllm.plan.partition import PlanWish, Split, balanced_split, partition, plan_of, slowest
from distllm.plan.replan import loaded_bytes

NEAR = 0.01
"""Share of a step's time that is given for moving fewer bytes."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Ranks in the order of a ring, what each would hold, and what that costs: time of the slowest, bytes to load."""

    ranks: tuple[Member, ...]
    split: Split
    seconds: float
    nbytes: int


def rebalanced(
    plan: Plan, members: Sequence[Member], sizes: ModelSizes, wish: PlanWish, *, min_gain: float
) -> Plan | None:
    """A plan whose slowest stage is faster than `plan`'s by at least the share `min_gain`, else None.

    None also if no balanced split fits: the plan that runs is kept. `wish.strategy` and `wish.layers` are ignored.

    Args:
        members: rank 0, all ranks that hold something, and those that may.
    """
    there = {member.rank: member for member in members}
    ring = tuple(there[stage.rank] for stage in plan.stages)
    before = slowest(ring, sizes, tuple(stage.span for stage in plan.stages))
    best = _candidate(plan, ring, sizes, wish)
    for rank in sorted(there.keys() - {member.rank for member in ring}):
        ring = best.ranks if best else ring
        places = range(1, len(ring) + 1)
        natural = sum(member.rank < rank for member in ring)
        orders = [(*ring[:place], there[rank], *ring[place:]) for place in sorted(places, key=lambda at: at != natural)]
        found = [each for order in orders if (each := _candidate(plan, order, sizes, wish)) is not None]
        if not found:
            ring = orders[0]  # it takes more than this one for the model to fit
            continue
        fastest = min(each.seconds for each in found)
        best = min((each for each in found if each.seconds <= fastest * (1 + NEAR)), key=lambda each: each.nbytes)
    if best is None or best.seconds >= before or best.seconds > before * (1 - min_gain):
        return None
    return plan_of(best.ranks, sizes, wish, best.split)


def _candidate(plan: Plan, ranks: tuple[Member, ...], sizes: ModelSizes, wish: PlanWish) -> Candidate | None:
    split = balanced_split(ranks, sizes, wish)
    if split is None:
        return None
    nbytes = sum(_to_load(plan, member, sizes, span) for member, span in zip(ranks, split, strict=True))
    return Candidate(ranks, split, slowest(ranks, sizes, split), nbytes)


def _to_load(plan: Plan, member: Member, sizes: ModelSizes, wanted: Span) -> int:
    if wanted.is_empty:
        return 0
    stage = plan.stage_of(member.rank)
    return loaded_bytes(sizes.on(member), stage.span if stage else None, wanted)


def widened(
    plan: Plan, members: Sequence[Member], sizes: ModelSizes, wish: PlanWish, *, min_gain: float
) -> Plan | None:
    """A plan in which more ranks have a part than in `plan`, if the wish allows it and a step gets faster by that."""
    if wish.strategy == "balanced":
        wider = rebalanced(plan, members, sizes, wish, min_gain=min_gain)
    else:
        try:
            wider = partition(members, sizes, wish)
        except ValueError:
            return None
    return wider if wider and len(wider.stages) > len(plan.stages) else None
