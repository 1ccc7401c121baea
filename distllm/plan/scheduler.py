"""Waiting and running requests -> steps; sampled tokens -> commits.

Knows tokens, positions and KV blocks; no clock, no model, no network, and not which text the tokens make.

Why nothing waits for ever. Requests have a rank of age: the order in which they were added. Blocks are only ever taken
from younger requests, and the oldest that was refused blocks has the first claim: no younger one gets new blocks
before it. So the oldest request of all is never preempted once it is admitted, and nobody else is admitted before it.
When no step is in flight it is the first decode row, or there is a decode row, or it is the first prompt row with a
whole chunk to itself; and it can have every block of the pool, which `add` has checked to be enough. Hence a step
comes out, every step brings its requests forward, and each request's length is bounded.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distllm.core import FinishReason, Request, Row, Step
from distllm.plan.blocks import BlockPool


@dataclass(frozen=True, slots=True)
class Commit:
    """One new token of a request; the last one says why the request ended."""

    request: int
    token: int
    finish_reason: FinishReason | None


@dataclass(slots=True, eq=False)
class _Job:
    """One request under way: `tokens` are its prompt and what it generated, the first `cached` have KV (or will,
    once the steps in flight are through)."""

    request: Request
    age: int
    tokens: list[int]
    cached: int = 0
    slot: int | None = None
    in_flight: bool = False
    ended: bool = False

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

    def row(self, count: int, runs: tuple[tuple[int, int], ...]) -> Row:
        """The next `count` tokens as a row, which is now in flight."""
        assert self.slot is not None, "only admitted requests have rows"
        assert not self.in_flight, "a request is in one step at a time"
        start, self.cached, self.in_flight = self.cached, self.cached + count, True
        return Row(
            request=self.request.id,
            slot=self.slot,
            start=start,
            tokens=tuple(self.tokens[start : self.cached]),
            runs=runs,
            samples=self.remaining == 0,
            params=self.request.params if start == 0 else None,
            prompt=len(self.request.tokens) if start == 0 else 0,
        )


def _age(job: _Job) -> int:
    return job.age


class Scheduler:
    """The requests of one engine, and the steps that they are in.

    Args:
        pool: the KV blocks; a request's id is its name there.
        block_tokens: tokens of one block.
        max_requests: most requests that run at once; slots are below it.
        prompt_chunk: most tokens of a step that has prompt rows.
        steps_in_flight: most steps at once.
        context_length: most tokens of a request, prompt and answer.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_tokens: int,
        max_requests: int,
        prompt_chunk: int,
        steps_in_flight: int,
        context_length: int,
    ) -> None:
        assert min(block_tokens, max_requests, steps_in_flight) >= 1, "sizes are 1 or more"
        self._pool = pool
        self._block_tokens = block_tokens
        self._steps_in_flight = steps_in_flight
        self._context_length = context_length
        self._max_requests = max_requests
        self._slots = list(range(max_requests))  # a heap of free ones
        self._waiting: deque[_Job] = deque()  # by age, as is _running
        self._running: list[_Job] = []
        self._jobs: dict[int, _Job] = {}
        self._flights: deque[tuple[Step, tuple[_Job, ...]]] = deque()
        self._claim: _Job | None = None  # the oldest that was refused blocks
        self._next_age = 0
        self._next_step = 0
        self.preemptions = 0
        self.set_prompt_chunk(prompt_chunk)

    @property
    def has_work(self) -> bool:
        """Something waits, runs, or is in flight (if only to be dropped)."""
        return bool(self._jobs or self._flights)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_blocks_used(self) -> int:
        return self._pool.used

    def set_prompt_chunk(self, tokens: int) -> None:
        assert tokens >= 1, "a chunk is 1 token or more"
        self._prompt_chunk = tokens

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ValueError: its prompt and one token are more than the whole pool; names the numbers.
        """
        assert request.id not in self._jobs, f"request {request.id} is here already"
        assert request.tokens, "a prompt has at least one token"
        assert len(request.generated) < request.params.max_tokens, "its answer is whole"
        if request.known + 1 > self._pool_tokens:
            raise ValueError(
                f"the prompt has {request.known} tokens and needs KV room for one more, but there is room for "
                f"{self._pool_tokens} tokens in all: shorten the prompt, raise engine.kv_tokens or add memory"
            )
        job = _Job(request, self._next_age, [*request.tokens, *request.generated])
        self._next_age += 1
        self._jobs[request.id] = job
        self._waiting.append(job)

    def next_step(self) -> Step | None:
        """Rows for requests that are in no step yet; None if there are none, or enough steps are in flight.

        A step takes its equal share of the requests for decode rows, then fills what they leave of the prompt chunk
        with prompt rows, those of running requests first; if they leave nothing, prompts go on by one token all the
        same. Older requests go first. None does not mean that nothing changed (requests may have been preempted), and
        it never comes while there is work and no step in flight.
        """
        if len(self._flights) >= self._steps_in_flight:
            return None
        share = -(-len(self._running) // self._steps_in_flight)
        decoding = [job for job in self._running if job.decodes and not job.in_flight][:share]
        given = self._give_rows(iter(decoding), len(decoding))
        given += self._give_rows(self._prompting(), max(1, self._prompt_chunk - len(given)))
        if not given:
            return None
        step = Step(self._next_step, tuple(row for _, row in given))
        self._next_step += 1
        self._flights.append((step, tuple(job for job, _ in given)))
        return step

    def commit(self, step_id: int, tokens: Sequence[int]) -> list[Commit]:
        """Takes the tokens of the oldest step in flight, one for each row that samples, in order of the rows.

        Tokens of requests that have ended meanwhile are dropped.
        """
        assert self._flights, "no step is in flight"
        step, jobs = self._flights.popleft()
        assert step.id == step_id, f"step {step_id} before step {step.id}"
        sampled = [job for row, job in zip(step.rows, jobs, strict=True) if row.samples]
        for job in jobs:
            job.in_flight = False
        return [self._accept(job, token) for job, token in zip(sampled, tokens, strict=True) if not job.ended]

    def finish(self, request_id: int) -> None:
        """Ends a request now, wherever it is; one that has ended already is no mistake.

        Its blocks and slot may be used at once even while it is in flight: frames pass every stage in order.
        """
        job = self._jobs.get(request_id)
        if job is not None:
            self._end(job)

    def rewind(self, pool: BlockPool | None = None, *, steps_in_flight: int | None = None) -> tuple[int, ...]:
        """Forgets all KV and all steps in flight: every running request waits again, in order of age, tokens kept.

        Args:
            pool: the blocks of a new plan, all free; by default the same ones.
            steps_in_flight: of a new plan; by default as before.

        Returns:
            The requests that had to be ended because what they know is more than a smaller pool holds.
        """
        for job in tuple(self._running):
            self._preempt(job)
        self._flights.clear()
        for job in self._waiting:
            job.in_flight = False
        self._pool = pool or self._pool
        self._steps_in_flight = steps_in_flight or self._steps_in_flight
        assert self._pool.used == 0, "blocks without an owner"
        lost = [job for job in self._waiting if job.known > self._pool_tokens]
        for job in lost:
            self._end(job)
        return tuple(job.request.id for job in lost)

    @property
    def _pool_tokens(self) -> int:
        return self._pool.blocks * self._block_tokens

    @property
    def _limit(self) -> int:
        """Most tokens that a request may know: it could not go on with more."""
        return min(self._context_length, self._pool_tokens)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def _give_rows(self, jobs: Iterator[_Job], budget: int) -> list[tuple[_Job, Row]]:
        """A row for each job that gets blocks, of `budget` tokens in all."""
        given: list[tuple[_Job, Row]] = []
        while budget > 0 and (job := next(jobs, None)) is not None:
            count = min(budget, job.remaining)
            if job.slot is not None and self._reserve(job, job.cached + count):
                given.append((job, job.row(count, self._pool.runs(job.request.id))))
                budget -= count
        return given

    def _prompting(self) -> Iterator[_Job]:
        """Running requests in the middle of their prompts, then new ones, each admitted when it is asked for."""
        yield from [job for job in self._running if not job.decodes and not job.in_flight]
        while (job := self._admit()) is not None:
            yield job

    def _admit(self) -> _Job | None:
        """Lets the first of the queue run if all that it knows has room, so that it is not preempted half way."""
        if not self._waiting or len(self._running) >= self._max_requests:
            return None
        job = self._waiting[0]
        if not self._may_take(job) or self._blocks(job.known) > self._pool.free:
            return None
        self._waiting.popleft()
        job.slot = heapq.heappop(self._slots)
        insort(self._running, job, key=_age)
        return job

    def _may_take(self, job: _Job) -> bool:
        return self._claim is None or job.age <= self._claim.age

    def _reserve(self, job: _Job, stop: int) -> bool:
        """Sees to blocks for positions [0, stop), preempting younger requests if it must; False if there are none."""
        count = self._blocks(stop) - self._pool.held(job.request.id)
        if count > 0 and not self._may_take(job):
            return False
        while count > self._pool.free:
            younger = (other for other in reversed(self._running) if other.age > job.age and not other.in_flight)
            victim = next(younger, None)
            if victim is None:
                self._claim = job
                return False
            self._preempt(victim)
            self.preemptions += 1
        expected = self._blocks(max(stop, min(job.longest, self._limit)))
        self._pool.take(job.request.id, count, expected=expected)
        if self._claim is job:
            self._claim = None
        return True

    def _preempt(self, job: _Job) -> None:
        """Forgets a request's KV, keeps its tokens, and puts it back to its place in the queue."""
        self._release(job)
        job.cached = 0
        place = next((place for place, other in enumerate(self._waiting) if other.age > job.age), len(self._waiting))
        self._waiting.insert(place, job)

    def _release(self, job: _Job) -> None:
        assert job.slot is not None, "only running requests hold blocks"
        self._pool.release(job.request.id)
        heapq.heappush(self._slots, job.slot)
        job.slot = None
        self._running.remove(job)
        if self._claim is job:
            self._claim = None

    def _end(self, job: _Job) -> None:
        job.ended = True
        del self._jobs[job.request.id]
        if job.slot is None:
            self._waiting.remove(job)
        else:
            self._release(job)

    def _accept(self, job: _Job, token: int) -> Commit:
        job.tokens.append(token)
        reason = self._finish_reason(job, token)
        if reason is not None:
            self._end(job)
        return Commit(job.request.id, token, reason)

    def _finish_reason(self, job: _Job, token: int) -> FinishReason | None:
        params = job.request.params
        if token in job.request.eos_ids and not params.ignore_eos:
            return "stop"
        if job.generated >= params.max_tokens or job.known >= self._limit:
            return "length"
        return None
