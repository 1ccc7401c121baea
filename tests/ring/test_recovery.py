"""Workers die, hang and fail; every request goes on, with the tokens of a run in which nothing failed."""

from __future__ import annotations

import gc
import json
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Job, agent_per_rank, free_port
from faults import DEADLINE_S, GREEDY, LONG, PROMPTS, SEEDED, Running, several, strike, tokens, workers
from test_failures import FAULTY_RANK
from waiting import WAIT_S

from distllm import LLM, EngineError, SamplingParams
from distllm.engine import epoch
from distllm.engine.cluster import Cluster
from distllm.net.wire import Wire

Start = Callable[[Sequence[Sequence[str]]], Job]


def test_every_worker_may_die_one_after_the_other(model: Path, wanted: dict[SamplingParams, Any]) -> None:
    with several(model, 4) as llm:
        for victim, params, after in ((2, GREEDY, 40), (1, SEEDED, 1), (3, GREEDY, 150)):
            running = Running(llm, params)
            running.wait_for(after)
            process = workers()[victim]
            strike(process, signal.SIGKILL)
            assert running.tokens() == wanted[params]
            assert victim not in [stage.rank for stage in llm.plan.stages]
            verdicts: Any = llm.stats()["verdicts"]
            named = rf"rank {victim} \(host \S+, pid {process.pid}\) is lost: killed by SIGKILL; the last step it "
            assert re.match(named, verdicts[-1])
        assert len(verdicts) == 3
        assert llm.stats()["faults"] == {"killed": 3}
        assert llm.stats()["epochs"] == 4
        assert [str(stage.span) for stage in llm.plan.stages] == ["embeddings + layers 0-4 + head"]
        reused: Any = llm.stats()["prefix_tokens"]
        assert tokens(llm.generate([*PROMPTS, LONG], GREEDY)) == wanted[GREEDY]
        assert llm.stats()["prefix_tokens"] > reused, "this epoch has answered the long one before"  # type: ignore[operator]
    assert not workers()


def test_several_workers_may_die_at_once(model: Path, wanted: dict[SamplingParams, Any]) -> None:
    with several(model, 4) as llm:
        running = Running(llm, SEEDED)
        running.wait_for(30)
        for victim in (1, 3):
            strike(workers()[victim], signal.SIGKILL)
        assert running.tokens() == wanted[SEEDED]
        assert [stage.rank for stage in llm.plan.stages] == [0, 2]


def test_a_survivor_loads_what_changed_owner_and_no_more(model: Path) -> None:
    with several(model, 3) as llm:
        before: Any = {rank["rank"]: rank for rank in llm.stats()["ranks"]}  # type: ignore[attr-defined]
        held = {stage.rank: stage for stage in llm.plan.stages}
        running = Running(llm, GREEDY)
        running.wait_for(20)
        strike(workers()[1], signal.SIGKILL)
        running.tokens()
        after: Any = {rank["rank"]: rank for rank in llm.stats()["ranks"]}  # type: ignore[attr-defined]
        read = sum(after[rank]["read_bytes"] - before[rank]["read_bytes"] for rank in (0, 2))
        assert read == held[1].weight_bytes == before[1]["read_bytes"]


def test_a_hung_worker_is_ended_and_one_that_is_slow_is_not(model: Path, wanted: dict[SamplingParams, Any]) -> None:
    with several(model, 3, deadline_s=DEADLINE_S) as llm:
        running = Running(llm, GREEDY)
        running.wait_for(20)
        victim = workers()[1]
        strike(victim, signal.SIGSTOP)
        time.sleep(DEADLINE_S / 2)
        victim.send_signal(signal.SIGCONT)
        assert running.tokens() == wanted[GREEDY]
        assert len(llm.plan.stages) == 3
        running = Running(llm, SEEDED)
        running.wait_for(20)
        strike(victim, signal.SIGSTOP)
        assert running.tokens() == wanted[SEEDED]
        assert [stage.rank for stage in llm.plan.stages] == [0, 2]
        assert llm.stats()["faults"] == {"hung": 1}
        assert 1 not in workers()


def test_an_idle_ring_is_mended_before_the_next_request(model: Path, wanted: dict[SamplingParams, Any]) -> None:
    with several(model, 3) as llm:
        strike(workers()[2], signal.SIGKILL)
        assert tokens(llm.generate([*PROMPTS, LONG], GREEDY)) == wanted[GREEDY]
        assert [stage.rank for stage in llm.plan.stages] == [0, 1]
        gc.collect()
        wires = sum(type(each) is Wire for each in gc.get_objects())
        assert wires == 1, "of the ring that broke nothing is left"


def test_a_stream_has_no_gap_and_no_repetition(model: Path) -> None:
    with LLM(model, dtype="float32") as llm:
        whole = llm.generate("hello", SEEDED)[0]
    with several(model, 3) as llm:
        pieces = []
        for count, piece in enumerate(llm.stream("hello", SEEDED)):
            pieces.append(piece)
            if count in (10, 50):
                strike(workers()[1 if count == 10 else 2], signal.SIGKILL)
        assert len(llm.plan.stages) == 1
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(token for piece in pieces for token in piece.token_ids) == whole.token_ids


def test_an_engine_that_is_mending_its_ring_can_be_closed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mends, may_go_on = threading.Event(), threading.Event()
    load = epoch.load

    def slow(*given: Any) -> Any:
        mends.set()
        may_go_on.wait(WAIT_S)
        return load(*given)

    with several(model, 2) as llm:
        stream = llm.stream("hello", SamplingParams(max_tokens=4000, ignore_eos=True))
        next(stream)
        monkeypatch.setattr(epoch, "load", slow)
        strike(workers()[1], signal.SIGKILL)
        assert mends.wait(WAIT_S), "the ring was not mended"
        llm.close()
        with pytest.raises(EngineError, match=r"^the engine is closed$"):
            list(stream)
    may_go_on.set()


def test_a_request_that_is_too_long_for_the_room_that_is_left_is_told(model: Path) -> None:
    """The others go on."""
    with several(model, 2) as llm:
        job = llm._engine.job
        long, short = (llm.stream(prompt, GREEDY) for prompt in (LONG, "short"))
        whole = [piece.token_ids for piece in llm.stream("short", GREEDY)]
        next(long)
        pieces = [next(short).token_ids]
        job.wish = replace(job.wish, kv_tokens=128)
        strike(workers()[1], signal.SIGKILL)
        with pytest.raises(EngineError, match=r"^the ring broke .*; there is KV room for 128 tokens left, and this"):
            list(long)
        assert pieces + [piece.token_ids for piece in short] == whole
        assert llm.plan.kv_tokens == 128


def test_a_second_loss_does_not_make_rank_0_read_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that dies before it has its new order: rank 0 keeps what it held all the same."""
    with several(model, 3) as llm:
        stream = llm.stream("hello", GREEDY)
        next(stream)
        victims = workers()
        orders = Cluster.order

        def dies_first(self: Cluster, verb: str, given: Any) -> None:
            if 2 in victims:
                strike(victims.pop(2), signal.SIGKILL)
            orders(self, verb, given)

        monkeypatch.setattr(Cluster, "order", dies_first)
        strike(victims[1], signal.SIGKILL)
        list(stream)
        verdicts: Any = llm.stats()["verdicts"]
        assert [re.match(r"rank \d", verdict)[0] for verdict in verdicts] == ["rank 1", "rank 2"]  # type: ignore[index]
        (alone,) = llm.stats()["ranks"]  # type: ignore[misc]
        assert alone["read_bytes"] == alone["weight_bytes"], "each of its weights once"


def test_what_no_longer_fits_is_told_with_the_loss(model: Path) -> None:
    """Rank 0 may use so little memory that it cannot hold the whole model."""
    with several(model, 2, recovery_deadline_s=2.0) as llm:
        job = llm._engine.job
        job.wish = replace(job.wish, workspace_bytes=10**15)
        running = llm.stream("hello", SamplingParams(max_tokens=4000, ignore_eos=True))
        next(running)
        strike(workers()[1], signal.SIGKILL)
        with pytest.raises(EngineError, match=r"^rank 1 .* is lost: killed by SIGKILL;.*the model does not fit: "):
            list(running)


def words(model: Path) -> list[str]:
    """A job that takes a moment."""
    engine = ["sampling.max_tokens=400", "sampling.ignore_eos=true", "engine.kv_tokens=2048"]
    return [f"model.path={model}", "model.dtype=float32", "cluster.threads=1", *engine, "prompt=hello"]


@pytest.fixture(scope="module")
def answer(model: Path) -> Iterator[str]:
    with LLM(model, dtype="float32") as llm:
        yield llm.generate("hello", SamplingParams(max_tokens=400, ignore_eos=True))[0].text


EVERY = [
    ("raise", "step", " failed in step 5: RuntimeError: no such kernel"),
    ("segfault", "step", " is lost: its connection is closed"),
    ("kill", "load", " is lost: its connection is closed"),
    ("kill", "join", " is lost: its connection is closed"),
    ("kill", "meet", " is lost: its connection is closed"),
    ("exit", "step", " is lost: its connection is closed"),
    ("hang", "step", r" hangs in step 5 for \d s"),
    ("kill", "timing", " is lost: its connection is closed"),
    ("hang", "load", r" stands still while loading for \d s"),
    ("hang", "join", r" hangs in the forming of the ring for \d s"),
    ("hang", "timing", r" hangs in a step that times the stages for \d s"),
    ("raise", "join", " failed in the forming of the ring: RuntimeError: no such kernel"),
    ("raise", "timing", " failed in a step that times the stages: RuntimeError: no such kernel"),
]
SHORT = 3


@pytest.mark.parametrize(
    ("kind", "place", "verdict"),
    [pytest.param(*each, marks=[] if number < SHORT else pytest.mark.slow) for number, each in enumerate(EVERY)],
)
def test_wherever_a_fault_strikes_the_answer_is_the_same(
    start: Start, model: Path, answer: str, kind: str, place: str, verdict: str
) -> None:
    launcher = ["WORLD_SIZE=3", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={free_port()}"]
    options = [f"plan.calibrate={'true' if place == 'timing' else 'false'}", f"cluster.load_timeout_s={DEADLINE_S}"]
    options.append(f"cluster.deadline_s={DEADLINE_S}")
    well = [sys.executable, "-m", "distllm.run", *words(model), *options, "log_format=json"]
    faulty = [sys.executable, "-c", FAULTY_RANK, str(DEADLINE_S), kind, place]
    job = start([["env", f"RANK={rank}", *launcher, *command] for rank, command in enumerate((well, faulty, well))])
    job.wait_for_error("the fault happens")
    first, _, last = job.wait(WAIT_S)
    assert (first, last) == (0, 0), job.err.read_text()
    assert job.out.read_text() == f"{answer}\n"
    told = rf"rank 1 \(host \S+, pid {job.launchers[1].pid}\){verdict}"
    (line,) = [line for line in job.err.read_text().splitlines() if re.search(told, line)]
    assert json.loads(line)["faults"] == [{"raise": "failed", "hang": "hung"}.get(kind, "disconnected")]
    assert not job.errors()


def test_a_rank_that_cannot_load_what_it_should_take_over_is_left_out(start: Start, model: Path, answer: str) -> None:
    launcher = ["WORLD_SIZE=3", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={free_port()}"]
    well = [sys.executable, "-m", "distllm.run", *words(model), "plan.calibrate=false"]
    dies, cannot = (
        [sys.executable, "-c", FAULTY_RANK, "30", *fault] for fault in (("kill", "step"), ("raise", "reload"))
    )
    job = start([["env", f"RANK={rank}", *launcher, *command] for rank, command in enumerate((well, dies, cannot))])
    assert job.wait(WAIT_S)[0] == 0, job.err.read_text()
    assert job.out.read_text() == f"{answer}\n"
    said = job.err.read_text()
    assert said.count("the fault happens") == 2
    assert re.search(rf"rank 2 \(host \S+, pid {job.launchers[2].pid}\): RuntimeError: no such kernel", said)


def test_under_torchrun_the_survivors_answer_and_end_well(start: Start, model: Path, answer: str) -> None:
    job = start(agent_per_rank(3, *words(model), "plan.calibrate=false"))
    job.wait_for_text()
    strike(job.ranks()[1], signal.SIGKILL)
    first, lost, last = job.wait(WAIT_S)
    assert (first, last) == (0, 0), job.err.read_text()
    assert lost != 0, "torchrun tells of the one that was killed"
    assert job.out.read_text() == f"{answer}\n"
    assert not job.alive()
