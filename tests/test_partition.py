"""Plans: every part placed once, within memory, optimal when balanced, and refused with numbers."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.core import Member, ModelSizes, Plan, Span
from distllm.plan.partition import PlanWish, human_bytes, measured, partition
from distllm.plan.rebalance import rebalanced


def member(rank: int, memory: int = 10**6, speed: float = 1.0) -> Member:
    return Member(
        life=f"life-{rank}",
        rank=rank,
        host="abcdefghijklmnop"[rank],
        boot_id="boot",
        pid=100 + rank,
        device="cpu",
        memory_bytes=memory,
        cores=1,
        speed=speed,
    )


def team(*memories: int) -> tuple[Member, ...]:
    return tuple(member(rank, memory) for rank, memory in enumerate(memories))


def model(layers: int, *, head_work: float = 1.0, embed: int = 5, head: int = 5, tied: int = 0) -> ModelSizes:
    return ModelSizes(
        layer_bytes=(10,) * layers,
        embed_bytes=embed,
        head_bytes=head,
        tied_bytes=tied,
        kv_bytes=(1,) * layers,
        layer_work=(1.0,) * layers,
        head_work=head_work,
        context_length=100,
    )


WISH = PlanWish(kv_tokens_wanted=64, kv_tokens_needed=4, workspace_bytes=0, block_tokens=4)


def spans(plan: Plan) -> list[str]:
    return [f"{stage.rank}: {stage.span}" for stage in plan.stages]


@st.composite
def models(draw: st.DrawFn) -> ModelSizes:
    layers = draw(st.integers(1, 6))
    head = draw(st.integers(0, 12))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=layers, max_size=layers)))

    return ModelSizes(
        layer_bytes=each(0, 12),
        embed_bytes=draw(st.integers(0, 12)),
        head_bytes=head,
        tied_bytes=draw(st.integers(0, head)),
        kv_bytes=each(0, 2),
        layer_work=tuple(0.1 * work for work in each(0, 5)),
        head_work=0.1 * draw(st.integers(0, 9)),
        context_length=64,
    )


teams = st.lists(st.tuples(st.integers(0, 60), st.sampled_from([0.5, 1.0, 1.7, 3.0])), min_size=1, max_size=4).map(
    lambda ranks: tuple(member(rank, *numbers) for rank, numbers in enumerate(ranks))
)
wishes = st.builds(
    PlanWish,
    kv_tokens=st.none() | st.integers(3, 12),
    kv_tokens_wanted=st.integers(0, 40),
    kv_tokens_needed=st.integers(0, 9),
    workspace_bytes=st.integers(0, 4),
    block_tokens=st.integers(1, 3),
)


def every_split(ranks: int, layers: int) -> Iterator[tuple[Span, ...]]:
    """All splits of the layers and the head, the head counting as item number `layers`."""
    for cuts in combinations_with_replacement(range(layers + 2), ranks - 1):
        yield tuple(
            Span(min(start, layers), min(stop, layers), embed=place == 0, head=start <= layers < stop)
            for place, (start, stop) in enumerate(pairwise((0, *cuts, layers + 1)))
        )


def least_bytes(sizes: ModelSizes, wish: PlanWish, span: Span) -> int:
    """What a rank must be able to hold, said anew from the rules."""
    tokens = wish.kv_tokens if wish.kv_tokens is not None else max(1, wish.kv_tokens_needed)
    down, up = tokens // wish.block_tokens, -(-tokens // wish.block_tokens)
    kv = (down if wish.kv_tokens is not None else up) * wish.block_tokens * sizes.kv_bytes_per_token(span)
    return 0 if span.is_empty else sizes.weight_bytes(span) + kv + wish.workspace_bytes


def fitting(members: tuple[Member, ...], sizes: ModelSizes, wish: PlanWish) -> list[tuple[Span, ...]]:
    return [
        split
        for split in every_split(len(members), sizes.layers)
        if all(least_bytes(sizes, wish, span) <= m.memory_bytes for m, span in zip(members, split, strict=True))
    ]


def check(plan: Plan, members: tuple[Member, ...], sizes: ModelSizes, wish: PlanWish) -> None:
    placed = [layer for stage in plan.stages for layer in range(stage.span.start, stage.span.stop)]
    assert placed == list(range(sizes.layers))
    assert [stage.rank for stage in plan.stages if stage.span.embed] == [0]
    assert [stage.rank for stage in plan.stages if stage.span.head] == [plan.stages[-1].rank]
    ranks = [stage.rank for stage in plan.stages]
    assert ranks == sorted(ranks)
    assert sorted([*ranks, *plan.idle]) == [m.rank for m in members]
    assert plan.kv_tokens % wish.block_tokens == 0
    assert plan.kv_tokens >= 1
    asked = wish.kv_tokens // wish.block_tokens * wish.block_tokens if wish.kv_tokens is not None else None
    assert asked is None or plan.kv_tokens == asked
    tightest = float("inf")
    for stage in plan.stages:
        assert not stage.span.is_empty
        assert stage.weight_bytes == sizes.weight_bytes(stage.span)
        per_token = sizes.kv_bytes_per_token(stage.span)
        assert stage.kv_bytes == plan.kv_tokens * per_token
        room = members[stage.rank].memory_bytes - stage.weight_bytes - wish.workspace_bytes
        assert stage.kv_bytes <= room
        tightest = min(tightest, room / per_token if per_token else float("inf"))
    if asked is None:
        assert plan.kv_tokens + wish.block_tokens > min(tightest, wish.kv_tokens_wanted), "room was left unused"
        assert plan.kv_tokens <= max(wish.kv_tokens_wanted, wish.least_tokens)
    assert sum(stage.work_share for stage in plan.stages) == pytest.approx(1.0) or not sum(sizes.layer_work)


@settings(deadline=None, max_examples=300)
@given(members=teams, sizes=models(), wish=wishes)
def test_balanced_is_optimal_and_refuses_only_what_never_fits(
    members: tuple[Member, ...], sizes: ModelSizes, wish: PlanWish
) -> None:
    possible = fitting(members, sizes, wish)

    def slowest(split: tuple[Span, ...]) -> float:
        return max(sizes.work(span) / m.speed for m, span in zip(members, split, strict=True))

    def fullest(split: tuple[Span, ...]) -> float:
        pairs = zip(members, split, strict=True)
        return max(least_bytes(sizes, wish, span) / max(0.5, m.memory_bytes) for m, span in pairs)

    if not possible:
        with pytest.raises(ValueError, match=".*".join(rf"rank {m.rank} \(host {m.host}\)" for m in members)):
            partition(members, sizes, wish)
        return
    plan = partition(members[::-1], sizes, wish)
    check(plan, members, sizes, wish)
    chosen = tuple(stage.span if (stage := plan.stage_of(m.rank)) else Span(0, 0) for m in members)
    best = min(map(slowest, possible))
    assert slowest(chosen) == pytest.approx(best, rel=1e-6)
    ties = [split for split in possible if slowest(split) <= best * (1 + 1e-9) + 1e-12]
    assert fullest(chosen) == pytest.approx(min(map(fullest, ties)), rel=1e-6)
    assert partition(members, sizes, wish) == plan


@settings(deadline=None, max_examples=200)
@given(members=teams, sizes=models(), wish=wishes, data=st.data())
def test_even_and_manual_fit_or_are_refused_for_a_reason(
    members: tuple[Member, ...], sizes: ModelSizes, wish: PlanWish, data: st.DataObject
) -> None:
    if data.draw(st.booleans()):
        wish = replace(wish, strategy="even")
        each, more = divmod(sizes.layers, len(members))
        counts = [each + 1] * more + [each] * (len(members) - more)
        head = max(place for place, count in enumerate(counts) if count)
    else:
        cuts = sorted(data.draw(st.integers(0, sizes.layers)) for _ in members[1:])
        counts = [stop - start for start, stop in pairwise((0, *cuts, sizes.layers))]
        wish = replace(wish, strategy="manual", layers=tuple(counts))
        head = len(members) - 1
    expected = [
        Span(sum(counts[:place]), sum(counts[: place + 1]), embed=place == 0, head=place == head)
        for place in range(len(members))
    ]
    short = [m for m, s in zip(members, expected, strict=True) if least_bytes(sizes, wish, s) > m.memory_bytes]
    if short:
        named = "; ".join(rf"rank {m.rank} \(host [^;]* too much" for m in short)
        fix = r"plan\.strategy=balanced.* finds a split that fits$" if fitting(members, sizes, wish) else "add ranks"
        with pytest.raises(ValueError, match=f"^the model does not fit: {named}; {fix}"):
            partition(members, sizes, wish)
        return
    plan = partition(members, sizes, wish)
    check(plan, members, sizes, wish)
    assert [stage.span for stage in plan.stages] == [span for span in expected if not span.is_empty]


def test_balanced_counts_the_head_and_the_speed() -> None:
    assert spans(partition(team(999, 999), model(10, head_work=4.0), WISH)) == [
        "0: embeddings + layers 0-6",
        "1: layers 7-9 + head",
    ]
    fast = (member(0), member(1, speed=3.0))
    assert spans(partition(fast, model(8, head_work=0.0), WISH)) == [
        "0: embeddings + layers 0-1",
        "1: layers 2-7 + head",
    ]


def test_memory_bends_the_balance() -> None:
    plan = partition(team(999, 999, 14 + 2 * 4), model(6, head_work=0.0), WISH)
    assert spans(plan) == ["0: embeddings + layers 0-2", "1: layers 3-5 + head"]
    assert plan.idle == (2,)


def test_more_ranks_than_parts_leaves_ranks_idle() -> None:
    plan = partition(team(*[999] * 5), model(2), WISH)
    assert len(plan.stages) + len(plan.idle) == 5
    assert plan.idle
    even = partition(team(*[999] * 5), model(2), replace(WISH, strategy="even"))
    assert spans(even) == ["0: embeddings + layers 0-0", "1: layers 1-1 + head"]
    assert even.idle == (2, 3, 4)


def test_even_gives_the_remainder_to_the_first() -> None:
    plan = partition(team(999, 999, 999), model(8), replace(WISH, strategy="even"))
    assert [stage.span.layers for stage in plan.stages] == [3, 3, 2]


def test_manual_allows_only_the_head_only_the_embeddings_and_nothing() -> None:
    plan = partition(team(*[999] * 4), model(4), replace(WISH, strategy="manual", layers=(0, 4, 0, 0)))
    assert spans(plan) == ["0: embeddings", "1: layers 0-3", "3: head"]
    assert plan.idle == (2,)
    assert [stage.kv_bytes for stage in plan.stages] == [0, 64 * 4, 0]
    assert [stage.work_share for stage in plan.stages] == [0.0, 0.8, 0.2]


def test_ranks_need_not_be_consecutive() -> None:
    plan = partition((member(0), member(5), member(2)), model(6, head_work=0.0), WISH)
    assert [stage.rank for stage in plan.stages] == [0, 2, 5]


def test_kv_room_is_what_the_tightest_rank_has_in_whole_blocks() -> None:
    wish = replace(WISH, strategy="even", kv_tokens_wanted=1000, workspace_bytes=7)
    plan = partition(team(10 + 5 + 7 + 50, 10 + 5 + 7 + 31), model(2), wish)
    assert plan.kv_tokens == 28
    assert partition(team(999, 999), model(2), replace(wish, kv_tokens_wanted=30)).kv_tokens == 28
    assert partition(team(999, 999), model(2), replace(wish, kv_tokens=31)).kv_tokens == 28


def test_tied_weights_are_held_once_on_one_rank() -> None:
    one = partition(team(999), model(2, tied=5), WISH)
    assert one.stages[0].weight_bytes == 25
    two = partition(team(999, 999), model(2, tied=5), replace(WISH, strategy="even"))
    assert [stage.weight_bytes for stage in two.stages] == [15, 15]


@pytest.mark.parametrize("layers", [(3, 3), (3, 3, 2), (8, -1, 0), (7,), ()])
def test_manual_counts_must_match(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"plan\.layers=\[.*the model has 7 layers and the job 3 ranks.*7 in all"):
        partition(team(999, 999, 999), model(7), replace(WISH, strategy="manual", layers=layers))


def test_refusals_name_the_rank_and_the_numbers() -> None:
    with pytest.raises(ValueError, match="the model does not fit: rank 1") as manual:
        partition(team(999, 40), model(4), replace(WISH, strategy="manual", layers=(1, 3)))
    assert (
        "rank 1 (host b) needs 35 B for layers 1-3 + head, 12 B for KV of 4 tokens and 0 B to work in, and may use "
        "40 B: 7 B too much; plan.strategy=balanced without plan.layers finds a split that fits" in str(manual.value)
    )
    with pytest.raises(ValueError, match=r"needs 50 B for weights, 16 B for KV of 4 tokens.* 2 ranks together") as none:
        partition(team(40, 20), model(4), WISH)
    assert "rank 0 (host a)" in str(none.value)
    assert "rank 1 (host b)" in str(none.value)


def test_a_rank_with_no_memory_at_all_is_left_idle_or_refused() -> None:
    assert partition(team(999, 0), model(2), WISH).idle == (1,)
    with pytest.raises(ValueError, match="may use 0 B"):
        partition(team(0, 999), model(2), WISH)


def test_a_large_job() -> None:
    members = tuple(member(rank, 10**6, 1.0 + rank % 3) for rank in range(16))
    plan = partition(members, model(120, head_work=7.3), replace(WISH, kv_tokens_wanted=10**9))
    check(plan, members, model(120, head_work=7.3), replace(WISH, kv_tokens_wanted=10**9))
    assert plan.idle == (15,), "the head is best on the last fast rank"


def held(*layers: int) -> Plan:
    return partition(team(*[10**6] * len(layers)), model(sum(layers)), replace(WISH, strategy="manual", layers=layers))


def times(plan: Plan, sizes: ModelSizes, members: tuple[Member, ...]) -> list[float]:
    speeds = {m.rank: m.speed for m in members}
    return [sizes.work(replace(stage.span, head=False)) / speeds[stage.rank] for stage in plan.stages]


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    seconds=st.lists(st.sampled_from([0.2, 0.5, 1.0, 4.0]), min_size=4, max_size=4),
    head=st.sampled_from([0.25, 2.0]),
)
def test_measured_times_are_explained(counts: list[int], seconds: list[float], head: float) -> None:
    plan = held(*counts)
    took = [seconds[stage.rank] if stage.span.layers else 0.0 for stage in plan.stages]
    sizes, members = measured(
        model(sum(counts)), plan, team(*[999] * len(counts)), layer_seconds=took, head_seconds=head
    )
    assert times(plan, sizes, members) == pytest.approx(took)
    assert sizes.head_work / members[-1].speed == pytest.approx(head)
    assert all(m.speed == 1.0 for m, count in zip(members, counts, strict=True) if not count)
    again = measured(sizes, plan, members, layer_seconds=took, head_seconds=head)
    assert again[0].layer_work == pytest.approx(sizes.layer_work)
    assert [m.speed for m in again[1]] == pytest.approx([m.speed for m in members])


def test_a_slow_host_is_told_from_slow_layers() -> None:
    plan = held(4, 4)
    sizes, members = measured(model(8), plan, team(999, 999), layer_seconds=[1.0, 3.0], head_seconds=0.0)
    assert members[0].speed == pytest.approx(3 * members[1].speed)
    assert len(set(sizes.layer_work)) == 1
    assert sizes.head_work == pytest.approx(sizes.layer_work[0]), "what was not measured keeps its proportion"
    better = rebalanced(plan, members, sizes, WISH, min_gain=0.1)
    assert better is not None
    assert [stage.span.layers for stage in better.stages] == [7, 1]


def test_without_times_nothing_changes() -> None:
    members = team(999, 999)
    assert measured(model(8), held(4, 4), members, layer_seconds=[0, 0], head_seconds=1.0) == (model(8), members)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1234, "1.23 kB"),
        (45_600_000, "45.6 MB"),
        (269_060_552, "269 MB"),
        (10**10, "10.0 GB"),
    ],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text


def mixed() -> tuple[ModelSizes, tuple[Member, ...]]:
    """Three ranks, of which the last two hold layers in half of the bytes and do half of the work."""
    half = replace(model(12, head_work=1.0), layer_bytes=(5,) * 12, layer_work=(0.5,) * 12)
    return replace(model(12, head_work=2.0), quantized=half), tuple(
        replace(each, quantizes=each.rank > 0) for each in team(999, 999, 999)
    )


def test_ranks_that_quantize_get_more_layers() -> None:
    sizes, members = mixed()
    plan = partition(members, sizes, WISH)
    assert [stage.span.layers for stage in plan.stages] == [3, 5, 4]
    assert [stage.weight_bytes for stage in plan.stages] == [5 + 30, 25, 20 + 5]
    assert sum(stage.work_share for stage in plan.stages) == pytest.approx(1)
    exact = partition(tuple(replace(each, quantizes=False) for each in members), sizes, WISH)
    assert sum(stage.weight_bytes for stage in exact.stages) == 5 + 120 + 5


def test_ranks_that_quantize_hold_what_would_not_fit() -> None:
    sizes, members = mixed()
    small = tuple(replace(each, memory_bytes=60) for each in members)
    assert partition(small, sizes, WISH).kv_tokens >= WISH.kv_tokens_needed
    with pytest.raises(ValueError, match="does not fit"):
        partition(tuple(replace(each, memory_bytes=48, quantizes=False) for each in members), sizes, WISH)


def test_a_measured_head_tells_of_both_kinds() -> None:
    sizes, members = mixed()
    plan = partition(members, sizes, WISH)
    took = [6.0 if stage.rank == 0 else 5.0 for stage in plan.stages]
    after, ranks = measured(sizes, plan, members, layer_seconds=took, head_seconds=3.0)
    assert after.quantized is not None
    assert after.quantized.head_work / ranks[-1].speed == pytest.approx(3.0)
    assert after.head_work == pytest.approx(2 * after.quantized.head_work)
    layers = [after.on(m).work(replace(s.span, head=False)) / m.speed for m, s in zip(ranks, plan.stages, strict=True)]
    assert layers == pytest.approx(took)
