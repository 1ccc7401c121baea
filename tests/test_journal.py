"""What a process that is killed has written, and what the next one reads."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from distllm import journal
from distllm.core import Request, SamplingParams
from distllm.journal import Journal

ABOUT = {"model": "m", "sampling": "s"}
PARAMS = SamplingParams(max_tokens=9, temperature=0.5, seed=7, stop=("a", "é\n"))
FIRST = Request(id=0, tokens=(1, 2, 3), params=PARAMS, eos_ids=frozenset({5}))
SECOND = replace(FIRST, tokens=(4,), params=replace(PARAMS, seed=2**63 - 1))

KILLED = """
import os, signal, sys
from pathlib import Path
from distllm import journal
from distllm.core import Request, SamplingParams

journal.FLUSH_S = 0.0
opened = journal.Journal(Path(sys.argv[1]), {"model": "m", "sampling": "s"})
opened.accept([("a", Request(id=0, tokens=(1, 2, 3), params=SamplingParams(max_tokens=10**6, seed=7)))])
tokens = []
while True:
    tokens.append(len(tokens))
    opened.deliver("a", tokens)
    print(len(tokens), flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "a journal"
    assert not list(tmp_path.glob("*-shm")), "memory is shared"


def test_the_next_one_goes_on(path: Path) -> None:
    first = Journal(path, ABOUT)
    assert first.accept([("a", FIRST), ("b", SECOND)]) == [FIRST, SECOND]
    assert not first.holds_something
    first.deliver("a", [10])
    first.deliver("a", [10, 11, 12])
    first.flush()
    first.deliver("a", [10, 11, 12, 13])
    first.deliver("b", [20])
    first.end("b", '{"é": 1}')
    first.flush()
    first.deliver("a", [10, 11, 12, 13])
    first.flush()
    assert first.holds_something
    first.close()
    second = Journal(path, ABOUT)
    others = [("a", replace(FIRST, params=SamplingParams(seed=99))), ("b", SECOND)]
    assert second.accept(others) == [replace(FIRST, generated=(10, 11, 12, 13)), replace(SECOND, generated=(20,))]
    assert second.answers() == {"b": '{"é": 1}'}
    second.deliver("a", [10, 11, 12, 13, 14])
    second.flush()
    second.close()
    third = Journal(path, ABOUT)
    assert third.accept([("a", FIRST)])[0].generated == (10, 11, 12, 13, 14)
    third.remove()
    assert list(path.parent.iterdir()) == []


def test_whole_answers_are_written_from_time_to_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if none of them has a token before its last one."""
    monkeypatch.setattr(journal, "FLUSH_S", 3600.0)
    opened = Journal(path, ABOUT)
    opened.accept([("a", FIRST), ("b", SECOND)])
    opened.end("a", "1")
    assert opened.answers() == {}
    monkeypatch.setattr(journal, "FLUSH_S", 0.0)
    opened.end("b", "2")
    assert opened.answers() == {"a": "1", "b": "2"}
    opened.close()


def test_writes_from_time_to_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "FLUSH_S", 3600.0)
    opened = Journal(path, ABOUT)
    opened.accept([("a", FIRST)])
    opened.deliver("a", [1])
    assert not opened.holds_something
    monkeypatch.setattr(journal, "FLUSH_S", 0.0)
    opened.deliver("a", [1, 2])
    assert opened.holds_something
    opened.close()


def test_a_process_that_is_killed(path: Path) -> None:
    """In the middle of writing: what it said to have delivered is there, but for the last moment."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 300:
            break
    process.kill()
    last = max(int(line) for line in [*process.stdout.read().split(), "300"])
    assert process.wait() == -signal.SIGKILL
    opened = Journal(path, ABOUT)
    (request,) = opened.accept([("a", FIRST)])
    assert request.generated == tuple(range(len(request.generated)))
    assert last <= len(request.generated) <= last + 1
    opened.close()


def test_one_process_at_a_time(path: Path) -> None:
    first = Journal(path, ABOUT)
    with pytest.raises(ValueError, match=f"^{path}: another process is writing it; wait for it, or end it$"):
        Journal(path, ABOUT)
    first.accept([("a", FIRST)])
    first.close()
    Journal(path, ABOUT).close()


@pytest.mark.parametrize("name", ["model", "sampling", "format"])
def test_of_another_job(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(path, ABOUT).close()
    if name == "format":
        monkeypatch.setattr(journal, "FORMAT", "0")
    with pytest.raises(
        ValueError, match=f"^{path}: was begun with another {name}; give .* or delete it to begin anew$"
    ):
        Journal(path, ABOUT if name == "format" else ABOUT | {name: "x"})
    assert path.exists()


def test_what_is_no_journal(path: Path) -> None:
    path.write_text("my own notes, nothing else, and longer than the head of a database" * 10)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"is no journal \(file is not a database\); delete it to begin anew$"):
        Journal(path, ABOUT)
    assert path.read_bytes() == before


def test_a_database_of_others(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE mine (x)")
    other.close()
    with pytest.raises(ValueError, match=r"cannot be used as a journal: no such table: about$"):
        Journal(path, ABOUT)


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no/j: cannot be used as a journal: unable to open database file$"):
        Journal(tmp_path / "no" / "j", ABOUT)


def test_a_journal_of_an_empty_file_keeps_its_mode(path: Path) -> None:
    path.touch(0o600)
    opened = Journal(path, ABOUT)
    opened.accept([("a", FIRST)])
    modes = {each.name: os.stat(each).st_mode & 0o777 for each in path.parent.iterdir()}
    assert modes == {"a journal": 0o600, "a journal-wal": 0o600}
    opened.close()
