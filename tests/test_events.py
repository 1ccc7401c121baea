"""What the live page is told of the server and its ranks."""

from __future__ import annotations

from typing import Any

from distllm.core import Member, Span
from distllm.engine import chronicle
from distllm.engine.chronicle import Chronicle
from distllm.serve import events
from distllm.serve.events import Events


def member(rank: int, pid: int = 7) -> Member:
    return Member(life=f"{rank}-{pid}", rank=rank, host="a", boot_id="a", pid=pid, memory_bytes=1, cores=1)


def told(of: Chronicle) -> Any:
    return of.told()["happenings"]


def test_what_rank_0_tells_again_is_one_event() -> None:
    ranks, front = Chronicle(), Events()
    front.add("started", "the server")
    ranks.note("changed", "one")
    front.hear(told(ranks))
    ranks.note("changed", "two")
    front.hear(told(ranks))
    front.hear(told(ranks))
    assert [(each["id"], each["text"]) for each in front.told()] == [(1, "the server"), (2, "one"), (3, "two")]
    assert [each["time"] for each in front.told()[1:]] == [each["time"] for each in told(ranks)]
    front.forget_rank0()
    again = Chronicle()
    again.note("changed", "three")
    front.hear(told(again))
    assert front.told()[-1]["text"] == "three"


def test_only_the_newest_are_kept() -> None:
    ranks, front = Chronicle(), Events()
    for number in range(3 * events.KEPT):
        ranks.note("changed", str(number))
        front.add("failed", str(number))
    assert len(told(ranks)) == chronicle.KEPT
    assert [each["text"] for each in front.told()] == [str(each) for each in range(2 * events.KEPT, 3 * events.KEPT)]


def test_who_listens_is_told_of_each_change_when_it_can_be_read() -> None:
    ranks = Chronicle()
    read: list[Any] = []
    ranks.on_change(lambda: read.append(ranks.told()))
    ranks.broken()
    ranks.lost({member(1): Span(11, 22)}, "it is lost")
    ranks.mended("the others go on")
    ranks.joined(member(1, pid=8))
    assert [each["mending"] for each in read] == [True, True, False, False]
    assert [len(each["missing"]) for each in read] == [0, 1, 1, 0]
    kinds = ["lost", "recovered", "joined"]
    assert [[one["kind"] for one in each["happenings"]] for each in read] == [kinds[:count] for count in range(4)]


def test_who_is_lost_is_missing_until_another_comes_in_its_place() -> None:
    ranks = Chronicle()
    ranks.lost({member(1): Span(11, 22), member(2): None}, "both are lost")
    ranks.lost({}, "the ring broke although every rank answers")
    missing: Any = ranks.told()["missing"]
    assert [(each["rank"], each["layers"], each["why"]) for each in missing] == [
        (1, (11, 22), "both are lost"),
        (2, None, "both are lost"),
    ]
    ranks.joined(member(1, pid=8))
    assert [each["rank"] for each in ranks.told()["missing"]] == [2]  # type: ignore[attr-defined]
    assert [each["kind"] for each in told(ranks)] == ["lost", "broke", "joined"]
