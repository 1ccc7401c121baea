"""The scheduler, played against stages that remember every KV position and a model that checks its history."""

import random
from collections import deque
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.core import Request, Row, SamplingParams, Step
from distllm.plan.blocks import BlockPool
from distllm.plan.scheduler import Commit, Scheduler

EOS = 3


def fake_token(request: int, history: list[int]) -> int:
    """What the fake model says next: a function of the request, the position and the whole history."""
    return (request * 31 + len(history) * 17 + sum(history)) % 23


def expected_answer(request: Request, limit: int) -> tuple[list[int], str]:
    tokens = list(request.tokens)
    while True:
        tokens.append(fake_token(request.id, tokens))
        answer = tokens[len(request.tokens) :]
        if tokens[-1] in request.eos_ids and not request.params.ignore_eos:
            return answer, "stop"
        if len(answer) == request.params.max_tokens or len(tokens) >= limit:
            return answer, "length"


PENALTIES = (None, "presence_penalty", "frequency_penalty", "repetition_penalty")


def request(
    name: int,
    prompt: int = 4,
    max_tokens: int = 8,
    *,
    eos: bool = False,
    first: int | None = None,
    penalty: str | None = None,
) -> Request:
    """One whose prompt starts with the token `first`, by default its name: those with the same one begin alike."""
    tokens = tuple(((name if first is None else first) + place) % 23 for place in range(prompt))
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=not eos)
    if penalty is not None:
        params = replace(params, **{penalty: 0.5})
    return Request(id=name, tokens=tokens, params=params, eos_ids=frozenset({EOS}))


@dataclass
class Stages:
    """All stages as one: KV by place, and the last stage's history by slot. Frames come in the order of the steps.

    KV is of a token and of all before it, whoever they are of.
    """

    block_tokens: int
    kv: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    histories: dict[int, tuple[int, list[int]]] = field(default_factory=dict)

    def run(self, step: Step) -> list[int]:
        assert len({row.request for row in step.rows}) == len(step.rows)
        assert len({row.slot for row in step.rows}) == len(step.rows)
        self._copy([copy for row in step.rows for copy in row.copies])
        return [token for row in step.rows for token in self._run_row(row)]

    def _copy(self, copies: list[tuple[int, int, int]]) -> None:
        moves = [
            ((source + i, offset), (target + i, offset))
            for source, target, count in copies
            for i in range(count)
            for offset in range(self.block_tokens)
        ]
        for source, target in moves:
            self.kv[target] = self.kv[source]

    def _run_row(self, row: Row) -> list[int]:
        places = self._places(row)
        if row.params is not None:
            if row.params.repetition_penalty != 1:
                assert row.start == 0, "the last stage has to count all tokens"
            if row.params.presence_penalty or row.params.frequency_penalty:
                assert row.start <= row.prompt, "the last stage has to count the answer"
            self.histories[row.slot] = (row.request, [self.kv[place][-1] for place in places[: row.start]])
        owner, history = self.histories[row.slot]
        assert owner == row.request, "the slot is another request's, or parameters did not come with its first row"
        assert row.start == len(history), "positions are not contiguous"
        assert row.tokens
        for position in range(len(history)):
            assert self.kv[places[position]] == tuple(history[: position + 1]), "KV is of something else"
        history.extend(row.tokens)
        for position in range(row.start, row.stop):
            self.kv[places[position]] = tuple(history[: position + 1])
        return [fake_token(row.request, history)] if row.samples else []

    def _places(self, row: Row) -> list[tuple[int, int]]:
        blocks = [block for first, count in row.runs for block in range(first, first + count)]
        assert len(set(blocks)) == len(blocks)
        assert len(blocks) == -(-row.stop // self.block_tokens), "runs are the blocks of [0, stop), no more"
        return [(block, offset) for block in blocks for offset in range(self.block_tokens)]


class Job:
    """A scheduler with the stages it feeds, checked at every move."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        block_tokens: int = 4,
        max_requests: int = 8,
        chunk: int = 16,
        flights: int = 2,
        context: int = 1000,
        prefixes: int = 0,
    ) -> None:
        self.pool = BlockPool(blocks)
        self.max_requests, self.chunk, self.flights, self.prefixes = max_requests, chunk, flights, prefixes
        self.limit = min(context, blocks * block_tokens)
        self.scheduler = Scheduler(
            self.pool,
            block_tokens=block_tokens,
            max_requests=max_requests,
            prompt_chunk=chunk,
            steps_in_flight=flights,
            context_length=context,
            prefix_blocks=prefixes,
        )
        self.stages = Stages(block_tokens)
        self.under_way: deque[tuple[Step, list[int]]] = deque()
        self.requests: dict[int, Request] = {}
        self.answers: dict[int, list[int]] = {}
        self.reasons: dict[int, str] = {}
        self.last_step = -1
        self.preempted: set[int] = set()

    def add(self, *requests: Request) -> None:
        for item in requests:
            self.scheduler.add(item)
            self.requests[item.id] = item
            self.answers[item.id] = list(item.generated)

    def step(self) -> Step | None:
        step = self.scheduler.next_step()
        if step is None:
            idle = not self.under_way
            assert not (idle and self.scheduler.has_work), "there is work, nothing is in flight and no step comes"
            return None
        assert len(self.under_way) < self.flights
        assert step.id > self.last_step
        self.last_step = step.id
        self._check(step)
        self.under_way.append((step, self.stages.run(step)))
        return step

    def _check(self, step: Step) -> None:
        assert step.rows
        busy = {row.request for other, _ in self.under_way for row in other.rows}
        again = [row.request for row in step.rows if row.request in busy]
        assert not again, "a request in two steps in flight"
        assert not [row for row in step.rows if row.request in self.reasons], "an ended request has a row"
        assert all(0 <= row.slot < self.max_requests for row in step.rows)
        decodes = [row for row in step.rows if len(row.tokens) == 1 and row.start > 0]
        assert step.tokens <= max(self.chunk, len(decodes) + 1)
        assert self.scheduler.running <= self.max_requests
        for row in step.rows:
            known = [*self.requests[row.request].tokens, *self.answers[row.request]]
            assert list(row.tokens) == known[row.start : row.stop]
            assert row.samples == (row.stop == len(known))
            if row.params is not None and self.answers[row.request]:
                self.preempted.add(row.request)
        self._check_blocks()

    def _check_blocks(self) -> None:
        live = {name: self.pool.runs(name) for name in self.requests if name not in self.reasons}
        blocks = [block for runs in live.values() for first, count in runs for block in range(first, first + count)]
        assert len(blocks) == len(set(blocks)) == self.scheduler.kv_blocks_used
        assert all(0 <= block < self.pool.blocks for block in blocks)
        kept = self.scheduler.kv_blocks_kept
        assert self.pool.used - len(blocks) == kept <= self.prefixes, "an ended request has blocks"
        moving = {row.request for step, _ in self.under_way for row in step.rows} - set(self.reasons)
        assert all(live[name] for name in moving), "a request in flight lost its blocks"

    def commit(self) -> list[Commit]:
        step, tokens = self.under_way.popleft()
        commits = self.scheduler.commit(step.id, tokens)
        for commit in commits:
            assert commit.request not in self.reasons, "a token after the end"
            self.answers[commit.request].append(commit.token)
            if commit.finish_reason is not None:
                self.reasons[commit.request] = commit.finish_reason
        return commits

    def finish(self, name: int) -> None:
        self.scheduler.finish(name)
        self.reasons.setdefault(name, "cancelled")
        self._check_blocks()

    def rewind(self) -> None:
        assert self.scheduler.rewind() == ()
        self.under_way.clear()
        self.stages = Stages(self.stages.block_tokens)
        assert (self.scheduler.running, self.scheduler.kv_blocks_used) == (0, 0)
        with pytest.raises(AssertionError, match="no step is in flight"):
            self.scheduler.commit(0, ())

    def fill(self) -> None:
        while self.step():
            pass

    def run_out(self) -> None:
        for _ in range(20_000):
            self.fill()
            if not self.under_way:
                break
            self.commit()
        self.check_end()

    def check_end(self) -> None:
        assert not self.scheduler.has_work
        assert (self.scheduler.running, self.scheduler.waiting) == (0, 0)
        assert self.pool.free + self.scheduler.kv_blocks_kept == self.pool.blocks
        for name, item in self.requests.items():
            answer, reason = expected_answer(item, self.limit)
            if self.reasons[name] == "cancelled":
                assert self.answers[name] == answer[: len(self.answers[name])]
            else:
                assert (self.answers[name], self.reasons[name]) == (answer, reason)


jobs = st.builds(
    Job,
    blocks=st.integers(3, 24),
    block_tokens=st.integers(1, 5),
    max_requests=st.integers(1, 8),
    chunk=st.integers(1, 20),
    flights=st.integers(1, 4),
    context=st.integers(12, 60),
    prefixes=st.sampled_from([0, 1, 4, 100]),
)


@settings(deadline=None, max_examples=250)
@given(job=jobs, count=st.integers(1, 14), trouble=st.booleans(), kinds=st.integers(0, 3), seed=st.integers(0, 2**32))
def test_every_request_ends_with_its_own_tokens(job: Job, count: int, trouble: bool, kinds: int, seed: int) -> None:
    dice = random.Random(seed)
    longest = min(job.limit - 1, 30)
    queue = [
        request(
            name,
            dice.randint(1, longest),
            dice.randint(1, 30),
            eos=dice.random() < 0.5,
            first=dice.randint(0, kinds),
            penalty=dice.choice(PENALTIES),
        )
        for name in range(count)
    ]
    while queue or job.scheduler.has_work:
        move = dice.random()
        if queue and move < 0.2:
            job.add(queue.pop())
        elif trouble and move < 0.22 and job.requests:
            job.finish(dice.choice(list(job.requests)))
        elif trouble and move < 0.23:
            job.rewind()
        elif job.under_way and (move < 0.6 or job.step() is None):
            job.commit()
        elif not job.under_way:
            job.step()
    job.check_end()


def test_a_pool_for_one_serves_many_in_turn() -> None:
    job = Job(blocks=5, flights=3)
    job.add(*(request(name, prompt=4, max_tokens=16) for name in range(6)))
    job.run_out()
    assert job.preempted, "the pool was meant to be too small"
    assert 0 not in job.preempted, "the oldest request lost its KV"


def test_the_oldest_goes_on_in_every_round_of_a_crowded_pool() -> None:
    job = Job(blocks=10, flights=2, chunk=4)
    job.add(request(0, prompt=20, max_tokens=16), *(request(name, 4, 30) for name in range(1, 8)))
    while 0 not in job.reasons:
        job.fill()
        assert [row for step, _ in job.under_way for row in step.rows if row.request == 0], "the oldest was left out"
        job.commit()
    job.run_out()
    assert job.preempted - {0} == job.preempted != set()


def test_blocks_go_first_to_the_oldest_that_was_refused() -> None:
    job = Job(blocks=7, chunk=12, flights=2)
    job.add(request(0, prompt=20, max_tokens=3), *(request(name, prompt) for name, prompt in ((1, 4), (2, 8), (3, 4))))
    job.fill()
    assert [[row.request for row in step.rows] for step, _ in job.under_way] == [[0], [1, 2]]
    job.commit()
    assert job.step() is None, "request 3 was let in before request 0 had its blocks"
    job.commit()
    step = job.step()
    assert step is not None
    assert [row.request for row in step.rows] == [0], "request 1 took the block that request 0 waited for"
    step = job.step()
    assert step is not None
    assert [row.request for row in step.rows] == [1], "the claim outlived its need"
    job.run_out()
    assert 0 not in job.preempted


def test_a_step_takes_its_share_of_the_decoding_requests() -> None:
    job = Job(chunk=64, flights=3)
    job.add(*(request(name, prompt=2, max_tokens=20) for name in range(8)))
    job.fill()
    assert len(job.under_way) == 1
    job.commit()
    job.fill()
    assert [len(step.rows) for step, _ in job.under_way] == [3, 3, 2]
    job.commit()
    job.fill()
    assert [len(step.rows) for step, _ in job.under_way] == [3, 2, 3]
    job.run_out()


def test_few_requests_spread_over_the_steps() -> None:
    job = Job(flights=4)
    job.add(request(0), request(1))
    job.fill()
    job.commit()
    job.fill()
    assert [[row.request for row in step.rows] for step, _ in job.under_way] == [[0], [1]]


def test_prompts_are_cut_to_what_decode_rows_leave() -> None:
    job = Job(chunk=6, flights=1, max_requests=3)
    job.add(request(0, prompt=2), request(1, prompt=9))
    first = job.step()
    assert first is not None
    assert [(row.request, row.start, row.stop, row.samples) for row in first.rows] == [
        (0, 0, 2, True),
        (1, 0, 4, False),
    ]
    job.commit()
    second = job.step()
    assert second is not None
    assert [(row.request, row.start, row.stop, row.samples) for row in second.rows] == [
        (0, 2, 3, True),
        (1, 4, 9, True),
    ]
    job.scheduler.set_prompt_chunk(2)
    job.chunk = 2
    job.commit()
    job.add(request(2, prompt=5))
    third = job.step()
    assert third is not None
    assert [(row.request, len(row.tokens), row.samples) for row in third.rows] == [
        (0, 1, True),
        (1, 1, True),
        (2, 1, False),
    ], "decode rows fill the chunk, and still a prompt goes on"
    job.run_out()


def test_requests_wait_for_a_slot_and_take_the_freed_one() -> None:
    job = Job(max_requests=2, flights=1)
    job.add(*(request(name, max_tokens=1 + name) for name in range(3)))
    job.step()
    assert (job.scheduler.running, job.scheduler.waiting) == (2, 1)
    job.commit()
    step = job.step()
    assert step is not None
    assert [(row.request, row.slot) for row in step.rows] == [(1, 1), (2, 0)]
    job.run_out()


def test_a_request_is_admitted_only_when_its_whole_prompt_has_room() -> None:
    job = Job(blocks=8, chunk=4, flights=1)
    job.add(request(0, prompt=16, max_tokens=4), request(1, prompt=20, max_tokens=4))
    while 0 not in job.reasons:
        assert job.step() is not None
        assert job.scheduler.kv_blocks_used <= 5 or job.scheduler.running == 1
        job.commit()
    job.run_out()
    assert not job.preempted


def test_preemption_takes_the_youngest_that_is_not_in_flight_and_replays_it() -> None:
    job = Job(blocks=6, flights=1, chunk=32)
    job.add(*(request(name, prompt=7, max_tokens=5) for name in range(3)))
    for _ in range(2):
        assert len(job.step().rows) == 3  # type: ignore[union-attr]
        job.commit()
    third = job.step()
    assert third is not None
    assert [row.request for row in third.rows] == [0, 1], "8 tokens are two blocks, 9 are three"
    assert (job.scheduler.running, job.scheduler.waiting) == (2, 1)
    job.commit()
    job.run_out()
    assert job.preempted == {2}


def test_tokens_of_a_request_ended_in_flight_are_dropped_and_its_place_is_free() -> None:
    job = Job(blocks=2, max_requests=1, flights=2)
    job.add(request(0, prompt=7), request(1, prompt=7))
    job.step()
    job.finish(0)
    assert job.pool.free == 2
    second = job.step()
    assert second is not None
    assert [(row.request, row.slot) for row in second.rows] == [(1, 0)]
    assert job.commit() == []
    assert [commit.request for commit in job.commit()] == [1]
    job.run_out()


def test_finish_takes_a_waiting_request_and_forgives_an_unknown_one() -> None:
    job = Job(max_requests=1)
    job.add(request(0), request(1))
    job.step()
    job.finish(1)
    job.finish(1)
    job.scheduler.finish(77)
    assert (job.scheduler.running, job.scheduler.waiting) == (1, 0)
    job.run_out()


def test_what_was_ended_in_flight_is_still_work_until_its_step_is_home() -> None:
    job = Job()
    job.add(request(0))
    job.step()
    job.finish(0)
    assert job.scheduler.has_work
    assert job.commit() == []
    assert not job.scheduler.has_work


def test_rewind_keeps_tokens_and_order() -> None:
    job = Job(flights=2, max_requests=3)
    job.add(*(request(name) for name in range(5)))
    for _ in range(3):
        job.fill()
        job.commit()
    job.fill()
    before = {name: list(answer) for name, answer in job.answers.items()}
    job.rewind()
    assert job.scheduler.waiting == 5
    step = job.step()
    assert step is not None
    assert [row.request for row in step.rows] == [0, 1, 2]
    assert all(row.start == 0 and row.params for row in step.rows)
    assert job.answers == before
    job.run_out()


def test_rewind_onto_a_smaller_pool_ends_what_no_longer_fits() -> None:
    job = Job(blocks=16, flights=2)
    job.add(request(0, prompt=17, max_tokens=40), request(1, prompt=4, max_tokens=3))
    for _ in range(3):
        job.fill()
        job.commit()
    smaller = BlockPool(4)
    assert job.scheduler.rewind(smaller, steps_in_flight=1) == (0,)
    job.pool, job.limit, job.flights = smaller, 16, 1
    job.under_way.clear()
    job.stages = Stages(4)
    job.reasons[0] = "cancelled"
    job.run_out()


def test_a_prompt_larger_than_the_pool_is_refused() -> None:
    job = Job(blocks=3)
    with pytest.raises(ValueError, match=r"the prompt has 12 tokens.*room for 12 tokens in all"):
        job.add(request(0, prompt=12))
    job.add(request(1, prompt=11, max_tokens=5))
    job.run_out()
    assert (len(job.answers[1]), job.reasons[1]) == (1, "length")


def test_context_length_ends_a_request() -> None:
    job = Job(context=10)
    job.add(request(0, prompt=7, max_tokens=50))
    job.run_out()
    assert (len(job.answers[0]), job.reasons[0]) == (3, "length")


def test_eos_stops_unless_ignored() -> None:
    limit = 1000
    name = next(n for n in range(99) if expected_answer(request(n, 4, 50, eos=True), limit)[1] == "stop")
    stopping, going = Job(), Job()
    stopping.add(request(name, 4, 50, eos=True))
    going.add(request(name, 4, 50))
    for job in (stopping, going):
        job.run_out()
    assert stopping.answers[name][-1] == EOS
    assert len(stopping.answers[name]) < len(going.answers[name]) == 50


def test_steps_come_home_in_order() -> None:
    job = Job(flights=2)
    job.add(request(0), request(1))
    job.fill()
    job.commit()
    job.fill()
    with pytest.raises(AssertionError, match="step 2 before step 1"):
        job.scheduler.commit(2, [5])


def alike(*prompts: int, max_tokens: int = 4, penalty: str | None = None) -> list[Request]:
    """Requests whose prompts begin with the same tokens."""
    return [request(name, prompt, max_tokens, first=0, penalty=penalty) for name, prompt in enumerate(prompts)]


def starts(job: Job) -> dict[int, int]:
    """Where the first row of each request starts, in all steps that are under way."""
    return {row.request: row.start for step, _ in job.under_way for row in step.rows if row.params is not None}


def test_a_prompt_goes_on_where_an_ended_request_began_alike() -> None:
    job = Job(prefixes=20)
    first, second = alike(24, 30)
    job.add(first)
    job.run_out()
    assert job.scheduler.kv_blocks_kept == 6, "24 + 4 tokens, the last of which has no KV"
    job.add(second)
    step = job.step()
    assert step is not None
    assert [(row.start, row.copies) for row in step.rows] == [(24, ())], "little would be left: it takes all over"
    assert (job.scheduler.prefix_hits, job.scheduler.prefix_tokens) == (1, 24)
    job.run_out()


def test_a_prompt_copies_what_it_has_in_common_with_others() -> None:
    job = Job(prefixes=20)
    first, second, third = alike(40, 18, 18, max_tokens=1)
    job.add(first)
    job.run_out()
    job.add(second, third)
    step = job.step()
    assert step is not None
    assert [(row.start, sum(count for *_, count in row.copies)) for row in step.rows] == [(16, 4), (16, 4)]
    job.run_out()
    assert job.scheduler.kv_blocks_kept == 10, "what others begin with is kept once"


def test_requests_that_begin_alike_at_once_compute_it_once() -> None:
    job = Job(chunk=16, flights=3)
    sharing = Job(chunk=16, flights=3, prefixes=20)
    for each in (job, sharing):
        each.add(*alike(40, 42, 44), request(7, prompt=6))
        computed = 0
        for _ in range(200):
            each.fill()
            if not each.under_way:
                break
            computed += each.under_way[0][0].tokens
            each.commit()
        each.check_end()
        assert each.scheduler.prefix_tokens == (40 + 40 if each is sharing else 0)
        answers = 3 * 3 + 7  # the last token of each is not computed
        assert computed == 40 + 42 + 44 + 6 + answers - each.scheduler.prefix_tokens


def test_who_waits_for_a_beginning_lets_others_pass() -> None:
    job = Job(chunk=16, flights=2, prefixes=20)
    job.add(*alike(40, 41), request(7, prompt=6))
    job.fill()
    assert [[row.request for row in step.rows] for step, _ in job.under_way] == [[0], [7]]
    job.run_out()
    assert job.scheduler.prefix_hits == 1


def test_what_is_kept_gives_way_to_those_who_run() -> None:
    job = Job(blocks=8, prefixes=8, flights=1)
    job.add(request(0, prompt=20, max_tokens=4))
    job.run_out()
    assert job.scheduler.kv_blocks_kept == 5
    job.add(request(1, prompt=28, max_tokens=4))
    job.run_out()
    assert not job.preempted
    assert job.scheduler.kv_blocks_kept == 7


def test_what_was_used_last_is_kept_longest() -> None:
    job = Job(prefixes=10, flights=1)
    for name, first in enumerate((0, 5, 0, 9, 0, 5)):
        job.add(request(name, prompt=16, max_tokens=4, first=first))
        hits = job.scheduler.prefix_hits
        job.run_out()
        assert job.scheduler.prefix_hits - hits == (name in (2, 4)), "two beginnings have room: 5 gave way to 9"


@pytest.mark.parametrize(("penalty", "start"), [*zip(PENALTIES, (28, 24, 24, 0), strict=True)], ids=str)
def test_what_penalties_count_is_computed(penalty: str | None, start: int) -> None:
    job = Job(prefixes=20)
    (second,) = alike(24, penalty=penalty, max_tokens=8)
    answer, _ = expected_answer(second, job.limit)
    job.add(replace(request(1), tokens=(*second.tokens, *answer)))
    job.run_out()
    job.add(replace(second, generated=tuple(answer[:5])))
    job.fill()
    assert starts(job) == {0: start}, "28 tokens are in common, 24 of the prompt"
    job.run_out()


def test_nothing_is_kept_over_a_rewind() -> None:
    job = Job(prefixes=20)
    first, second = alike(24, 30)
    job.add(first)
    job.run_out()
    job.add(second)
    job.rewind()
    assert job.scheduler.kv_blocks_kept == 0
    job.fill()
    assert starts(job) == {1: 0}
    job.run_out()
