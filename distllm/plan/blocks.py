"""Which KV blocks a request holds.

Attention views one contiguous run of blocks in place and must gather several, so the pool gives runs wherever it can.
Knows only counts and block numbers; not what a block stores, nor why an owner wants it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

Run = tuple[int, int]
"""First block and number of blocks."""


@dataclass(slots=True)
class Holding:
    """What one owner has, in order of position, and how many blocks it expects to have in the end."""

    expected: int
    runs: list[Run] = field(default_factory=list)
    blocks: int = 0

    @property
    def tail(self) -> int:
        """The block that would lengthen the last run; -1 if there is no run."""
        return sum(self.runs[-1]) if self.runs else -1

    @property
    def missing(self) -> int:
        return max(0, self.expected - self.blocks)

    def append(self, first: int, count: int) -> None:
        if first == self.tail:
            start, length = self.runs[-1]
            self.runs[-1] = (start, length + count)
        else:
            self.runs.append((first, count))
        self.blocks += count


class BlockPool:
    """The KV blocks 0 .. blocks-1 and their owners.

    An owner grows into the blocks behind its last run while they are free. The first blocks of an owner go where its
    whole expected length fits, and not into the blocks that others expect to grow into. That is a preference: `take`
    never refuses blocks that are free.

    The cost of every call grows with the number of owners and gaps, not of blocks. One block has one owner.
    """

    def __init__(self, blocks: int) -> None:
        assert blocks >= 1, "a pool without blocks"
        self.blocks = blocks
        self.free = blocks
        self._gaps: list[Run] = [(0, blocks)]  # sorted, never two side by side
        self._holdings: dict[int, Holding] = {}

    @property
    def used(self) -> int:
        return self.blocks - self.free

    def held(self, owner: int) -> int:
        """Number of blocks that an owner has."""
        holding = self._holdings.get(owner)
        return holding.blocks if holding else 0

    def runs(self, owner: int) -> tuple[Run, ...]:
        """An owner's blocks in order of position, as pairs of (first block, blocks)."""
        holding = self._holdings.get(owner)
        return tuple(holding.runs) if holding else ()

    def take(self, owner: int, count: int, *, expected: int) -> None:
        """Gives an owner `count` more blocks behind those it has; at most `free`.

        Args:
            expected: blocks that the owner is likely to have in the end, those it has included.
        """
        assert 0 <= count <= self.free, f"{count} blocks wanted of {self.free} free ones"
        holding = self._holdings.setdefault(owner, Holding(expected))
        holding.expected = expected
        while count:
            first, length = self._at_tail(holding) or self._place(count, max(count, holding.missing))
            taken = min(count, length)
            self._cut(first, taken)
            holding.append(first, taken)
            count -= taken

    def release(self, owner: int) -> None:
        """Frees all blocks of an owner; one that has none is no mistake."""
        holding = self._holdings.pop(owner, None)
        for run in holding.runs if holding else ():
            self._give_back(*run)

    def trim(self, owner: int, blocks: int, *, expected: int) -> None:
        """Frees all blocks of an owner but the first ones; `expected` as in `take`."""
        holding = self._holdings[owner]
        while holding.blocks > blocks:
            first, length = holding.runs.pop()
            cut = min(length, holding.blocks - blocks)
            if cut < length:
                holding.runs.append((first, length - cut))
            holding.blocks -= cut
            self._give_back(first + length - cut, cut)
        holding.expected = expected

    def rename(self, owner: int, name: int) -> None:
        """An owner's blocks are those of another, who has none."""
        assert name not in self._holdings, "who takes over blocks has none"
        self._holdings[name] = self._holdings.pop(owner)

    def behind(self, owner: int, count: int) -> int | None:
        """Who has the first block that is not free of the `count` ones behind an owner's last; None if all are."""
        tail = self._holdings[owner].tail
        runs = ((first, other) for other, holding in self._holdings.items() for first, _ in holding.runs)
        return min(((first, other) for first, other in runs if tail <= first < tail + count), default=(0, None))[1]

    def widest(self, without: Iterable[int] = ()) -> int:
        """The most blocks in one run that are free, or would be without some owners."""
        runs = sorted([*self._gaps, *(run for owner in without for run in self._holdings[owner].runs)])
        widest = length = end = 0
        for first, count in runs:
            length = length + count if first == end else count
            end = first + count
            widest = max(widest, length)
        return widest

    def _at_tail(self, holding: Holding) -> Run | None:
        """The gap right behind an owner's last run."""
        place = bisect_left(self._gaps, (holding.tail, 0))
        if place < len(self._gaps) and self._gaps[place][0] == holding.tail:
            return self._gaps[place]
        return None

    def _place(self, count: int, expected: int) -> Run:
        """Where a new run of `count` blocks begins, and how long it could get.

        The smallest unreserved gap for the expected length, else the largest for `count`, else room is made between
        an owner and the end of the gap that it expects to grow into.
        """
        reserved = {holding.tail: holding.missing for holding in self._holdings.values()}
        open_parts = [(first + skip, length - skip) for first, length, skip in self._skips(reserved) if length > skip]
        if roomy := [part for part in open_parts if part[1] >= expected]:
            return min(roomy, key=lambda part: (part[1], part[0]))
        if large := [part for part in open_parts if part[1] >= count]:
            return max(large, key=lambda part: (part[1], -part[0]))
        first, length = max(self._gaps, key=lambda gap: (gap[1], -gap[0]))
        skip = min(reserved.get(first, 0), length // 2, max(0, length - count))
        return first + skip, length - skip

    def _skips(self, reserved: dict[int, int]) -> list[tuple[int, int, int]]:
        """Every gap, and how many of its first blocks the owner in front of it expects to take."""
        return [(first, length, reserved.get(first, 0)) for first, length in self._gaps]

    def _cut(self, first: int, count: int) -> None:
        """Takes blocks [first, first + count) out of the gap that has them."""
        place = bisect_left(self._gaps, (first + 1, 0)) - 1
        start, length = self._gaps[place]
        stop = start + length
        assert start <= first < first + count <= stop, "these blocks are not free"
        before, after = (start, first - start), (first + count, stop - first - count)
        self._gaps[place : place + 1] = [gap for gap in (before, after) if gap[1]]
        self.free -= count

    def _give_back(self, first: int, count: int) -> None:
        """Frees a run and joins it with the gaps at its sides."""
        place = bisect_left(self._gaps, (first, 0))
        self.free += count
        low, high = place, place
        if place < len(self._gaps) and self._gaps[place][0] == first + count:
            count += self._gaps[place][1]
            high += 1
        if place > 0 and sum(self._gaps[place - 1]) == first:
            first, length = self._gaps[place - 1]
            count += length
            low -= 1
        self._gaps[low:high] = [(first, count)]
