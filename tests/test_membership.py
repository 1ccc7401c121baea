"""Ranks that are lost again and again are kept out longer and longer."""

from __future__ import annotations

from distllm.plan.membership import FIRST_S, MEMORY_S, MOST_S, Losses


def test_one_loss_keeps_nobody_out_and_several_do() -> None:
    losses = Losses()
    assert losses.out_until("here", 100.0) == 100.0
    losses.add("here", 100.0)
    assert losses.out_until("here", 101.0) == 101.0
    losses.add("here", 110.0)
    assert losses.out_until("here", 111.0) == 110.0 + FIRST_S
    assert losses.out_until("here", 110.0 + FIRST_S) == 110.0 + FIRST_S
    losses.add("here", 120.0)
    assert losses.out_until("here", 121.0) == 120.0 + 2 * FIRST_S
    assert losses.count("here", 121.0) == 3
    assert losses.out_until("there", 121.0) == 121.0


def test_it_has_an_end_and_is_forgotten() -> None:
    losses = Losses()
    for time in range(40):
        losses.add("here", float(time))
    assert losses.out_until("here", 40.0) == 39.0 + MOST_S
    assert losses.count("here", 39.0 + MEMORY_S) == 0
    assert losses.out_until("here", 39.0 + MEMORY_S) == 39.0 + MEMORY_S
