"""Faster plans: worth the move, within memory, every part placed once, with few bytes to load."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_partition import WISH, held, member, model, models, spans, team
from test_replan import moved, without

from distllm.core import ModelSizes, Span
from distllm.plan.partition import balanced_split, partition, slowest
from distllm.plan.rebalance import NEAR, rebalanced, widened
from distllm.plan.replan import replanned


def test_rebalancing_asks_for_a_gain() -> None:
    sizes, members = model(8, head_work=0.0), team(999, 999)
    better = rebalanced(held(5, 3), members, sizes, WISH, min_gain=0.2)
    assert better is not None
    assert spans(better) == ["0: embeddings + layers 0-3", "1: layers 4-7 + head"]
    assert rebalanced(held(5, 3), members, sizes, WISH, min_gain=0.21) is None
    assert rebalanced(held(4, 4), members, sizes, WISH, min_gain=0.0) is None


def test_rebalancing_uses_an_idle_rank_and_keeps_a_plan_when_nothing_fits() -> None:
    sizes = model(8, head_work=0.0)
    alone = partition(team(999, 999), model(8), replace(WISH, strategy="manual", layers=(8, 0)))
    alone = replace(alone, stages=(replace(alone.stages[0], span=Span(0, 8, embed=True, head=True)),), idle=(1,))
    better = rebalanced(alone, team(999, 999), sizes, WISH, min_gain=0.1)
    assert better is not None
    assert len(better.stages) == 2
    assert rebalanced(alone, team(9, 9), sizes, WISH, min_gain=0.1) is None


def test_a_rank_that_comes_takes_the_place_where_least_moves() -> None:
    sizes, members = model(12, head_work=0.0), team(999, 999, 999)
    alone = partition(team(999), sizes, WISH)
    two = widened(alone, team(999, 999), sizes, WISH, min_gain=0.05)
    assert two is not None
    assert spans(two) == ["0: embeddings + layers 0-5", "1: layers 6-11 + head"]
    three = widened(two, members, sizes, WISH, min_gain=0.05)
    assert three is not None
    assert spans(three) == ["0: embeddings + layers 0-3", "2: layers 4-7", "1: layers 8-11 + head"]
    assert moved(two, three, sizes) == 40, "the newcomer loads four layers, and nobody else any"


def test_a_rank_that_comes_back_fills_the_gap() -> None:
    sizes, members = model(12, head_work=0.0), team(999, 999, 999)
    whole = partition(members, sizes, WISH)
    without_1 = replanned(whole, without(members, 1), sizes, WISH)
    again = widened(without_1, members, sizes, WISH, min_gain=0.05)
    assert again == whole


def test_a_ring_out_of_order_is_kept_so() -> None:
    sizes, members = model(12, head_work=0.0), team(*[999] * 4)
    mended = replanned(partition(without(members, 3), sizes, WISH), without(members, 1), sizes, WISH)
    assert [stage.rank for stage in mended.stages] == [0, 3, 2]
    slow = [replace(each, speed=0.5 if each.rank == 3 else 1.0) for each in without(members, 1)]
    better = rebalanced(mended, slow, sizes, WISH, min_gain=0.05)
    assert better is not None
    assert [(stage.rank, stage.span.layers) for stage in better.stages] == [(0, 5), (3, 2), (2, 5)]


def test_a_rank_that_brings_too_little_stays_out() -> None:
    sizes = model(12, head_work=0.0)
    alone, slow = partition(team(999), sizes, WISH), replace(member(1, 999), speed=0.02)
    assert widened(alone, (member(0, 999), slow), sizes, WISH, min_gain=0.05) is None


def test_other_strategies_take_ranks_in_when_their_rule_fits() -> None:
    sizes, members = model(12), team(999, 999, 999)
    manual = replace(WISH, strategy="manual", layers=(4, 4, 4))
    whole = partition(members, sizes, manual)
    less = replanned(whole, without(members, 1), sizes, manual)
    assert widened(less, members, sizes, manual, min_gain=0.5) == whole
    assert widened(whole, team(*[999] * 4), sizes, manual, min_gain=0.0) is None, "there are three counts"
    even = replace(WISH, strategy="even")
    four = widened(partition(members, sizes, even), team(*[999] * 4), sizes, even, min_gain=0.5)
    assert four is not None
    assert [stage.span.layers for stage in four.stages] == [3, 3, 3, 3]


@settings(max_examples=100, deadline=None)
@given(sizes=models(), data=st.data())
def test_no_place_for_a_rank_makes_a_ring_faster(sizes: ModelSizes, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(2, 4))
    speeds = data.draw(st.lists(st.sampled_from([0.3, 1.0, 2.0]), min_size=ranks, max_size=ranks))
    memory = data.draw(st.integers(100, 2000))
    members = tuple(replace(member(rank, memory), speed=speed) for rank, speed in enumerate(speeds))
    try:
        before = partition(members[:-1], sizes, WISH)
    except ValueError:
        assume(False)
    ring = [members[stage.rank] for stage in before.stages]
    idle = [each for each in members[:-1] if each not in ring]
    assume(not idle)
    orders = [(*ring[:place], members[-1], *ring[place:]) for place in range(1, len(ring) + 1)]
    splits = [(order, split) for order in orders if (split := balanced_split(order, sizes, WISH)) is not None]
    fastest = min(slowest(order, sizes, split) for order, split in splits)
    running = slowest(ring, sizes, tuple(stage.span for stage in before.stages))
    after = rebalanced(before, members, sizes, WISH, min_gain=0.0)
    if after is None:
        assert fastest * (1 + NEAR) >= running * (1 - 1e-9)
        return
    placed = [layer for stage in after.stages for layer in range(stage.span.start, stage.span.stop)]
    assert placed == list(range(sizes.layers))
    assert [stage.rank for stage in after.stages if stage.span.embed] == [0]
    assert [stage.rank for stage in after.stages if stage.span.head] == [after.stages[-1].rank]
    assert sorted([*(stage.rank for stage in after.stages), *after.idle]) == list(range(ranks))
    now = slowest([members[stage.rank] for stage in after.stages], sizes, tuple(stage.span for stage in after.stages))
    assert now < running
    assert now <= fastest * (1 + NEAR) * (1 + 1e-6)
