"""How a rank ends: with the code that the master gave it, even if the master is gone by the time it asks."""

from __future__ import annotations

import threading

import pytest

from distllm.core import Member
from distllm.engine import process
from distllm.engine.process import Watch
from distllm.net.control import PeerLost

MEMBER = Member(life="life", rank=1, host="here", boot_id="boot", pid=1, memory_bytes=1, cores=1)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(process, "WATCH_INTERVAL_S", 0.01)
    monkeypatch.setattr(process, "MASTER_PULSE_S", 0.0)
    return Watch("master", MEMBER, deadline_s=1.0)


def closed(*_: object, **__: object) -> bool:
    raise PeerLost("master", "its connection is closed", timed_out=False)


def test_a_master_that_ended_the_job_has_the_last_word(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its order to stop is carried out a moment after its connection was found closed."""
    asked = threading.Event()

    def carry_out() -> None:
        asked.wait(10)
        watch.code = 0
        watch.done.set()

    def gone(*_: object, **__: object) -> bool:
        asked.set()
        return closed()

    monkeypatch.setattr(process, "call_by_name", gone)
    thread = threading.Thread(target=carry_out)
    thread.start()
    assert watch.wait() == 0
    thread.join(10)
    assert asked.is_set()
    assert not caplog.records


@pytest.mark.parametrize(
    ("answer", "told"),
    [(closed, "of the master, its connection is closed"), (lambda *_, **__: False, "the master does not know it")],
)
def test_a_rank_without_a_master_ends(
    answer: object, told: str, watch: Watch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "LAST_WORD_S", 0.05)
    monkeypatch.setattr(process, "call_by_name", answer)
    assert watch.wait() == 1
    assert [record.message for record in caplog.records] == [f"{MEMBER} ends: {told}"]
