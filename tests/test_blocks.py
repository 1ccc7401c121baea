"""The allocator of KV blocks: against plain sets, and where it puts things."""

from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.plan.blocks import BlockPool

Operation = tuple[int, int, int]  # owner, blocks (0 releases), more expected


def blocks_of(pool: BlockPool, owner: int) -> list[int]:
    return [block for first, count in pool.runs(owner) for block in range(first, first + count)]


@settings(deadline=None, max_examples=150)
@given(
    size=st.integers(1, 40),
    operations=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 12), st.integers(0, 20)), max_size=60),
)
def test_every_block_has_one_owner_or_is_free(size: int, operations: list[Operation]) -> None:
    pool = BlockPool(size)
    owned: dict[int, list[int]] = {}
    for owner, count, more in operations:
        if count == 0:
            pool.release(owner)
            owned.pop(owner, None)
        else:
            count = min(count, pool.free)
            pool.take(owner, count, expected=len(owned.get(owner, [])) + count + more)
            now = blocks_of(pool, owner)
            assert now[: len(owned.get(owner, []))] == owned.get(owner, []), "a block changed its position"
            assert len(now) == len(owned.get(owner, [])) + count == pool.held(owner)
            owned[owner] = now
        everybody = [block for blocks in owned.values() for block in blocks]
        assert len(everybody) == len(set(everybody)), "a block with two owners"
        assert set(everybody) <= set(range(size))
        assert (pool.free, pool.used) == (size - len(everybody), len(everybody))
        assert {owner: blocks_of(pool, owner) for owner in owned} == owned
    for owner in owned:
        pool.release(owner)
    pool.take(99, size, expected=size)
    assert pool.runs(99) == ((0, size),), "gaps were not joined"


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 10)), min_size=1, max_size=8), data=st.data())
def test_a_request_stays_one_run_while_all_expectations_fit(
    lengths: list[tuple[int, int]], data: st.DataObject
) -> None:
    pool = BlockPool(sum(start + more for start, more in lengths))
    for owner, (start, more) in enumerate(lengths):
        pool.take(owner, start, expected=start + more)
    growing = [owner for owner, (_, more) in enumerate(lengths) for _ in range(more)]
    for owner in data.draw(st.permutations(growing)):
        pool.take(owner, 1, expected=sum(lengths[owner]))
    assert pool.free == 0
    assert [len(pool.runs(owner)) for owner in range(len(lengths))] == [1] * len(lengths)


def with_gaps() -> BlockPool:
    """Twenty blocks with gaps of 3 (at 2), 5 (at 6) and 4 (at 12); owner 9 has the rest and expects no more."""
    pool = BlockPool(20)
    for owner, count in enumerate((2, 3, 1, 5, 1, 4, 4)):
        pool.take(owner, count, expected=count)
    for owner in (1, 3, 5):
        pool.release(owner)
    return pool


def test_a_placement_takes_the_smallest_gap_for_the_expected_length() -> None:
    pool = with_gaps()
    pool.take(10, 1, expected=4)
    assert pool.runs(10) == ((12, 1),)


def test_a_placement_without_such_a_gap_takes_the_largest() -> None:
    pool = with_gaps()
    pool.take(10, 1, expected=9)
    assert pool.runs(10) == ((6, 1),)


def test_placements_keep_out_of_what_others_expect() -> None:
    pool = BlockPool(20)
    pool.take(1, 2, expected=8)
    pool.take(2, 2, expected=4)
    assert pool.runs(2) == ((8, 2),)
    pool.take(1, 6, expected=8)
    assert pool.runs(1) == ((0, 8),)


def test_expectations_never_refuse_free_blocks_and_leave_half_of_the_gap() -> None:
    pool = BlockPool(10)
    pool.take(1, 2, expected=10)
    pool.take(2, 1, expected=1)
    assert pool.runs(2) == ((6, 1),)
    pool.take(3, 7, expected=7)
    assert pool.free == 0
    assert pool.held(3) == 7


def test_a_long_row_is_not_cut_for_a_neighbours_expectation() -> None:
    pool = BlockPool(10)
    pool.take(1, 2, expected=10)
    pool.take(2, 7, expected=7)
    assert pool.runs(2) == ((3, 7),)


def test_a_blocked_owner_goes_on_elsewhere() -> None:
    pool = BlockPool(8)
    pool.take(1, 2, expected=2)
    pool.take(2, 2, expected=2)
    pool.take(1, 2, expected=4)
    assert pool.runs(1) == ((0, 2), (4, 2))


def test_strangers_have_nothing_and_release_nothing() -> None:
    pool = BlockPool(4)
    pool.release(7)
    assert (pool.runs(7), pool.held(7), pool.free) == ((), 0, 4)
