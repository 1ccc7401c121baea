"""One request under way: what it knows, what it has KV of, and where it is."""

from __future__ import annotations

from dataclasses import dataclass

from distllm.core import Request, Row
from distllm.plan.blocks import Run


@dataclass(slots=True, eq=False)
class Underway:
    """One request under way: `tokens` are its prompt and what it generated, the first `cached` have KV (or will,
    once the steps in flight are through), of which `reused` were another's.

    `begun` is whether it has had a row since it was admitted. When step `latest`, the last one that it was in, begins,
    its first `before` tokens have KV.
    """

    request: Request
    age: int
    tokens: list[int]
    cached: int = 0
    reused: int = 0
    slot: int | None = None
    in_flight: bool = False
    begun: bool = False
    ended: bool = False
    latest: int = -1
    before: int = 0

    @property
    def known(self) -> int:
        return len(self.tokens)

    @property
    def remaining(self) -> int:
        """Known tokens that have no KV yet."""
        return len(self.tokens) - self.cached

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.tokens)

    @property
    def decodes(self) -> bool:
        return self.cached > 0 and self.remaining == 1

    @property
    def longest(self) -> int:
        """Most tokens that ever have KV: the last one sampled has none."""
        return len(self.request.tokens) + self.request.params.max_tokens - 1

    @property
    def reusable(self) -> list[int]:
        """Tokens with which it may begin with the KV of another.

        The last one that it knows is always computed, since the next one comes of it, and so are those that penalties
        count, which must pass the last stage.
        """
        params = self.request.params
        if params.repetition_penalty != 1:
            return []
        counts_answer = params.presence_penalty or params.frequency_penalty
        return self.tokens[: min(self.known - 1, len(self.request.tokens) if counts_answer else self.known)]

    def row(self, step: int, stop: int, runs: tuple[Run, ...], copies: tuple[tuple[int, int, int], ...]) -> Row:
        """Its tokens up to `stop` as a row of a step, which is now in flight."""
        assert self.slot is not None, "only admitted requests have rows"
        assert not self.in_flight, "a request is in one step at a time"
        start, first = self.cached, not self.begun
        self.cached, self.in_flight, self.begun = stop, True, True
        self.latest, self.before = step, 0 if copies else start
        return Row(
            request=self.request.id,
            slot=self.slot,
            start=start,
            tokens=tuple(self.tokens[start:stop]),
            runs=runs,
            samples=self.remaining == 0,
            params=self.request.params if first else None,
            prompt=len(self.request.tokens) if first else 0,
            copies=copies,
        )
