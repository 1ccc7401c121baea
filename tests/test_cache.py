"""Where tokens lie: every position of a row has one place, and a view of a row is its places in order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.core import Row, Step
from distllm.model.cache import KVCache, KVShape, Layout, RowPlace

CPU = torch.device("cpu")


def row(runs: tuple[tuple[int, int], ...], start: int, stop: int) -> Row:
    return Row(request=0, slot=0, start=start, tokens=(0,) * (stop - start), runs=runs, samples=False)


def layout(*rows: Row, block: int = 4) -> Layout:
    return Layout.of(Step(0, rows), block, CPU)


def storage(tokens: int, heads: int = 2, size: int = 3) -> torch.Tensor:
    """Numbers that name their place: element (g, n, k) is in the tens of n."""
    return (torch.arange(tokens) * 10)[None, :, None] + torch.zeros(heads, 1, size, dtype=torch.long)


def seen(place: RowPlace, since: int = 0, room: int = 64) -> list[int]:
    """The places that a view shows, in order."""
    return [int(n) // 10 for n in place.view(storage(room), since)[0, :, 0]]


@st.composite
def block_tables(draw: st.DrawFn) -> tuple[int, list[int], tuple[tuple[int, int], ...]]:
    """A block size, the blocks of a row in order of position, and the same blocks as runs, joined or not."""
    size = draw(st.integers(1, 5))
    blocks = draw(st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True))
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and sum(runs[-1]) == block and draw(st.booleans()):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return size, blocks, tuple(runs)


@settings(deadline=None)
@given(block_tables(), st.data())
def test_every_position_has_its_place(table: tuple[int, list[int], tuple[tuple[int, int], ...]], data: st.DataObject):
    size, blocks, runs = table
    stop = data.draw(st.integers(1, size * len(blocks)))
    start = data.draw(st.integers(0, stop - 1))
    since = data.draw(st.integers(0, stop - 1))
    expected = [blocks[position // size] * size + position % size for position in range(stop)]
    found = layout(row(runs, start, stop), block=size)
    assert found.positions_T.tolist() == list(range(start, stop))
    assert found.places_T.tolist() == expected[start:]
    assert seen(found.rows[0], since, room=31 * size) == expected[since:]


def test_rows_are_packed_one_after_the_other() -> None:
    found = layout(row(((0, 2),), 3, 8), row(((5, 1), (2, 1)), 0, 6), row(((4, 1),), 2, 3))
    assert found.positions_T.tolist() == [3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 2]
    assert found.places_T.tolist() == [3, 4, 5, 6, 7, 20, 21, 22, 23, 8, 9, 18]
    assert [(place.first, place.tokens) for place in found.rows] == [(0, 5), (5, 6), (11, 1)]
    assert found.positions_T.dtype == found.places_T.dtype == torch.int64


def test_a_step_without_rows_has_no_places() -> None:
    assert layout().places_T.shape == (0,)


@pytest.mark.parametrize(
    ("start", "stop", "extents"),
    [
        (0, 1, ((8, 1),)),
        (0, 4, ((8, 4),)),
        (3, 5, ((8, 4), (20, 1))),
        (4, 8, ((8, 4), (20, 4))),
        (8, 9, ((8, 4), (20, 5))),
        (11, 12, ((8, 4), (20, 8))),
    ],
)
def test_extents_end_with_the_row(start: int, stop: int, extents: tuple[tuple[int, int], ...]) -> None:
    """At both sides of every edge of a block."""
    assert layout(row(((2, 1), (5, 2)), start, stop)).rows[0].extents == extents


def test_too_few_blocks_are_noticed() -> None:
    with pytest.raises(AssertionError, match="blocks for 8 of 9 tokens"):
        layout(row(((2, 1), (5, 1)), 8, 9))


def test_one_run_is_viewed_in_place() -> None:
    numbers = storage(64)
    place = layout(row(((3, 4),), 0, 14)).rows[0]
    view = place.view(numbers)
    assert view.untyped_storage().data_ptr() == numbers.untyped_storage().data_ptr()
    assert view.shape == (2, 14, 3)
    numbers[1, 12 + 13, 2] = -1
    assert view[1, 13, 2] == -1


def test_several_runs_are_gathered() -> None:
    numbers = storage(64)
    view = layout(row(((3, 1), (9, 1)), 0, 8)).rows[0].view(numbers)
    assert view.untyped_storage().data_ptr() != numbers.untyped_storage().data_ptr()
    assert [int(n) // 10 for n in view[1, :, 2]] == [12, 13, 14, 15, 36, 37, 38, 39]


def test_a_window_within_the_last_run_is_viewed_in_place() -> None:
    numbers = storage(64)
    place = layout(row(((3, 1), (9, 2)), 9, 10)).rows[0]
    assert place.view(numbers, 4).untyped_storage().data_ptr() == numbers.untyped_storage().data_ptr()
    assert seen(place, 4) == [36, 37, 38, 39, 40, 41]
    assert seen(place, 3) == [15, 36, 37, 38, 39, 40, 41]


def test_a_cache_has_the_layers_shapes() -> None:
    cache = KVCache({2: KVShape(2, 8, 6), 4: KVShape(3, 4, 4)}, tokens=10, dtype=torch.bfloat16, device=CPU)
    keys, values = cache[2]
    assert (keys.shape, values.shape) == ((2, 10, 8), (2, 10, 6))
    assert cache[4][1].shape == (3, 10, 4)
    assert keys.dtype == values.dtype == torch.bfloat16
    assert cache.nbytes == 10 * 2 * (KVShape(2, 8, 6).numbers + KVShape(3, 4, 4).numbers) == 10 * 2 * (28 + 24)
    with pytest.raises(KeyError):
        cache[0]


def test_copies_are_made_in_their_order() -> None:
    cache = KVCache({0: KVShape(2, 3, 3), 1: KVShape(1, 4, 2)}, tokens=24, dtype=torch.float32, device=CPU)
    for layer in (0, 1):
        for part in cache[layer]:
            part.copy_(torch.arange(24.0)[None, :, None].expand_as(part))
    cache.copy([(0, 3, 2), (5, 0, 1)], block_tokens=4)
    expected = [20, 21, 22, 23, *range(4, 12), *range(8), *range(20, 24)]
    for layer in (0, 1):
        for part in cache[layer]:
            assert part[-1, :, -1].tolist() == expected


def test_no_memory_for_keys_and_values() -> None:
    """More than the address space of any machine of today."""
    shapes = dict.fromkeys(range(2), KVShape(2, 16, 8))
    tokens = 2**45
    nbytes = 2 * 2 * 24 * 2 * tokens
    wanted = f"cpu has no memory for {nbytes:,} bytes of KV, those of {tokens} tokens; lower engine.kv_tokens"
    with pytest.raises(ValueError, match="no memory") as error:
        KVCache(shapes, tokens, torch.bfloat16, CPU)
    assert wanted in str(error.value)
