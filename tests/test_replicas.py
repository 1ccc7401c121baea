"""Which neighbour holds a part twice, and what is known of who holds what."""

from __future__ import annotations

import pytest
from test_partition import WISH, member, model, team
from test_replan import without

from distllm.core import Span
from distllm.plan.holdings import NOTHING, Holdings
from distllm.plan.partition import partition
from distllm.plan.replan import loaded_bytes, replanned
from distllm.plan.replicas import replicas


def test_the_rank_before_holds_it_if_it_has_room() -> None:
    sizes, members = model(12, head_work=0.0), team(1000, 1000, 1000)
    plan, roomy = partition(members, sizes, WISH), team(2000, 2000, 2000)
    assert replicas(plan, [1], roomy, sizes, WISH) == {0: plan.stages[1].span}
    full = [member(stage.rank, stage.weight_bytes + stage.kv_bytes + 1) for stage in plan.stages]
    assert replicas(plan, [1], [full[0], *roomy[1:]], sizes, WISH) == {2: plan.stages[1].span}
    assert replicas(plan, [1], [full[0], roomy[1], full[2]], sizes, WISH) == {}
    assert replicas(plan, [], roomy, sizes, WISH) == {}


def test_a_rank_holds_one_part_of_others() -> None:
    sizes, members = model(12, head_work=0.0), team(1000, 1000, 1000, 1000)
    plan = partition(members, sizes, WISH)
    found = replicas(plan, [1, 2, 3], team(*[2000] * 4), sizes, WISH)
    assert found == {0: plan.stages[1].span, 1: plan.stages[2].span, 2: plan.stages[3].span}


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_what_is_held_twice_is_not_loaded(lost: int) -> None:
    sizes, members = model(12, head_work=0.0), team(*[1000] * 4)
    plan = partition(members, sizes, WISH)
    holdings = Holdings()
    holdings.load(plan, members)
    holdings.add(replicas(plan, [lost], team(*[2000] * 4), sizes, WISH), members)
    left = without(members, lost)
    held = holdings.of(left)
    after = replanned(plan, left, sizes, WISH, held=held)
    assert sum(loaded_bytes(sizes, held[stage.rank], stage.span) for stage in after.stages) == 0


def test_a_reserve_that_is_used_is_none_any_more() -> None:
    sizes, members = model(12, head_work=0.0), team(1000, 1000, 1000)
    plan = partition(members, sizes, WISH)
    holdings = Holdings()
    holdings.load(plan, members)
    assert holdings.reserve_of(members[0]) == NOTHING
    holdings.add({0: plan.stages[1].span}, members)
    assert holdings.of(members)[0] == plan.stages[0].span.joined(plan.stages[1].span)
    after = replanned(plan, without(members, 1), sizes, WISH, held=holdings.of(without(members, 1)))
    holdings.load(after, without(members, 1))
    assert holdings.reserve_of(members[0]) == NOTHING
    assert holdings.of(members)[0] == after.stages[0].span


def test_spans_that_touch() -> None:
    assert Span(0, 3, embed=True).joined(Span(3, 5, head=True)) == Span(0, 5, embed=True, head=True)
    assert Span(2, 4).joined(Span(0, 3)) == Span(0, 4)
    assert not Span(0, 3).overlaps(Span(3, 5))
    assert Span(0, 3).overlaps(Span(2, 5))
    assert Span(0, 1, head=True).overlaps(Span(1, 2, head=True))
    assert not NOTHING.overlaps(Span(0, 9, embed=True, head=True))
    with pytest.raises(AssertionError):
        Span(0, 1).joined(Span(2, 3))
