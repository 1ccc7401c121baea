"""The server's journal: what is accepted stays, what has ended is kept for a while, no model ends another's work."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from distllm.core import SamplingParams
from distllm.serve import ledger as ledgers
from distllm.serve.ledger import Entry, Ledger
from distllm.serve.messages import Grown

PARAMS = SamplingParams(max_tokens=9, seed=3, stop=("x",), logit_bias={5: 1.5})
FIRST, SECOND = Grown("one/0", "Hel", [1, 2]), Grown("one/0", "lo", [3], "stop", [([104], -0.5), []])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def opened(path: Path, *, model: str = "m", keep_s: float = 60.0, redact: bool = False) -> Ledger:
    return Ledger(path, model=model, keep_s=keep_s, redact=redact)


def entry(name: str = "one", key: str | None = "k") -> Entry:
    return Entry(name, key, {"client": "c"}, [([7, 8, 9], PARAMS, []), ([7], PARAMS, [])])


def test_the_next_process_finds_what_was_accepted_and_delivered(path: Path) -> None:
    before = opened(path)
    before.accept(entry())
    before.deliver([("one", 0, 0, FIRST), ("one", 0, 2, SECOND)])
    before.close()
    after = opened(path)
    (found,) = after.unfinished()
    assert (found.name, found.key, found.about) == ("one", "k", {"client": "c"})
    (tokens, params, pieces), other = found.calls
    assert (tokens, params) == ([7, 8, 9], PARAMS)
    assert [(each.text, list(each.tokens), each.finish_reason) for each in pieces] == [
        ("Hel", [1, 2], None),
        ("lo", [3], "stop"),
    ]
    assert other == ([7], PARAMS, [])
    assert after.find_key("k") == found
    assert after.find("two") is after.find_key("two") is None


def test_answers_that_had_begun_come_first_and_then_the_oldest(path: Path) -> None:
    before = opened(path)
    for name, created in (("d", 3), ("c", 1), ("a", 2), ("b", 4)):
        before.accept(Entry(name, None, {"created": created}, [([7], PARAMS, [])]))
    before.deliver([("b", 0, 0, FIRST), ("d", 0, 0, FIRST)])
    before.close()
    assert [each.name for each in opened(path).unfinished()] == ["d", "b", "c", "a"]


def test_pieces_behind_a_gap_are_not_taken(path: Path) -> None:
    ledger = opened(path)
    ledger.accept(entry())
    ledger.deliver([("one", 0, 0, FIRST), ("one", 0, 5, SECOND)])
    found = ledger.find("one")
    assert found is not None
    assert [each.text for each in found.calls[0][2]] == ["Hel"]


def test_what_has_ended_is_kept_for_a_while(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = opened(path, keep_s=100.0)
    ledger.accept(entry())
    ledger.end("one")
    assert list(ledger.unfinished()) == []
    ledger.forget()
    assert ledger.find("one") is not None
    now = ledgers.time.time()
    monkeypatch.setattr(ledgers.time, "time", lambda: now + 101)
    ledger.forget()
    assert ledger.find("one") is None
    ledger.accept(entry("two"))  # the key is free again


def test_what_is_dropped_or_not_to_be_kept_leaves_nothing(path: Path) -> None:
    ledger = opened(path, keep_s=0.0)
    for name in ("one", "two"):
        ledger.accept(entry(name, None))
        ledger.deliver([(name, 0, 0, FIRST)])
    ledger.drop(["one"])
    ledger.end("two")
    ledger.close()
    with sqlite3.connect(path) as file:
        for table in ("exchanges", "calls", "pieces"):
            assert file.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    file.close()


def test_prompts_are_taken_out_when_they_are_answered(path: Path) -> None:
    ledger = opened(path, redact=True)
    ledger.accept(entry())
    ledger.deliver([("one", 0, 0, FIRST)])
    ledger.end("one")
    found = ledger.find("one")
    assert found is not None
    assert [tokens for tokens, _, _ in found.calls] == [[0, 0, 0], [0]], "their number is still told"
    assert found.calls[0][2]


def test_another_model_takes_over_only_what_has_ended(path: Path) -> None:
    ledger = opened(path)
    ledger.accept(entry())
    ledger.close()
    with pytest.raises(ValueError, match=r"has 1 requests that another model .* \(m\)"):
        opened(path, model="n")
    ledger = opened(path)
    ledger.end("one")
    ledger.close()
    assert opened(path, model="n").find("one") is None


def test_a_full_disk_refuses_new_requests_and_harms_no_old_ones(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = opened(path)
    ledger.accept(entry())
    ledger._file.execute("PRAGMA max_page_count = 1")
    with pytest.raises(OSError, match="cannot be written"):
        ledger.accept(Entry("two", None, {"long": "x" * 10**6}, []))
    ledger.deliver([("one", 0, 0, Grown("one/0", "x" * 10**6, [1]))])
    assert "cannot be written" in caplog.text
    ledger._file.execute("PRAGMA max_page_count = 1000000")
    ledger.deliver([("one", 0, 1, FIRST)])
    assert "can be written again" in caplog.text
    ledger.end("one")
    assert ledger.find("one") is None, "an answer with a gap is nothing to give again"
