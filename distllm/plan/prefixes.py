"""Which requests begin alike: those that run, and those that have ended and whose KV is kept for the next ones.

Beginnings count in whole blocks, and stand in a tree whose edges are blocks of tokens, as in SGLang's RadixAttention
(Zheng et al., 2024). Blocks are not shared, since attention is quick with a request's KV in one run: a request takes
over the KV of one that has ended, or copies what it has in common with another. Knows tokens and blocks; not who runs
when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from distllm.plan.blocks import BlockPool, Run

Block = tuple[int, ...]

# What is worth taking from another request, and waiting for.
LEAST_ALIKE = 2


@dataclass(slots=True, eq=False)
class _Node:
    """A block of tokens behind those of the nodes above it, and who begins so, the latest last."""

    block: Block
    below: dict[Block, _Node] = field(default_factory=dict)
    owners: dict[int, None] = field(default_factory=dict)


class Prefixes:
    """Beginnings of requests by their tokens, and the blocks of those that have ended.

    What is kept gives way: to whoever needs its blocks, those that were not used for longest first, and to whoever
    grows into them.

    Args:
        pool: who has which blocks; requests have the same names there.
        most_blocks: to keep; with 0 nothing begins alike.
        computed: tokens of a running request that have KV by now.
    """

    def __init__(self, pool: BlockPool, block_tokens: int, most_blocks: int, computed: Callable[[int], int]) -> None:
        self._pool = pool
        self._block_tokens = block_tokens
        self._most_blocks = most_blocks
        self._computed = computed
        self._top = _Node(())
        self._paths: dict[int, list[_Node]] = {}
        self._kept: dict[int, None] = {}  # the least recently used first
        self.kept_blocks = 0

    def add(self, owner: int, tokens: Sequence[int]) -> None:
        """Somebody has the KV of these tokens, or will have it."""
        if not self._most_blocks:
            return
        path = self._paths.setdefault(owner, [])
        for block in self._blocks(tokens, len(path)):
            above = path[-1] if path else self._top
            node = above.below.setdefault(block, _Node(block))
            node.owners[owner] = None
            path.append(node)

    def keep(self, owner: int, tokens: Sequence[int]) -> None:
        """The request has ended and has the KV of these tokens; its blocks are kept as far as they are whole.

        Not two that are nearly the same: this one gives way to one that begins with it, and of others those give way of
        which it has all that matters.
        """
        self._forget(owner)  # it may have been about to have more
        self.add(owner, tokens[: self._most_blocks * self._block_tokens])
        path = self._paths.get(owner, [])
        longer = next((other for other in path[-1].owners if other in self._kept), None) if path else None
        if len(path) < LEAST_ALIKE or longer is not None:
            self.release(owner)
            if longer is not None:
                self._touch(longer)
            return
        for other in [other for other in path[0].owners if other in self._kept]:
            theirs = self._paths[other]
            if (matters := _matter(len(theirs))) <= len(path) and theirs[matters - 1] is path[matters - 1]:
                self.release(other)
        self._pool.trim(owner, len(path), expected=len(path))
        self._kept[owner] = None
        self.kept_blocks += len(path)
        while self.kept_blocks > self._most_blocks:
            self._give_way()

    def release(self, owner: int) -> None:
        """Frees the blocks of a request, and forgets how it began."""
        if owner in self._kept:
            del self._kept[owner]
            self.kept_blocks -= self._pool.held(owner)
        self._pool.release(owner)
        self._forget(owner)

    def clear(self) -> None:
        """Releases all that is kept."""
        while self._kept:
            self._give_way()

    def onto(self, pool: BlockPool) -> Prefixes:
        """The same for another pool, with nothing in it."""
        return Prefixes(pool, self._block_tokens, self._most_blocks, self._computed)

    def has(self, owner: int) -> int:
        """Blocks of a beginning that have KV by now."""
        path = self._paths.get(owner, ())
        if not path or owner in self._kept:
            return len(path)
        return min(len(path), self._computed(owner) // self._block_tokens)

    def best(self, tokens: Sequence[int]) -> tuple[int | None, int]:
        """Who has KV of the most blocks of these tokens, and of how many; nobody if it is not worth it."""
        best: tuple[int | None, int] = (None, LEAST_ALIKE - 1)
        for owner, blocks in self._alike(tokens):
            if blocks <= best[1]:
                break
            if min(blocks, self.has(owner)) > best[1]:
                best = owner, min(blocks, self.has(owner))
        if best[0] is None:
            return None, 0
        self._touch(best[0])
        return best

    def expects(self, tokens: Sequence[int], counts: Callable[[int], bool]) -> bool:
        """Whether one of those that count is about to have KV of more of these tokens than anybody has."""
        has = soon = 0
        for owner, blocks in self._alike(tokens):
            if has >= blocks:
                break
            has = max(has, min(blocks, self.has(owner)))
            if owner not in self._kept and counts(owner):
                soon = max(soon, blocks)
        return soon - has >= LEAST_ALIKE

    def _touch(self, owner: int) -> None:
        """Of what is kept it gives way last."""
        if owner in self._kept:
            self._kept[owner] = self._kept.pop(owner)

    def _alike(self, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Who begins like these tokens, and with how many blocks of them: the most first, then the latest."""
        path: list[_Node] = []
        for block in self._blocks(tokens, 0):
            node = (path[-1] if path else self._top).below.get(block)
            if node is None:
                break
            path.append(node)
        told: set[int] = set()
        for count in range(len(path), 0, -1):
            for owner in reversed(path[count - 1].owners):
                if owner not in told:
                    told.add(owner)
                    yield owner, count

    def may_adopt(self, owner: int, blocks: int, *, needed: int) -> bool:
        """Whether to take over the first blocks of what is kept: all that matters, or there is no room beside it for a
        request that needs so many."""
        if owner not in self._kept:
            return False
        held = self._pool.held(owner)
        return blocks >= _matter(held) or needed > self._pool.free + self.kept_blocks - held

    def adopt(self, kept: int, owner: int, blocks: int) -> None:
        """A request takes over the first blocks of what is kept; the others are free."""
        del self._kept[kept]
        self.kept_blocks -= self._pool.held(kept)
        self._forget(kept)
        self._pool.rename(kept, owner)
        self._pool.trim(owner, blocks, expected=blocks)

    def copies(self, donor: int, owner: int, blocks: int) -> tuple[tuple[int, int, int], ...]:
        """What to copy for the first blocks of `owner` to be those of `donor`: first blocks of each, and how many."""
        copies: list[tuple[int, int, int]] = []
        sources, targets = list(self._pool.runs(donor)), list(self._pool.runs(owner))
        while blocks:
            (source, left), (target, room) = sources[0], targets[0]
            count = min(left, room, blocks)
            copies.append((source, target, count))
            sources[0], targets[0] = (source + count, left - count), (target + count, room - count)
            sources, targets, blocks = _rest(sources), _rest(targets), blocks - count
        return tuple(copies)

    def make_room(self, owner: int, count: int, expected: int) -> None:
        """What is kept gives way until `count` blocks are free for a request, or nothing is kept any more.

        They come to stand in one run, if that can be: its first ones where `expected` have room.
        """
        if self._kept and self._pool.held(owner):
            while (other := self._pool.behind(owner, count)) is not None and other in self._kept:
                self.release(other)
        while self._kept and self._pool.free < count:
            self._give_way()
        if self._kept and not self._pool.held(owner) and self._pool.widest(self._kept) >= expected:
            while self._pool.widest() < expected:
                self._give_way()

    def _give_way(self) -> None:
        """Releases what was not used for longest."""
        self.release(next(iter(self._kept)))

    def _forget(self, owner: int) -> None:
        path = [self._top, *self._paths.pop(owner, ())]
        for above, node in zip(reversed(path[:-1]), reversed(path[1:]), strict=True):
            del node.owners[owner]
            if not node.owners:
                del above.below[node.block]

    def _blocks(self, tokens: Sequence[int], skip: int) -> Iterator[Block]:
        size = self._block_tokens
        return (tuple(tokens[end - size : end]) for end in range((skip + 1) * size, len(tokens) + 1, size))


def _matter(blocks: int) -> int:
    """How many of the first blocks of something kept are enough: to lose an eighth is no great loss."""
    return blocks - blocks // 8


def _rest(runs: list[Run]) -> list[Run]:
    return runs if runs[0][1] else runs[1:]
