"""Members and model sizes -> Plan, by pure functions.

Knows only bytes, work and speed; not how they were found, nor what a layer is made of.

The pipeline's items in order are the layers and then the head; the embeddings always lie on rank 0. A split cuts the
items into one contiguous part per rank, in rank order, any of which may be empty.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import inf

from distllm.core import Member, ModelSizes, Plan, Span, Stage

Split = tuple[Span, ...]
"""What each rank holds, in rank order; idle ones hold an empty span."""

Cuts = tuple[int, ...]
"""The same as the items' numbers where the ranks' parts end; the head is the last item."""

EQUAL = 1e-9
"""Relative difference up to which two times (or degrees of fullness) count as equal: far above float noise."""

FIXES = "add ranks or memory, give a lower engine.kv_tokens or a smaller model.dtype, or say quantization=int8"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanWish:
    """What the user asked of a plan.

    Args:
        strategy: "balanced", "even" or "manual".
        layers: layers of each rank, for "manual" only.
        stored: they are not the user's wish, but those of shards on disk.
        kv_tokens: KV room that the plan must have, in tokens; None takes what memory allows.
        kv_tokens_wanted: most KV room of use when `kv_tokens` is None.
        kv_tokens_needed: least KV room that makes sense when `kv_tokens` is None.
        workspace_bytes: set aside for activations on each rank that holds something.
        block_tokens: tokens of one KV block; the room is a whole number of blocks.
    """

    strategy: str = "balanced"
    layers: tuple[int, ...] | None = None
    stored: bool = False
    kv_tokens: int | None = None
    kv_tokens_wanted: int
    kv_tokens_needed: int
    workspace_bytes: int
    block_tokens: int

    def __post_init__(self) -> None:
        assert self.kv_tokens is None or self.kv_tokens >= self.block_tokens, "KV room of less than one block"

    @property
    def least_tokens(self) -> int:
        """The KV room without which a plan is refused: `kv_tokens` rounded down, or what is needed rounded up."""
        if self.kv_tokens is not None:
            return self.kv_tokens // self.block_tokens * self.block_tokens
        return max(1, -(-self.kv_tokens_needed // self.block_tokens)) * self.block_tokens

    @property
    def most_tokens(self) -> int:
        if self.kv_tokens is not None:
            return self.least_tokens
        return max(self.least_tokens, self.kv_tokens_wanted // self.block_tokens * self.block_tokens)


def partition(members: Sequence[Member], sizes: ModelSizes, wish: PlanWish) -> Plan:
    """Who holds what.

    - balanced: the slowest stage (work / speed) is as fast as memory allows; among equals the fullest rank is the
      least full, then earlier ranks take more and later ones may stay idle.
    - even: layers as equal as can be; what remains of the division goes to the first ranks, one layer each, since
      the last rank that holds layers has the head too.
    - manual: one count per rank; the head is on the last rank, even if that holds no layer.

    Raises:
        ValueError: the model does not fit or `wish.layers` does not match; names ranks, numbers and the fix.
    """
    ranks = in_order(members)
    split = choose(ranks, sizes, wish)
    complaints = [too_full(member, sizes, wish, span) for member, span in zip(ranks, split, strict=True)]
    if any(complaints):
        fixes = FIXES
        if wish.strategy != "balanced" and balanced_split(ranks, sizes, wish) is not None:
            without = " without plan.layers" if wish.strategy == "manual" else ""
            fixes = f"plan.strategy=balanced{without} finds a split that fits"
        if wish.stored:
            fixes = f"cut the shards anew for these ranks, {FIXES}"
        raise ValueError(f"the model does not fit: {'; '.join(filter(None, complaints))}; {fixes}")
    return plan_of(ranks, sizes, wish, split)


def measured(
    sizes: ModelSizes,
    plan: Plan,
    members: Sequence[Member],
    *,
    layer_seconds: Sequence[float],
    head_seconds: float,
) -> tuple[ModelSizes, tuple[Member, ...]]:
    """Sizes and members that explain what was measured: work in seconds at speed 1, and each rank's speed.

    One time per stage cannot tell slow layers from a slow rank. The estimate tells how layers compare with each other
    (alike in most models, so that a stage's time falls evenly on its layers), so what differs from it is put down to
    the rank. Speed 1 stays what it was on average over the measured stages; ranks without a time keep their speed.

    Args:
        layer_seconds: of each stage of `plan`, seconds in its layers; 0 if not measured.
        head_seconds: seconds in the head, on the stage that has it; 0 if not measured.
    """
    speeds = {member.rank: member.speed for member in members}
    on = {member.rank: sizes.on(member) for member in members}
    pairs = zip(plan.stages, layer_seconds, strict=True)
    works = {stage.rank: (on[stage.rank].work(replace(stage.span, head=False)), took) for stage, took in pairs}
    timed = {rank: (work, took) for rank, (work, took) in works.items() if work > 0 and took > 0}
    if not timed:
        return sizes, in_order(members)
    unit = sum(took * speeds[rank] for rank, (_, took) in timed.items()) / sum(work for work, _ in timed.values())
    speeds |= {rank: work * unit / took for rank, (work, took) in timed.items()}
    head_rank = next(stage.rank for stage in plan.stages if stage.span.head)

    head_work = on[head_rank].head_work
    head_took = head_seconds * speeds[head_rank]
    head_unit = head_took / head_work if head_took > 0 and head_work > 0 else unit

    def in_seconds(kind: ModelSizes) -> ModelSizes:
        layer_work = tuple(work * unit for work in kind.layer_work)
        return replace(kind, layer_work=layer_work, head_work=kind.head_work * head_unit)

    new_sizes = replace(in_seconds(sizes), quantized=sizes.quantized and in_seconds(sizes.quantized))
    return new_sizes, tuple(replace(member, speed=speeds[member.rank]) for member in in_order(members))


def human_bytes(count: int) -> str:
    """`1.23 GB`, `45.6 MB`, `7.89 kB` or `12 B`: decimal units, three digits."""
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if abs(count) >= size:
            value = count / size
            return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f} {unit}"
    return f"{count} B"


def in_order(members: Sequence[Member]) -> tuple[Member, ...]:
    ranks = tuple(sorted(members, key=lambda member: member.rank))
    assert ranks, "a plan needs members"
    assert ranks[0].rank == 0, "rank 0 holds the embeddings"
    assert all(left.rank < right.rank for left, right in pairwise(ranks)), "two members of one rank"
    assert all(member.speed > 0 for member in ranks), "speeds are above 0"
    return ranks


def choose(ranks: Sequence[Member], sizes: ModelSizes, wish: PlanWish) -> Split:
    """The split that the strategy asks for, whether it fits or not (a balanced one always fits)."""
    if wish.strategy == "balanced":
        split = balanced_split(ranks, sizes, wish)
        if split is None:
            raise ValueError(nothing_fits(ranks, sizes, wish))
        return split
    if wish.strategy == "even":
        each, more = divmod(sizes.layers, len(ranks))
        counts = [each + (place < more) for place in range(len(ranks))]
        return split_of(counts, head=max((place for place, count in enumerate(counts) if count), default=0))
    assert wish.strategy == "manual", wish.strategy
    return split_of(manual_counts(wish.layers or (), sizes.layers, len(ranks)), head=len(ranks) - 1)


def manual_counts(counts: tuple[int, ...], layers: int, ranks: int) -> tuple[int, ...]:
    if len(counts) == ranks and sum(counts) == layers and min(counts) >= 0:
        return counts
    raise ValueError(
        f"plan.layers={list(counts)} gives {counted(sum(counts), 'layer')} to {counted(len(counts), 'rank')}; the "
        f"model has {counted(layers, 'layer')} and the job {counted(ranks, 'rank')}: give one count of 0 or more for "
        f"each rank, {layers} in all"
    )


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def split_of(counts: Sequence[int], *, head: int) -> Split:
    """The spans of these numbers of layers, the head being on the rank at place `head`."""
    bounds = pairwise(accumulate(counts, initial=0))
    return tuple(Span(start, stop, embed=place == 0, head=place == head) for place, (start, stop) in enumerate(bounds))


def slowest(ranks: Sequence[Member], sizes: ModelSizes, split: Split) -> float:
    """Time of the slowest stage, in the unit of the work at speed 1."""
    return max(sizes.on(member).work(span) / member.speed for member, span in zip(ranks, split, strict=True))


def plan_of(ranks: Sequence[Member], sizes: ModelSizes, wish: PlanWish, split: Split) -> Plan:
    held = [(member, span) for member, span in zip(ranks, split, strict=True) if not span.is_empty]
    tokens = min([wish.most_tokens, *(room(member, sizes, wish, span) for member, span in held)])
    total = sum(sizes.on(member).work(span) for member, span in held) or 1.0
    stages = tuple(
        Stage(
            rank=member.rank,
            span=span,
            weight_bytes=sizes.on(member).weight_bytes(span),
            kv_bytes=tokens * sizes.kv_bytes_per_token(span),
            work_share=sizes.on(member).work(span) / total,
        )
        for member, span in held
    )
    idle = tuple(member.rank for member, span in zip(ranks, split, strict=True) if span.is_empty)
    return Plan(stages=stages, idle=idle, kv_tokens=tokens)


def room(member: Member, sizes: ModelSizes, wish: PlanWish, span: Span) -> int:
    """Tokens of KV, in whole blocks, that a rank has room for beside its weights and workspace."""
    block_bytes = sizes.kv_bytes_per_token(span) * wish.block_tokens
    if block_bytes == 0:
        return wish.most_tokens
    free = member.memory_bytes - sizes.on(member).weight_bytes(span) - wish.workspace_bytes
    return free // block_bytes * wish.block_tokens


def too_full(member: Member, sizes: ModelSizes, wish: PlanWish, span: Span) -> str | None:
    """Why the least that a rank with this span must hold is too much for it; None if it fits."""
    weights = sizes.on(member).weight_bytes(span)
    kv = wish.least_tokens * sizes.kv_bytes_per_token(span)
    excess = weights + kv + wish.workspace_bytes - member.memory_bytes
    if span.is_empty or excess <= 0:
        return None
    return (
        f"rank {member.rank} (host {member.host}) needs {human_bytes(weights)} for {span}, {human_bytes(kv)} for KV "
        f"of {wish.least_tokens} tokens and {human_bytes(wish.workspace_bytes)} to work in, and may use "
        f"{human_bytes(member.memory_bytes)}: {human_bytes(excess)} too much"
    )


def nothing_fits(ranks: Sequence[Member], sizes: ModelSizes, wish: PlanWish) -> str:
    """The refusal when no split fits: the sums, and each rank's part in the split that comes nearest."""
    whole = Span(0, sizes.layers, embed=True, head=True)
    weights, kv = sizes.on(ranks[0]).weight_bytes(whole), wish.least_tokens * sizes.kv_bytes_per_token(whole)
    chain = Chain(ranks, sizes, wish)
    parts = [
        too_full(member, sizes, wish, span)
        or f"rank {member.rank} (host {member.host}) would hold {span} and may use {human_bytes(member.memory_bytes)}"
        for member, span in zip(ranks, chain.spans(chain.least_full(inf)), strict=True)
    ]
    return (
        f"the model does not fit: it needs {human_bytes(weights)} for weights, {human_bytes(kv)} for "
        f"KV of {wish.least_tokens} tokens and {human_bytes(wish.workspace_bytes)} to work in on each rank, and "
        f"{counted(len(ranks), 'rank')} together may use {human_bytes(sum(m.memory_bytes for m in ranks))}. "
        f"In the split that comes nearest, {'; '.join(parts)}; {FIXES}"
    )


def balanced_split(ranks: Sequence[Member], sizes: ModelSizes, wish: PlanWish) -> Split | None:
    """The split with the fastest slowest stage, among equals the one with the least full rank; None if none fits.

    Chains on chains (Pinar & Aykanat, 2004) solved by halving: both costs grow with the span, so filling rank after
    rank to the brim finds a split within given limits if there is one, and the smallest limit is the optimum. Exact as
    dynamic programming is, but with two limits at once and in milliseconds.
    """
    chain = Chain(ranks, sizes, wish)
    if (fits := chain.filled(inf, 1.0)) is None:
        return None
    fastest = smallest_limit(lambda seconds: chain.filled(seconds, 1.0), chain.slowest, fits)
    return chain.spans(chain.least_full(chain.slowest(fastest) * (1 + EQUAL), 1.0))


def smallest_limit(within: Callable[[float], Cuts | None], worst: Callable[[Cuts], float], cuts: Cuts) -> Cuts:
    """The cuts with the smallest worst cost; `within` finds cuts under a limit if there are any."""
    low, high = 0.0, worst(cuts)
    while high - low > EQUAL * high:
        middle = (low + high) / 2
        found = within(middle)
        if found is None:
            low = middle
        else:
            cuts, high = found, worst(found)
    return cuts


def item_bytes(sizes: ModelSizes, wish: PlanWish) -> Iterator[int]:
    """Of each layer with the least KV room, and of the head."""
    yield from (w + wish.least_tokens * kv for w, kv in zip(sizes.layer_bytes, sizes.kv_bytes, strict=True))
    yield sizes.head_bytes


class Chain:
    """The items of the pipeline as running sums, so that what a part costs a rank is one subtraction."""

    def __init__(self, ranks: Sequence[Member], sizes: ModelSizes, wish: PlanWish) -> None:
        self.held = [sizes.on(member) for member in ranks]
        assert all(each.tied_bytes <= each.head_bytes for each in self.held), "the tied bytes are part of the head's"
        self.work = [list(accumulate((*each.layer_work, each.head_work), initial=0.0)) for each in self.held]
        self.bytes = [list(accumulate(item_bytes(each, wish), initial=0)) for each in self.held]
        self.items = sizes.layers + 1
        self.ranks, self.wish = ranks, wish

    def seconds(self, place: int, start: int, stop: int) -> float:
        return (self.work[place][stop] - self.work[place][start]) / self.ranks[place].speed

    def fullness(self, place: int, start: int, stop: int) -> float:
        """Share of the rank's memory that items [start, stop) take with the least KV room; above 1 is too much."""
        if place > 0 and start == stop:
            return 0.0
        needed = self.wish.workspace_bytes + self.bytes[place][stop] - self.bytes[place][start]
        if place == 0:
            needed += self.held[0].embed_bytes - self.held[0].tied_bytes * (stop == self.items)
        return needed / max(0.5, self.ranks[place].memory_bytes)

    def filled(self, seconds: float, fullness: float) -> Cuts | None:
        """Every rank in turn takes all that the limits allow; None if items are left over."""
        cuts = [0]
        for place in range(len(self.ranks)):

            def exceeds(stop: int, place: int = place, start: int = cuts[-1]) -> bool:
                return self.fullness(place, start, stop) > fullness or self.seconds(place, start, stop) > seconds

            fitting = bisect_left(range(cuts[-1], self.items + 1), True, key=exceeds)
            if fitting == 0:
                return None
            cuts.append(cuts[-1] + fitting - 1)
        return tuple(cuts[1:]) if cuts[-1] == self.items else None

    def slowest(self, cuts: Cuts) -> float:
        return max(self.seconds(place, *part) for place, part in enumerate(pairwise((0, *cuts))))

    def fullest(self, cuts: Cuts) -> float:
        return max(self.fullness(place, *part) for place, part in enumerate(pairwise((0, *cuts))))

    def least_full(self, seconds: float, fullness: float = inf) -> Cuts:
        """The cuts within both limits whose fullest rank is the least full; there must be some."""
        cuts = self.filled(seconds, fullness)
        assert cuts is not None, "limits that nothing meets"
        return smallest_limit(lambda fullness: self.filled(seconds, fullness), self.fullest, cuts)

    def spans(self, cuts: Cuts) -> Split:
        layers = self.items - 1
        return tuple(
            Span(min(start, layers), min(stop, layers), embed=place == 0, head=start <= layers < stop)
            for place, (start, stop) in enumerate(pairwise((0, *cuts)))
        )
