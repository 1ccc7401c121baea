"""Ranks come, come back and leave while requests run; every request has the tokens of a run in which nothing does."""

from __future__ import annotations

import logging
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Job, free_port
from faults import DEADLINE_S, GREEDY, LONG, PROMPTS, SEEDED, Running, several, strike, tokens, workers
from waiting import WAIT_S, wait_until

from distllm import LLM, SamplingParams
from distllm.config import PlanConfig
from distllm.engine.cluster import Cluster
from distllm.plan import membership

Start = Callable[[Sequence[Sequence[str]]], Job]


def serving(llm: LLM, ranks: Sequence[int], params: SamplingParams, wanted: Any, timeout_s: float = WAIT_S) -> None:
    """Requests run all the time until these ranks are in the ring; each has the tokens that are wanted."""
    deadline = time.monotonic() + timeout_s
    while sorted(stage.rank for stage in llm.plan.stages) != sorted(ranks):
        assert time.monotonic() < deadline, f"{llm.plan}"
        assert tokens(llm.generate([*PROMPTS, LONG], params)) == wanted
    assert tokens(llm.generate([*PROMPTS, LONG], params)) == wanted


def by_rank(llm: LLM) -> dict[int, Any]:
    ranks: Any = llm.stats()["ranks"]
    return {each["rank"]: each for each in ranks}


def test_a_lost_rank_comes_back_and_only_what_changed_owner_is_read(
    model: Path, wanted: dict[SamplingParams, Any]
) -> None:
    with several(model, 3, restarts=1) as llm:
        whole = llm.plan
        running = Running(llm, GREEDY)
        running.wait_for(20)
        lost = workers()[1]
        strike(lost, signal.SIGKILL)
        assert running.tokens() == wanted[GREEDY]
        assert [stage.rank for stage in llm.plan.stages] == [0, 2]
        before = by_rank(llm)
        serving(llm, [0, 1, 2], SEEDED, wanted[SEEDED])
        assert workers()[1].pid != lost.pid
        assert llm.plan == whole
        after = by_rank(llm)
        assert after[1]["read_bytes"] == after[1]["weight_bytes"]
        assert [after[rank]["read_bytes"] for rank in (0, 2)] == [before[rank]["read_bytes"] for rank in (0, 2)]
    assert not workers()


@pytest.mark.slow
def test_a_place_that_loses_its_rank_again_and_again_is_kept_out(
    model: Path, wanted: dict[SamplingParams, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "distllm")
    monkeypatch.setattr(membership, "FIRST_S", 15.0)  # longer than a process takes to start
    with several(model, 2, restarts=9) as llm:
        for _ in range(2):
            strike(workers()[1], signal.SIGKILL)
            serving(llm, [0], GREEDY, wanted[GREEDY])
            serving(llm, [0, 1], GREEDY, wanted[GREEDY])
    assert "rank 1 was lost 2 times; who comes back gets no part for 15 s" in caplog.messages
    coming = [index for index, message in enumerate(caplog.messages) if message.endswith(" has come")]
    spare = [index for index, message in enumerate(caplog.messages) if "holds nothing for now" in message]
    assert len(coming) == 2
    assert len(spare) == 1, "the second time it waits"
    assert spare[0] > coming[1]


def test_requests_wait_for_ranks_if_too_few_are_left(
    model: Path, wanted: dict[SamplingParams, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """One rank alone may not use enough memory for the whole model."""
    with several(model, 2, restarts=1) as llm, pytest.MonkeyPatch.context() as patch:
        rank_0_is_small(llm, patch)
        running = Running(llm, GREEDY)
        running.wait_for(20)
        strike(workers()[1], signal.SIGKILL)
        assert running.tokens() == wanted[GREEDY]
        assert len(llm.plan.stages) == 2
    assert [message for message in caplog.messages if "the model does not fit" in message and "waiting for" in message]


def test_a_worker_that_is_told_to_end_hands_over_first(model: Path, wanted: dict[SamplingParams, Any]) -> None:
    with several(model, 3) as llm:
        running = Running(llm, SEEDED)
        running.wait_for(20)
        leaver = workers()[1]
        leaver.terminate()
        assert running.tokens() == wanted[SEEDED]
        wait_until(lambda: [stage.rank for stage in llm.plan.stages] == [0, 2], "it was not let go")
        assert leaver.wait(WAIT_S) == 0
        assert llm.stats()["verdicts"] == [], "nothing broke"
        assert tokens(llm.generate([*PROMPTS, LONG], GREEDY)) == wanted[GREEDY]


def test_a_worker_that_is_needed_stays_when_it_is_told_to_end(
    model: Path, wanted: dict[SamplingParams, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Until the launcher's patience is over; here it is lost then, and one that comes takes its place."""
    with several(model, 2, restarts=1) as llm, pytest.MonkeyPatch.context() as patch:
        rank_0_is_small(llm, patch)
        running = Running(llm, GREEDY)
        running.wait_for(20)
        workers()[1].terminate()
        wait_until(lambda: "but the model does not fit without it" in caplog.text, "it is not heard")
        assert running.tokens() == wanted[GREEDY]
        assert len(llm.plan.stages) == 2
        strike(workers()[1], signal.SIGKILL)
        assert tokens(llm.generate([*PROMPTS, LONG], SEEDED)) == wanted[SEEDED]
        assert len(llm.plan.stages) == 2


@pytest.mark.slow
def test_losses_of_an_idle_engine_do_not_add_up(model: Path, wanted: dict[SamplingParams, Any]) -> None:
    """A ring that was mended and idles well is a new beginning: what comes later has its own time."""
    with several(model, 3, deadline_s=DEADLINE_S, recovery_deadline_s=4.0) as llm:
        for victim in (1, 2):
            before = len(verdicts_of(llm))
            strike(workers()[victim], signal.SIGKILL)
            wait_until(lambda before=before: len(verdicts_of(llm)) > before, "it is not noticed")  # type: ignore[misc]
            time.sleep(5.0)  # longer than all the time that recovery has
        assert tokens(llm.generate([*PROMPTS, LONG], GREEDY)) == wanted[GREEDY]


def verdicts_of(llm: LLM) -> list[str]:
    verdicts: Any = llm.stats()["verdicts"]
    return list(verdicts)


def rank_0_is_small(llm: LLM, patch: pytest.MonkeyPatch) -> None:
    """No rank may use enough memory for the whole model from now on."""
    job = llm._engine.job
    whole = sum(stage.weight_bytes + stage.kv_bytes for stage in llm.plan.stages)
    shared_out = Cluster.shared_out

    def less(self: Cluster, fraction: float) -> Any:
        return [replace(member, memory_bytes=int(0.8 * whole)) for member in shared_out(self, fraction)]

    job.wish = replace(job.wish, workspace_bytes=0)
    patch.setattr(Cluster, "shared_out", less)


def test_a_spare_is_mourned_and_may_leave(model: Path, wanted: dict[SamplingParams, Any]) -> None:
    """Ranks without a part are in no ring that could break."""
    with several(model, 3, restarts=1, spares=1) as llm:
        job = llm._engine.job
        lost = workers()[2]
        strike(lost, signal.SIGKILL)
        verdicts: Any
        wait_until(lambda: bool(llm.stats()["verdicts"]), "it is not mourned")
        (verdict,) = verdicts = llm.stats()["verdicts"]  # type: ignore[misc]
        assert re.match(rf"rank 2 \(host \S+, pid {lost.pid}\) is lost: killed by SIGKILL", verdict)
        wait_until(lambda: 2 in workers() and 2 in warm(llm), "it does not come back")
        again = workers()[2]
        assert again.pid != lost.pid
        again.terminate()
        assert again.wait(WAIT_S) == 0
        wait_until(lambda: 2 not in job._cluster.members, "it was not let go")  # type: ignore[union-attr]
        assert llm.stats()["verdicts"] == verdicts
        assert tokens(llm.generate([*PROMPTS, LONG], GREEDY)) == wanted[GREEDY]


def warm(llm: LLM) -> list[int]:
    """Ranks that have loaded something, of those that are there."""
    job = llm._engine.job
    return list(job._epochs.holdings.of(job.crew.everybody()))


class Ring:
    """A job of the command line, each rank started by hand as a launcher would."""

    def __init__(self, ranks: int, model: Path, tokens: int) -> None:
        self.port = free_port()
        self.environ = [f"WORLD_SIZE={ranks}", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={self.port}"]
        engine = [f"sampling.max_tokens={tokens}", "sampling.ignore_eos=true", "engine.kv_tokens=4096"]
        options = ["cluster.threads=1", "plan.calibrate=false", *engine, "prompt=hello"]
        self.words = [f"model.path={model}", "model.dtype=float32", *options]

    def rank(self, rank: int, *program: str) -> list[str]:
        run = program or ("-m", "distllm.run")
        return ["env", f"RANK={rank}", *self.environ, sys.executable, *run, *self.words]

    def joining(self) -> list[str]:
        return [sys.executable, "-m", "distllm.run", f"cluster.join=127.0.0.1:{self.port}", "log_level=info"]


MANY = 3000


@pytest.fixture(scope="module")
def answer(model: Path) -> str:
    with LLM(model, dtype="float32") as llm:
        return llm.generate("hello", SamplingParams(max_tokens=MANY, ignore_eos=True))[0].text


def test_a_new_machine_joins_a_job_that_runs(start: Start, model: Path, answer: str) -> None:
    ring = Ring(2, model, MANY)
    job = start([ring.rank(0), ring.rank(1)])
    job.wait_for_text()
    newcomer = start([ring.joining()])
    job.wait_for_error("rank 2 (host")
    assert job.wait(WAIT_S) == [0, 0], job.err.read_text()
    assert newcomer.wait(WAIT_S) == [0], newcomer.err.read_text()
    assert job.out.read_text() == f"{answer}\n"
    said = job.err.read_text()
    assert re.search(rf"rank 2 \(host \S+, pid {newcomer.launchers[0].pid}\) holds layers", said), said


@pytest.mark.slow
def test_one_agent_for_each_rank_starts_a_lost_one_again(start: Start, model: Path, answer: str) -> None:
    ring = Ring(3, model, MANY)
    shared = ["--master-addr=127.0.0.1", f"--master-port={ring.port}", "--nnodes=3", "--nproc-per-node=1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *shared, "--max-restarts=2"]
    job = start([[*torchrun, f"--node-rank={rank}", "-m", "distllm.run", *ring.words] for rank in range(3)])
    job.wait_for_text()
    lost = job.ranks()[1]
    strike(lost, signal.SIGKILL)
    job.wait_for_error(" has come")
    assert job.wait(WAIT_S) == [0, 0, 0], job.err.read_text()
    assert job.out.read_text() == f"{answer}\n"
    said = job.err.read_text()
    again = re.findall(r"rank 1 \(host \S+, pid (\d+)\) holds layers", said)
    assert int(again[0]) == lost.pid
    assert int(again[-1]) != lost.pid, said


DEAF = """
import sys
from distllm.engine.cluster import Cluster
from distllm.plan import membership
from distllm.run import main

Cluster._kill = lambda self, rank: False  # as if it were on another host
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_rank_that_wakes_up_after_its_burial_comes_back_as_a_new_one(start: Start, model: Path, answer: str) -> None:
    ring = Ring(3, model, MANY)
    ring.words.append(f"cluster.deadline_s={DEADLINE_S}")
    agent = [sys.executable, "-m", "torch.distributed.run", "--master-addr=127.0.0.1", f"--master-port={ring.port}"]
    agent += ["--nnodes=3", "--nproc-per-node=1", "--max-restarts=2"]
    script = model.parent / "deaf.py"
    script.write_text(DEAF)
    commands = [[*agent, "--node-rank=0", str(script), *ring.words]]
    commands += [[*agent, f"--node-rank={rank}", "-m", "distllm.run", *ring.words] for rank in (1, 2)]
    job = start(commands)
    job.wait_for_text()
    sleeper = job.ranks()[1]
    strike(sleeper, signal.SIGSTOP)
    job.wait_for_error("going on with 1 request")
    assert sleeper.status() == psutil.STATUS_STOPPED
    sleeper.send_signal(signal.SIGCONT)
    job.wait_for_error(" has come")
    assert job.wait(WAIT_S) == [0, 0, 0], job.err.read_text()
    assert job.out.read_text() == f"{answer}\n"
    said = job.err.read_text()
    assert f"pid {sleeper.pid}) ends: the master does not know it" in said
    assert len(re.findall(r"rank 1 \(host \S+, pid \d+\) has come", said)) == 1


def test_a_warm_spare_takes_over_without_loading(model: Path, wanted: dict[SamplingParams, Any]) -> None:
    with several(model, 4, restarts=1, spares=1) as llm:
        job = llm._engine.job
        whole = [str(stage.span) for stage in llm.plan.stages]
        assert [stage.rank for stage in llm.plan.stages] == [0, 1, 2]
        wait_until(lambda: 3 in warm(llm), "the spare loads nothing")
        before = by_rank(llm)
        running = Running(llm, SEEDED)
        running.wait_for(20)
        strike(workers()[1], signal.SIGKILL)
        assert running.tokens() == wanted[SEEDED]
        assert [stage.rank for stage in llm.plan.stages] == [0, 3, 2]
        assert [str(stage.span) for stage in llm.plan.stages] == whole
        after = by_rank(llm)
        assert [after[rank]["read_bytes"] for rank in (0, 2)] == [before[rank]["read_bytes"] for rank in (0, 2)]
        everything = sum(each["weight_bytes"] for each in before.values())
        assert after[3]["read_bytes"] == everything, "before it was needed, and not again"
        wait_until(lambda: 1 in workers() and 1 in job._cluster.members, "rank 1 does not come back")  # type: ignore[union-attr]
        assert tokens(llm.generate([*PROMPTS, LONG], GREEDY)) == wanted[GREEDY]
        assert [stage.rank for stage in llm.plan.stages] == [0, 3, 2], "who comes back is the spare now"


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "holder"), [(1, 0), (2, 1)])
def test_a_part_that_is_held_twice_is_taken_over_without_loading(
    model: Path, wanted: dict[SamplingParams, Any], lost: int, holder: int
) -> None:
    with several(model, 3, restarts=1, plan=PlanConfig(calibrate=False, replicate=[lost])) as llm:
        job = llm._engine.job
        span, whole = llm.plan.stages[lost].span, [stage.span for stage in llm.plan.stages]

        def is_held() -> bool:
            return job._epochs.holdings.reserve_of(job._cluster.members[holder]) == span  # type: ignore[union-attr]

        running = Running(llm, SEEDED)
        running.wait_for(5)
        wait_until(is_held, "nobody holds it")
        before = by_rank(llm)
        strike(workers()[lost], signal.SIGKILL)
        wait_until(lambda: len(llm.plan.stages) == 2, "it is not noticed")
        assert running.tokens() == wanted[SEEDED]
        first = next(stage.span for stage in llm.plan.stages if stage.rank == holder)
        assert first.overlaps(span), "its neighbour has it now"
        serving(llm, [0, 1, 2], GREEDY, wanted[GREEDY])
        assert [stage.span for stage in llm.plan.stages] == whole
        after = by_rank(llm)
        read = {rank: after[rank]["read_bytes"] - before[rank]["read_bytes"] for rank in (0, 1, 2) if rank != lost}
        assert read.pop(holder) == before[lost]["weight_bytes"], "before it was needed, and not again"
        assert set(read.values()) == {0}
        wait_until(is_held, "it is held twice again")


@pytest.mark.slow
def test_the_script_for_one_host_starts_ranks_that_come_back(start: Start, model: Path, answer: str) -> None:
    script = str(Path(__file__).parents[2] / "launch" / "local.sh")
    job = start([["bash", script, "2", *Ring(2, model, MANY).words]])
    job.wait_for_text()
    lost = job.ranks()[1]
    strike(lost, signal.SIGKILL)
    job.wait_for_error(" has come")
    assert job.wait(WAIT_S) == [0], job.err.read_text()
    assert job.out.read_text() == f"{answer}\n"
    wait_until(lambda: not job.alive(), "ranks are left")
