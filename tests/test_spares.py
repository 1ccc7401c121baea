"""Spares hold what may be lost: everything where there is room, else a part each."""

from __future__ import annotations

from test_partition import WISH, member, model, team
from test_replan import without

from distllm.plan.partition import partition
from distllm.plan.replan import replanned
from distllm.plan.spares import warm_stages


def test_a_spare_with_room_holds_everything() -> None:
    sizes, members = model(12, head_work=0.0), team(1000, 1000, 1000)
    plan = partition(members, sizes, WISH)
    (stage,) = warm_stages(plan, [member(3, 1000)], sizes, WISH)
    assert (stage.rank, str(stage.span)) == (3, "embeddings + layers 0-11 + head")
    assert stage.weight_bytes == sizes.weight_bytes(stage.span)


def test_spares_without_room_share_the_parts_of_others() -> None:
    sizes, members = model(12, head_work=0.0), team(1000, 1000, 1000)
    plan = partition(members, sizes, WISH)
    stages = warm_stages(plan, [member(3, 80), member(4, 80), member(5, 80)], sizes, WISH)
    assert [str(stage.span) for stage in stages] == ["layers 8-11 + head", "layers 4-7", "layers 8-11 + head"]
    assert warm_stages(plan, [member(3, 10)], sizes, WISH) == []


def test_who_holds_the_part_of_the_lost_rank_takes_it() -> None:
    sizes, members = model(12, head_work=0.0), team(*[1000] * 5)
    plan = partition(without(members, 3, 4), sizes, WISH)
    held = {stage.rank: stage.span for stage in plan.stages}
    held |= {stage.rank: stage.span for stage in warm_stages(plan, [member(3, 80), member(4, 80)], sizes, WISH)}
    after = replanned(plan, without(members, 1), sizes, WISH, held=held, most=3)
    assert [stage.rank for stage in after.stages] == [0, 4, 2], "rank 4 has layers 4-7"
    assert [stage.span for stage in after.stages] == [stage.span for stage in plan.stages]
