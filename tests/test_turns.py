"""Turns: every client gets its own, however much another one asks for."""

from __future__ import annotations

from distllm.serve.turns import Turns


def test_clients_take_turns_and_each_keeps_its_order() -> None:
    turns: Turns[int] = Turns()
    for item in range(5):
        turns.add("greedy", item)
    for item in (10, 11):
        turns.add("modest", item)
    turns.add("late", 20)
    assert len(turns) == 8
    assert [turns.next() for _ in range(8)] == [0, 10, 20, 1, 11, 2, 3, 4]
    assert len(turns) == 0


def test_one_that_comes_anew_waits_for_those_that_wait() -> None:
    turns: Turns[str] = Turns()
    for item in ("a1", "a2", "a3"):
        turns.add("a", item)
    turns.add("b", "b1")
    assert [turns.next(), turns.next()] == ["a1", "b1"]
    turns.add("b", "b2")
    assert [turns.next() for _ in range(3)] == ["a2", "b2", "a3"]


def test_what_is_taken_back_is_not_given() -> None:
    turns: Turns[int] = Turns()
    for item in (1, 2):
        turns.add("a", item)
    assert turns.remove("a", 1)
    assert not turns.remove("a", 1)
    assert not turns.remove("b", 2)
    assert turns.next() == 2
    assert len(turns) == 0
