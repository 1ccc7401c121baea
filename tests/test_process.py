"""How a rank ends, or waits for another master: told by what its master answers, or does not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from waiting import wait_until

from distllm.core import Member
from distllm.engine import process
from distllm.engine.process import Watch
from distllm.net import store
from distllm.net.control import PeerLost
from distllm.net.store import Rendezvous

MEMBER = Member(life="life", rank=1, host="here", boot_id="boot", pid=1, memory_bytes=1, cores=1)
NOBODYS = Rendezvous(rank=1, world_size=2, host="127.0.0.1", port=1, job="job")  # no torchrun has started it
CLOSED = PeerLost("master", "its connection is closed", timed_out=False)
WAITS = f"{MEMBER} waits for another master for 10 s: of the master, its connection is closed"


class Master:
    """What a rank hears of its master, and of the next one: an answer, or an error."""

    def __init__(self) -> None:
        self.known: bool | Exception = True
        self.renewed: bool | Exception = False
        self.asked = threading.Event()

    def knows(self) -> bool:
        self.asked.set()
        return _said(self.known)

    def renew(self) -> bool:
        return _said(self.renewed)


class Worker:
    def __init__(self) -> None:
        self.rests = 0
        self.ring_broke = threading.Event()
        self.gone: Exception | None = None

    def rest(self) -> None:
        self.rests += 1
        if self.gone:
            raise self.gone


def _said(answer: bool | Exception) -> bool:
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.fixture
def master() -> Master:
    return Master()


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def watch(master: Master, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watch]:
    monkeypatch.setattr(process, "WATCH_INTERVAL_S", 0.01)
    monkeypatch.setattr(process, "MASTER_PULSE_S", 0.0)
    monkeypatch.setattr(process, "ORPHAN_PULSE_S", 0.0)
    monkeypatch.setattr(process, "LAST_WORD_S", 0.05)

    def make(orphan_deadline_s: float = 10.0, rendezvous: Rendezvous = NOBODYS) -> Watch:
        return Watch(rendezvous, master, MEMBER, worker, orphan_deadline_s)

    return make


@pytest.mark.parametrize("orphan_deadline_s", [0.0, 10.0])
def test_a_master_that_ended_the_job_has_the_last_word(
    watch: Callable[..., Watch],
    master: Master,
    orphan_deadline_s: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its order to stop is carried out a moment after its connection was found closed."""
    monkeypatch.setattr(process, "LAST_WORD_S", 5.0)
    mine = watch(orphan_deadline_s)

    def carry_out() -> None:
        master.asked.wait(10)
        mine.code = 0
        mine.done.set()

    master.known = CLOSED
    thread = threading.Thread(target=carry_out)
    thread.start()
    assert mine.wait() == 0
    thread.join(10)
    assert master.asked.is_set()
    assert not caplog.records


@pytest.mark.parametrize(
    ("answer", "orphan_deadline_s", "told"),
    [
        (CLOSED, 0.0, "of the master, its connection is closed"),
        (False, 0.0, "the master does not know it"),
        (False, 10.0, "the master does not know it"),
    ],
)
def test_a_rank_that_has_no_master_any_more_ends(
    watch: Callable[..., Watch],
    master: Master,
    worker: Worker,
    answer: bool | Exception,
    orphan_deadline_s: float,
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    master.known = answer
    assert watch(orphan_deadline_s).wait() == 1
    assert [record.message for record in caplog.records] == [f"{MEMBER} ends: {told}"]
    assert worker.rests == 0


def test_a_broken_ring_is_a_reason_to_look_for_the_master_at_once(
    watch: Callable[..., Watch], master: Master, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "MASTER_PULSE_S", 1000.0)
    mine = watch()
    thread = threading.Thread(target=mine.wait)
    thread.start()
    assert not master.asked.wait(0.1)
    worker.ring_broke.set()
    assert master.asked.wait(10)
    assert not worker.ring_broke.is_set()
    mine.done.set()
    thread.join(10)
    assert not thread.is_alive()


def test_a_rank_rests_until_it_has_a_master_again(
    watch: Callable[..., Watch], master: Master, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    mine = watch()
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(mine.wait()))
    thread.start()
    for lives in range(1, 3):
        master.known = CLOSED
        wait_until(lambda lives=lives: caplog.text.count("waits for another master") == lives, "it does not wait")  # type: ignore[misc]
        assert worker.rests == lives
        master.known = master.renewed = True
        wait_until(lambda lives=lives: caplog.text.count("has a master again") == lives, "it has no master")  # type: ignore[misc]
        master.renewed = False
    mine.code = 3
    mine.done.set()
    thread.join(10)
    assert codes == [3]
    assert caplog.records[0].message == WAITS


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (False, "no other master came within 0.2 s"),
        (ValueError("it was refused: it has torch 1, the master 2"), "it was refused: it has torch 1, the master 2"),
        (ConnectionError("the job's store is gone"), "the job's store is gone"),
    ],
)
def test_a_rank_that_finds_no_other_master_ends(
    watch: Callable[..., Watch],
    master: Master,
    answer: bool | Exception,
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    master.known, master.renewed = CLOSED, answer
    assert watch(0.2).wait() == 1
    assert caplog.records[-1].message == f"{MEMBER} ends: {told}"


def test_a_rank_whose_store_is_gone_too_ends(
    watch: Callable[..., Watch], master: Master, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    master.known, worker.gone = CLOSED, ConnectionError("the job's store is gone")
    assert watch().wait() == 1
    told = f"{MEMBER} ends: of the master, its connection is closed; the job's store is gone"
    assert [record.message for record in caplog.records] == [told]


@pytest.mark.parametrize("code", [0, 3])
def test_who_comes_too_late_ends_as_the_job_did(
    watch: Callable[..., Watch], master: Master, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It has registered, but the master was gone before it could be told to stop."""
    served, port = store.serve_on_loopback()
    master.known = CLOSED
    rendezvous = replace(NOBODYS, port=port, run_id="run")
    late = watch(300.0, rendezvous)
    codes: list[int] = []
    waiting = threading.Thread(target=lambda: codes.append(late.wait()))
    waiting.start()
    wait_until(lambda: late._orphan_since is not None, "it does not wait for another master")
    assert codes == []
    store.conclude(rendezvous, code)
    waiting.join(30)
    assert codes == [code]
    assert "ends: the job has ended meanwhile" in caplog.text
    del served


@pytest.mark.parametrize(("restarted", "code"), [(True, 0), (False, 1)])
def test_without_a_store_only_who_was_started_again_may_be_late(
    watch: Callable[..., Watch],
    master: Master,
    worker: Worker,
    restarted: bool,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "CONCLUDED_TIMEOUT_S", 0.2)
    master.known, worker.gone = CLOSED, ConnectionError("the job's store is gone")
    assert watch(300.0, replace(NOBODYS, run_id="run", restarted=restarted)).wait() == code
