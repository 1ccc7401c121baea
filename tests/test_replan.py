"""Plans after a loss: every part placed once, within memory, with as few bytes to load as can be."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_partition import WISH, member, model, models, spans, team

from distllm.core import Member, ModelSizes, Plan, Span
from distllm.plan.partition import Chain, partition
from distllm.plan.replan import fewest_moves, held_by, loaded_bytes, replanned, ring_order


def moved(before: Plan, after: Plan, sizes: ModelSizes) -> int:
    held = {stage.rank: stage.span for stage in before.stages}
    return sum(loaded_bytes(sizes, held.get(stage.rank), stage.span) for stage in after.stages)


def without(members: tuple[Member, ...], *ranks: int) -> tuple[Member, ...]:
    return tuple(each for each in members if each.rank not in ranks)


def test_the_neighbours_share_what_a_lost_rank_held() -> None:
    members, sizes = team(1000, 1000, 1000), model(12, head_work=0.0)
    before = partition(members, sizes, WISH)
    assert spans(before) == ["0: embeddings + layers 0-3", "1: layers 4-7", "2: layers 8-11 + head"]
    after = replanned(before, without(members, 1), sizes, WISH)
    assert spans(after) == ["0: embeddings + layers 0-5", "2: layers 6-11 + head"]
    assert moved(before, after, sizes) == 40
    last = replanned(before, without(members, 2), sizes, WISH)
    assert spans(last) == ["0: embeddings + layers 0-3", "1: layers 4-11 + head"], "or layers would move twice"
    alone = replanned(before, without(members, 1, 2), sizes, WISH)
    assert spans(alone) == ["0: embeddings + layers 0-11 + head"]


def test_an_idle_rank_takes_the_place_of_a_lost_one() -> None:
    members, sizes = team(1000, 1000, 1000, 1000), model(12, head_work=0.0)
    before = partition(without(members, 3), sizes, WISH)
    after = replanned(before, without(members, 1), sizes, WISH)
    assert spans(after) == ["0: embeddings + layers 0-3", "3: layers 4-7", "2: layers 8-11 + head"]
    assert [each.rank for each in ring_order(before, members, sizes, held_by(before))] == [0, 1, 2, 3]
    again = replanned(after, without(members, 1, 2), sizes, WISH)
    assert spans(again) == ["0: embeddings + layers 0-3", "3: layers 4-11 + head"]


def test_what_does_not_fit_is_refused_with_numbers() -> None:
    members, sizes = team(75, 75, 75), model(12)
    before = partition(members, sizes, WISH)
    with pytest.raises(ValueError, match=r"^the model does not fit: it needs 130 B .* 2 ranks together may use 150 B"):
        replanned(before, without(members, 2), sizes, WISH)


@settings(max_examples=150, deadline=None)
@given(sizes=models(), data=st.data())
def test_no_plan_that_fits_loads_less(sizes: ModelSizes, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(2, 4))
    members = tuple(
        member(rank, data.draw(st.integers(30, 200)), data.draw(st.sampled_from([0.5, 1.0, 3.0])))
        for rank in range(ranks)
    )
    idle = data.draw(st.sampled_from([0, 1])) if ranks > 2 else 0
    try:
        before = partition(members[: ranks - idle], sizes, WISH)
    except ValueError:
        assume(False)
    left = ring_order(before, without(members, data.draw(st.integers(1, ranks - 1))), sizes, held_by(before))
    chain = Chain(left, sizes, WISH)

    def fits(cuts: tuple[int, ...]) -> bool:
        return all(chain.fullness(place, *part) <= 1 for place, part in enumerate(pairwise((0, *cuts))))

    def cost(cuts: tuple[int, ...]) -> tuple[int, float]:
        held = {stage.rank: stage.span for stage in before.stages}
        wanted = {each.rank: span for each, span in zip(left, chain.spans(cuts), strict=True) if not span.is_empty}
        nbytes = sum(loaded_bytes(sizes, held.get(rank), span) for rank, span in wanted.items())
        return nbytes, chain.slowest(cuts)

    every = ((*cuts, chain.items) for cuts in combinations_with_replacement(range(chain.items + 1), len(left) - 1))
    best = min((cost(cuts) for cuts in every if fits(cuts)), default=None)
    found = fewest_moves(held_by(before), left, sizes, WISH)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert fits(found)
    nbytes, slowest = cost(found)
    assert nbytes == best[0]
    assert slowest == pytest.approx(best[1])


def test_bytes_to_load() -> None:
    sizes = model(4, embed=7, head=9, tied=3)
    assert loaded_bytes(sizes, None, Span(0, 2, embed=True)) == 27
    assert loaded_bytes(sizes, Span(0, 2, embed=True), Span(0, 4, embed=True, head=True)) == 20 + 9 - 3
    assert loaded_bytes(sizes, Span(1, 3), Span(2, 4, head=True)) == 10 + 9
    assert loaded_bytes(sizes, Span(0, 1), Span(2, 4)) == 20
    assert loaded_bytes(sizes, Span(0, 4), Span(1, 2)) == 0
