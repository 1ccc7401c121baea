"""Waiting and running requests -> steps; sampled tokens -> commits.

Knows tokens, positions and KV blocks; no clock, no model, no network, and not which text the tokens make.

Why nothing waits for ever. Requests have a rank of age: the order in which they were added. Blocks are only ever taken
from younger requests, and the oldest that was refused blocks has the first claim: no younger one gets new blocks
before it. So the oldest request of all is never preempted once it is admitted, and nobody else is admitted before it.
When no step is in flight it is the first decode row, or there is a decode row, or it is the first prompt row with a
whole chunk to itself; and it can have every block of the pool, which `add` has checked to be enough. Hence a step
comes out, every step brings its requests forward, and each request's length is bounded. KV that is kept of requests
that have ended stands in nobody's way, and who waits for what an older request is about to have is not the oldest.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distllm.core import MOST_COPIES, FinishReason, Request, Row, Step
from distllm.plan.blocks import BlockPool
from distllm.plan.prefixes import Prefixes
from distllm.plan.underway import Underway


@dataclass(frozen=True, slots=True)
class Commit:
    """One new token of a request; the last one says why the request ended.

    `reused` are tokens of the request that were not computed for it, since another one began alike.
    """

    request: int
    token: int
    finish_reason: FinishReason | None
    reused: int = 0


def _age(job: Underway) -> int:
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
        prefix_blocks: most blocks to keep of requests that have ended, for those that begin alike; with 0 no request
            uses another's KV.
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
        prefix_blocks: int = 0,
    ) -> None:
        assert min(block_tokens, max_requests, steps_in_flight) >= 1, "sizes are 1 or more"
        self._pool = pool
        self._prefixes = Prefixes(pool, block_tokens, prefix_blocks, self._computed)
        self._block_tokens = block_tokens
        self._steps_in_flight = steps_in_flight
        self._context_length = context_length
        self._max_requests = max_requests
        self._slots = list(range(max_requests))  # a heap of free ones
        self._waiting: deque[Underway] = deque()  # by age, as is _running
        self._running: list[Underway] = []
        self._jobs: dict[int, Underway] = {}
        self._flights: deque[tuple[Step, tuple[Underway, ...]]] = deque()
        self._claim: Underway | None = None  # the oldest that was refused blocks
        self._next_age = 0
        self._next_step = 0
        self.preemptions = 0
        self.prefix_hits = 0
        self.prefix_tokens = 0
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
        """Of requests that run."""
        return self._pool.used - self._prefixes.kept_blocks

    @property
    def kv_blocks_kept(self) -> int:
        """Of requests that have ended."""
        return self._prefixes.kept_blocks

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
        job = Underway(request, self._next_age, [*request.tokens, *request.generated])
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

        Its blocks and slot may be used at once even while it is in flight: frames pass every stage in order. Its KV is
        kept, if it is worth it, until others need its blocks.
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
        self._prefixes.clear()
        self._flights.clear()
        for job in self._waiting:
            job.in_flight = False
        self._pool = pool or self._pool
        self._prefixes = self._prefixes.onto(self._pool)
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

    @property
    def _free(self) -> int:
        """Blocks that a request can have without harm to others."""
        return self._pool.free + self._prefixes.kept_blocks

    def _give_rows(self, jobs: Iterator[Underway], budget: int) -> list[tuple[Underway, Row]]:
        """A row for each job that gets blocks, of `budget` tokens in all."""
        given: list[tuple[Underway, Row]] = []
        while budget > 0 and (job := next(jobs, None)) is not None:
            row = None if job.slot is None else self._row(job, budget)
            if row is not None:
                given.append((job, row))
                budget -= len(row.tokens)
        return given

    def _row(self, job: Underway, budget: int) -> Row | None:
        """At most `budget` further tokens of a job; None if there are no blocks for them."""
        donor, alike = self._donor(job)
        if donor is not None and self._prefixes.may_adopt(donor, alike, needed=self._blocks(job.known)):
            self._prefixes.adopt(donor, job.request.id, alike)
            self._reuse(job, alike)
            donor, alike = None, 0
        stop = min(max(job.cached, alike * self._block_tokens) + budget, job.known)
        if not self._reserve(job, stop):
            return None
        copies: tuple[tuple[int, int, int], ...] = ()
        if donor is not None and self._prefixes.has(donor) >= alike:  # it may just have lost its blocks to this one
            copies = self._prefixes.copies(donor, job.request.id, alike)
        if 0 < len(copies) <= MOST_COPIES:
            self._reuse(job, alike)
        elif donor is not None:
            copies, stop = (), min(job.cached + budget, job.known)
            self._pool.trim(job.request.id, self._blocks(stop), expected=self._expected(job, stop))
        return job.row(self._next_step, stop, self._pool.runs(job.request.id), copies)

    def _donor(self, job: Underway) -> tuple[int | None, int]:
        """Whose KV a job can begin with, and how many blocks of it."""
        return (None, 0) if job.cached else self._prefixes.best(job.reusable)

    def _reuse(self, job: Underway, blocks: int) -> None:
        job.cached = job.reused = blocks * self._block_tokens
        self.prefix_hits += 1
        self.prefix_tokens += job.cached

    def _computed(self, name: int) -> int:
        """Tokens of a running request that have KV when the step begins that is being made."""
        job = self._jobs[name]
        return job.before if job.latest == self._next_step else job.cached

    def _expects(self, job: Underway) -> bool:
        """Whether an older request is about to have more of what a job begins with than anybody has."""
        return self._prefixes.expects(job.reusable, lambda name: self._jobs[name].age < job.age)

    def _prompting(self) -> Iterator[Underway]:
        """Running requests in the middle of their prompts, then new ones, each admitted when it is asked for."""
        yield from [job for job in self._running if not job.decodes and not job.in_flight]
        while (job := self._admit()) is not None:
            yield job

    def _admit(self) -> Underway | None:
        """Lets the first of the queue run, of those that do not wait for a beginning, if all that it knows has room, so
        that it is not preempted half way."""
        if len(self._running) >= self._max_requests:
            return None
        job = next((job for job in self._waiting if not self._expects(job)), None)
        if job is None or not self._may_take(job) or self._blocks(job.known) > self._free:
            return None
        self._waiting.remove(job)
        self._prefixes.add(job.request.id, job.tokens)
        job.slot = heapq.heappop(self._slots)
        insort(self._running, job, key=_age)
        return job

    def _may_take(self, job: Underway) -> bool:
        return self._claim is None or job.age <= self._claim.age

    def _reserve(self, job: Underway, stop: int) -> bool:
        """Sees to blocks for positions [0, stop), preempting younger requests if it must; False if there are none."""
        count = self._blocks(stop) - self._pool.held(job.request.id)
        if count and not self._may_take(job):
            return False
        if count:
            self._prefixes.make_room(job.request.id, count, self._blocks(job.known))
        while count > self._pool.free:
            younger = (other for other in reversed(self._running) if other.age > job.age and not other.in_flight)
            victim = next(younger, None)
            if victim is None:
                self._claim = job
                return False
            self._preempt(victim)
            self.preemptions += 1
        self._pool.take(job.request.id, count, expected=self._expected(job, stop))
        if self._claim is job:
            self._claim = None
        return True

    def _expected(self, job: Underway, stop: int) -> int:
        """Blocks that it is likely to have in the end."""
        return self._blocks(max(stop, min(job.longest, self._limit)))

    def _preempt(self, job: Underway) -> None:
        """Forgets a request's KV, keeps its tokens, and puts it back to its place in the queue."""
        self._prefixes.release(job.request.id)
        self._leave(job)
        job.cached, job.reused, job.begun = 0, 0, False
        place = next((place for place, other in enumerate(self._waiting) if other.age > job.age), len(self._waiting))
        self._waiting.insert(place, job)

    def _leave(self, job: Underway) -> None:
        """It does not run any more."""
        assert job.slot is not None, "it runs"
        heapq.heappush(self._slots, job.slot)
        job.slot = None
        self._running.remove(job)
        if self._claim is job:
            self._claim = None

    def _end(self, job: Underway) -> None:
        job.ended = True
        del self._jobs[job.request.id]
        if job.slot is None:
            self._waiting.remove(job)
        else:
            self._prefixes.keep(job.request.id, job.tokens[: job.cached])
            self._leave(job)

    def _accept(self, job: Underway, token: int) -> Commit:
        job.tokens.append(token)
        reason = self._finish_reason(job, token)
        if reason is not None:
            self._end(job)
        return Commit(job.request.id, token, reason, job.reused)

    def _finish_reason(self, job: Underway, token: int) -> FinishReason | None:
        params = job.request.params
        if token in job.request.eos_ids and not params.ignore_eos:
            return "stop"
        if job.generated >= params.max_tokens or job.known >= self._limit:
            return "length"
        return None
