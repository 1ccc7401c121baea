"""Beginnings that requests share: who has most of one, what is kept of those that ended, and what gives way."""

import pytest

from distllm.plan.blocks import BlockPool
from distllm.plan.prefixes import LEAST_ALIKE, Prefixes

A, B, C = (1, 2), (3, 4), (5, 6)


class Owners:
    """A pool, the beginnings of its owners, and how much each has computed."""

    def __init__(self, blocks: int = 20, most: int = 10) -> None:
        self.pool = BlockPool(blocks)
        self.computed: dict[int, int] = {}
        self.prefixes = Prefixes(self.pool, 2, most, self.computed.__getitem__)

    def run(self, owner: int, *tokens: int, computed: int = 0) -> None:
        self.computed[owner] = computed
        self.pool.take(owner, len(tokens) // 2, expected=len(tokens) // 2)
        self.prefixes.add(owner, tokens)

    def keep(self, owner: int, *tokens: int) -> None:
        self.run(owner, *tokens)
        self.prefixes.keep(owner, tokens)


def test_who_has_computed_most_of_a_beginning() -> None:
    owners = Owners()
    owners.run(1, *A, *B, *C, computed=4)
    owners.run(2, *A, *B, *A, computed=6)
    owners.keep(3, *A, *B)
    assert owners.prefixes.best((*A, *B, *C, 9)) == (1, 2), "of those with two blocks, who goes on alike"
    owners.computed[1] = 6
    assert owners.prefixes.best((*A, *B, *C, 9)) == (1, 3)
    assert owners.prefixes.best((*A, *B, 5)) == (3, 2)
    assert owners.prefixes.best((*A, *C)) == (None, 0), "one block is not worth it"
    assert owners.prefixes.best((*B, *C)) == (None, 0)
    assert owners.prefixes.best(()) == (None, 0)


def test_who_is_about_to_have_more() -> None:
    owners = Owners()
    owners.run(1, *A, *B, *C, computed=2)
    owners.run(2, *A, *B, computed=2)
    assert owners.prefixes.expects((*A, *B, *C), lambda owner: owner == 1)
    assert not owners.prefixes.expects((*A, *B, *C), lambda owner: owner == 2), "one block is not worth waiting for"
    owners.keep(3, *A, *B)
    assert not owners.prefixes.expects((*A, *B, *C), lambda owner: owner == 1)


def test_the_longer_of_two_is_kept() -> None:
    owners = Owners()
    owners.keep(1, *A, *B, *C)
    owners.keep(2, *A, *B)
    assert (owners.pool.held(1), owners.pool.held(2), owners.prefixes.kept_blocks) == (3, 0, 3)
    owners.keep(3, *A, *B, *C, *A)
    assert (owners.pool.held(1), owners.pool.held(3), owners.prefixes.kept_blocks) == (0, 4, 4)
    owners.keep(4, *A, *B, *A)
    assert owners.prefixes.kept_blocks == 7, "these two go on differently"


def test_of_those_that_differ_in_their_ends_the_last_is_kept() -> None:
    owners = Owners(blocks=40, most=30)
    for owner, end in enumerate((*A, *B)):
        owners.keep(owner, *A * 7, end, end)
    assert [owners.prefixes.has(owner) for owner in range(4)] == [0, 0, 0, 8], "an eighth of each is its own"
    owners.keep(9, *A * 6, *B, *B)
    assert [owners.prefixes.has(owner) for owner in (3, 9)] == [8, 8], "these differ in a quarter"


def test_only_whole_blocks_are_kept() -> None:
    owners = Owners()
    owners.pool.take(1, 3, expected=9)
    owners.prefixes.keep(1, (*A, *B, 5))
    assert (owners.pool.held(1), owners.pool.free) == (2, 18)
    owners.pool.take(2, 1, expected=1)
    owners.prefixes.keep(2, (7,))
    assert (owners.pool.held(2), owners.pool.free) == (0, 18)


@pytest.mark.parametrize("most", [0, 1, 2])
def test_no_more_than_the_most_is_kept(most: int) -> None:
    owners = Owners(most=most)
    owners.keep(1, *A, *B, *C)
    kept = most if most >= LEAST_ALIKE else 0
    assert (owners.prefixes.kept_blocks, owners.pool.free) == (kept, 20 - kept)


def test_what_is_used_gives_way_last() -> None:
    owners = Owners(most=5)
    owners.keep(1, *A, *B)
    owners.keep(2, *C, *B)
    assert owners.prefixes.best((*A, *B, 9)) == (1, 2)
    owners.keep(3, *B, *B)
    assert [owners.prefixes.has(owner) for owner in (1, 2, 3)] == [2, 0, 2]
    owners.prefixes.clear()
    assert owners.pool.free == 20


def test_taking_over_frees_what_is_left() -> None:
    owners = Owners()
    owners.keep(1, *A, *B, *C)
    assert not owners.prefixes.may_adopt(1, 2, needed=3), "a third would be lost"
    assert owners.prefixes.may_adopt(1, 3, needed=3)
    assert owners.prefixes.may_adopt(1, 2, needed=18), "there is no room beside it"
    owners.prefixes.adopt(1, 7, 2)
    assert (owners.pool.runs(7), owners.pool.free, owners.prefixes.kept_blocks) == (((0, 2),), 18, 0)
    assert owners.prefixes.best((*A, *B, *C)) == (None, 0)


def test_copies_go_from_run_to_run() -> None:
    owners = Owners(blocks=12)
    for owner, count in ((1, 2), (2, 1), (3, 3), (4, 2)):
        owners.pool.take(owner, count, expected=count)
    owners.pool.take(1, 2, expected=4)
    owners.pool.take(5, 2, expected=2)
    owners.pool.release(2)
    owners.pool.take(5, 1, expected=3)
    assert (owners.pool.runs(1), owners.pool.runs(5)) == (((0, 2), (8, 2)), ((10, 2), (2, 1)))
    assert owners.prefixes.copies(1, 5, 3) == ((0, 10, 2), (8, 2, 1))
    assert owners.prefixes.copies(5, 1, 3) == ((10, 0, 2), (2, 8, 1))


def test_room_is_made_in_one_run() -> None:
    owners = Owners(blocks=12)
    for owner in range(4):
        owners.keep(owner, owner, owner, *A, *B)
    owners.prefixes.best((2, 2, *A, *B))
    owners.prefixes.make_room(9, 4, expected=5)
    assert [owners.prefixes.has(owner) for owner in range(4)] == [0, 0, 3, 3], "two blocks would do, but not in one run"
    owners.pool.take(9, 4, expected=5)
    owners.prefixes.make_room(9, 3, expected=7)
    assert [owners.prefixes.has(owner) for owner in range(4)] == [0, 0, 0, 3], "it stood in the way"
    owners.prefixes.make_room(8, 8, expected=8)
    assert owners.prefixes.kept_blocks == 0
