"""The arithmetic of a benchmark: rates, spreads, ratios, and the first token at which two engines differ.

Pure values; knows neither engines nor how a report looks.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

OURS = "distllm"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpent:
    """What one stage of distllm spent on some steps, in seconds: for input, on layers, on the head."""

    rank: int
    span: str
    steps: int
    wait_s: float
    layers_s: float
    head_s: float

    def __add__(self, other: StageSpent) -> StageSpent:
        return self._with(other, 1)

    def __sub__(self, other: StageSpent) -> StageSpent:
        return self._with(other, -1)

    def _with(self, other: StageSpent, sign: int) -> StageSpent:
        return StageSpent(
            rank=self.rank,
            span=self.span,
            steps=self.steps + sign * other.steps,
            wait_s=self.wait_s + sign * other.wait_s,
            layers_s=self.layers_s + sign * other.layers_s,
            head_s=self.head_s + sign * other.head_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Requests that were answered at once: their new tokens, and the seconds from the first to the last.

    Only distllm tells what its stages spent.
    """

    tokens: tuple[tuple[int, ...], ...]
    seconds: float
    stages: tuple[StageSpent, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def lowest(self) -> float:
        return min(self.values)

    @property
    def highest(self) -> float:
        return max(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first token at which two engines differ; None for an engine whose answer ended before it.

    `requests` is how many of the requests differ anywhere.
    """

    request: int
    position: int
    ours: int | None
    theirs: int | None
    requests: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """All batches of one number of requests, by engine: the one to warm up, and the measured rounds."""

    requests: int
    warm_ups: Mapping[str, Batch]
    rounds: tuple[Mapping[str, Batch], ...]

    @property
    def engines(self) -> list[str]:
        return list(self.warm_ups)

    @property
    def rivals(self) -> list[str]:
        return [name for name in self.engines if name != OURS]

    def rates(self, engine: str) -> Spread:
        """Tokens/s of the measured rounds."""
        return Spread(tuple(each[engine].tokens_per_s for each in self.rounds))

    def ratios(self, rival: str) -> Spread:
        """How many times a rival's tokens/s distllm does, each pair within one round."""
        return Spread(tuple(each[OURS].tokens_per_s / each[rival].tokens_per_s for each in self.rounds))

    def difference(self, rival: str) -> Difference | None:
        """The first difference of tokens in any batch; None if all are equal."""
        found = (first_difference(each[OURS].tokens, each[rival].tokens) for each in (self.warm_ups, *self.rounds))
        return next((each for each in found if each is not None), None)

    @property
    def seconds(self) -> float:
        """Of distllm's measured batches together."""
        return sum(each[OURS].seconds for each in self.rounds)

    @property
    def stages(self) -> list[StageSpent]:
        """What each stage of distllm spent on the measured batches together."""
        first, *others = (each[OURS].stages for each in self.rounds)
        totals = list(first)
        for stages in others:
            totals = [total + stage for total, stage in zip(totals, stages, strict=True)]
        return totals


def first_difference(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> Difference | None:
    """The first token at which answers to the same requests differ; None if they are equal."""
    assert len(ours) == len(theirs), f"{len(ours)} answers against {len(theirs)}"
    differing = [index for index, pair in enumerate(zip(ours, theirs, strict=True)) if list(pair[0]) != list(pair[1])]
    if not differing:
        return None
    request = differing[0]
    pairs = enumerate(zip_longest(ours[request], theirs[request]))
    position, (mine, their) = next((position, pair) for position, pair in pairs if pair[0] != pair[1])
    return Difference(request=request, position=position, ours=mine, theirs=their, requests=len(differing))
