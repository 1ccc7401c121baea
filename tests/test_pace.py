"""Chunks of prompts grow while the ring is quick, and shrink before a step comes near the deadline."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distllm.engine.pace import FIRST_CHUNK, SHARE, Pace

DEADLINE_S = 20.0


def settle(pace: Pace, seconds_per_token: float, steps: int = 12) -> None:
    for _ in range(steps):
        pace.see(pace.chunk, pace.chunk * seconds_per_token)


def test_a_quick_ring_soon_takes_whole_chunks() -> None:
    pace = Pace(256, DEADLINE_S)
    assert pace.chunk == FIRST_CHUNK
    settle(pace, 1e-4, steps=2)
    assert pace.chunk == 256


def test_a_chunk_is_never_larger_than_configured() -> None:
    pace = Pace(5, DEADLINE_S)
    assert pace.chunk == 5
    settle(pace, 1e-6)
    assert pace.chunk == 5


@given(st.integers(1, 4096), st.floats(1e-6, SHARE * DEADLINE_S))
def test_steps_stay_within_their_share(most: int, seconds_per_token: float) -> None:
    pace = Pace(most, DEADLINE_S)
    settle(pace, seconds_per_token)
    assert pace.chunk == 1 or pace.chunk * seconds_per_token <= SHARE * DEADLINE_S * 1.001
    assert pace.chunk == most or 2 * (pace.chunk + 1) * seconds_per_token > SHARE * DEADLINE_S


def test_steps_that_were_under_way_do_not_shrink_it_again() -> None:
    pace = Pace(256, DEADLINE_S)
    settle(pace, 1e-4)
    assert pace.see(256, 2 * SHARE * DEADLINE_S)
    assert not pace.see(256, 2 * SHARE * DEADLINE_S)
    assert pace.chunk == 128


def test_it_comes_back_from_one_slow_step() -> None:
    pace = Pace(256, DEADLINE_S)
    assert pace.see(1, 100 * DEADLINE_S)
    assert pace.chunk == 1
    settle(pace, 1e-4)
    assert pace.chunk == 256


def test_short_prompts_say_nothing_about_long_ones() -> None:
    pace = Pace(256, DEADLINE_S)
    assert not pace.see(FIRST_CHUNK - 1, 1e-3)
    assert pace.chunk == FIRST_CHUNK
