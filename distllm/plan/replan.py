"""A plan for those that are left, or that have come, which moves as little as it can.

Pure functions. Weights stay where they are as far as the others' parts let them; among the plans that load equally
little, the one with the fastest slowest stage is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import inf

from distllm.core import Member, ModelSizes, Plan, Span
from distllm.plan.partition import Chain, PlanWish, nothing_fits, plan_of

Way = tuple[float, float, tuple[int, ...]]
"""Bytes to load, time of the slowest stage, and the cuts that lead there."""

Held = Mapping[int, Span]
"""What ranks hold, whether they have a part in the plan or not."""

NO_WAY: Way = (inf, inf, ())


def replanned(
    plan: Plan,
    members: Sequence[Member],
    sizes: ModelSizes,
    wish: PlanWish,
    *,
    held: Held | None = None,
    most: int | None = None,
) -> Plan:
    """Who holds what when members of a plan are gone.

    Those that had no part take the places of those that are gone, or stand at the end.

    Args:
        members: those that are there, rank 0 among them.
        held: what they hold, ranks without a part too; by default what the plan says.
        most: of them may have a part.

    Raises:
        ValueError: the model does not fit on them; names ranks and numbers.
    """
    held = held_by(plan) if held is None else held
    ranks = ring_order(plan, members, sizes, held)[:most]
    cuts = fewest_moves(held, ranks, sizes, wish)
    if cuts is None:
        raise ValueError(nothing_fits(ranks, sizes, wish))
    return plan_of(ranks, sizes, wish, Chain(ranks, sizes, wish).spans(cuts))


def held_by(plan: Plan) -> Held:
    """What the ranks of a plan hold."""
    return {stage.rank: stage.span for stage in plan.stages}


def ring_order(plan: Plan, members: Sequence[Member], sizes: ModelSizes, held: Held) -> list[Member]:
    """Members in the order of a new ring: those of the plan as they were, others where one is missing.

    In the place of a missing one stands who has to load least for its part.
    """
    there = {member.rank: member for member in members}
    assert 0 in there, "rank 0 holds the embeddings"
    idle = sorted(there.keys() - {stage.rank for stage in plan.stages})
    order: list[Member] = []
    for stage in plan.stages:
        if stage.rank in there:
            order.append(there[stage.rank])
        elif idle:
            best = min(idle, key=lambda rank: loaded_bytes(sizes.on(there[rank]), held.get(rank), stage.span))
            idle.remove(best)
            order.append(there[best])
    return order + [there[rank] for rank in idle]


def fewest_moves(held: Held, ranks: Sequence[Member], sizes: ModelSizes, wish: PlanWish) -> tuple[int, ...] | None:
    """The cuts of the ring that load least; None if nothing fits.

    By dynamic programming over ranks and cuts: exact, since more bytes before a cut never lead to fewer in all, nor at
    equal bytes a slower stage to a faster slowest one.
    """
    chain = Chain(ranks, sizes, wish)
    ways: list[Way] = [(0.0, 0.0, ()), *[NO_WAY] * chain.items]
    for place, member in enumerate(ranks):
        missing = _missing(held.get(member.rank, Span(0, 0)), sizes.on(member))
        ways = [
            min(_ways_to(stop, place, ways, chain, missing), key=lambda way: way[:2], default=NO_WAY)
            for stop in range(chain.items + 1)
        ]
    nbytes, _, cuts = ways[-1]
    return None if nbytes == inf else cuts


def _ways_to(stop: int, place: int, ways: Sequence[Way], chain: Chain, missing: Sequence[int]) -> Iterator[Way]:
    """All ways by which the ranks up to this one hold the items before `stop`."""
    for start in range(stop, -1, -1):
        if chain.fullness(place, start, stop) > 1:
            return
        nbytes, slowest, cuts = ways[start]
        if nbytes < inf:
            yield (
                nbytes + missing[stop] - missing[start],
                max(slowest, chain.seconds(place, start, stop)),
                (*cuts, stop),
            )


def _missing(held: Span, sizes: ModelSizes) -> list[int]:
    """Running sums of the bytes of items that a member would have to load."""
    layers = (0 if held.start <= layer < held.stop else size for layer, size in enumerate(sizes.layer_bytes))
    head = 0 if held.head else sizes.head_bytes - sizes.tied_bytes * held.embed
    return list(accumulate((*layers, head), initial=0))


def loaded_bytes(sizes: ModelSizes, held: Span | None, wanted: Span) -> int:
    """What a rank that holds a span, or nothing, reads to hold another one."""
    if held is None:
        return sizes.weight_bytes(wanted)
    first, last = max(held.start, wanted.start), min(held.stop, wanted.stop)
    both = Span(first, max(first, last), embed=held.embed and wanted.embed, head=held.head and wanted.head)
    return sizes.weight_bytes(wanted) - sizes.weight_bytes(both)
