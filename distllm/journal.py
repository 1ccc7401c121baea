"""What was asked and what was answered so far, on disk: whoever comes after a process that died goes on from there.

One SQLite file in WAL mode, held by one process at a time. Knows no model and no network.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from distllm.core import Request, SamplingParams

logger = logging.getLogger(__name__)

FORMAT = "1"
# Tokens of so short a time may have to be generated again, with the same result.
FLUSH_S = 0.5
SUFFIXES = ("", "-wal", "-shm")  # of the files that SQLite makes of one

ABOUT = "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
TABLES = (
    "CREATE TABLE requests (name TEXT PRIMARY KEY, tokens TEXT NOT NULL, params TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE pieces (name TEXT, start INT, tokens TEXT NOT NULL, PRIMARY KEY (name, start)) WITHOUT ROWID",
    "CREATE TABLE answers (name TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID",
)


class JournalFile:
    """A file of tables, written by one process, which nothing of it surprises that was killed.

    Args:
        path: a file; it is made if it is not there.
        tables: how to make them.
        about: what the answers depend on, by name; a journal that was begun with anything else is refused.

    Raises:
        ValueError: it is not a journal, not of this job, cannot be written, or another process holds it.
    """

    def __init__(self, path: Path, tables: Sequence[str], about: Mapping[str, str]) -> None:
        self.path = path
        self._failing = False
        about = {"format": FORMAT, **about}
        try:
            with self._in_words():
                self._begin(tables, about)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """
        Raises:
            ValueError: in place of whatever SQLite has to say.
        """
        try:
            yield
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                raise ValueError(f"{self.path}: another process is writing it; wait for it, or end it") from error
            if isinstance(error, sqlite3.OperationalError):
                raise ValueError(f"{self.path}: cannot be used as a journal: {error}") from error
            raise ValueError(f"{self.path}: is no journal ({error}); delete it to begin anew") from error

    def _begin(self, tables: Sequence[str], about: Mapping[str, str]) -> None:
        self._file = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        self._file.execute("PRAGMA locking_mode=EXCLUSIVE")  # before WAL, which needs no shared memory then
        self._file.execute("PRAGMA journal_mode=WAL")
        self._file.execute("PRAGMA synchronous=NORMAL")
        with self._at_once():
            if self._file.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                for table in (ABOUT, *tables):
                    self._file.execute(table)
                self._file.executemany("INSERT INTO about VALUES (?, ?)", about.items())
        before = dict(self._file.execute("SELECT name, value FROM about"))
        if differing := [name for name in about if before.get(name) != about[name]]:
            raise ValueError(
                f"{self.path}: was begun with another {differing[0]}; give what it was begun with to go on, or delete "
                "it to begin anew"
            )

    @contextmanager
    def _at_once(self) -> Iterator[None]:
        """All of what is written, or nothing."""
        try:
            self._file.execute("BEGIN IMMEDIATE")
            yield
            self._file.execute("COMMIT")
        except BaseException:
            if self._file.in_transaction:
                self._file.execute("ROLLBACK")
            raise

    def _try(self, writes: Sequence[tuple[str, Iterable[tuple[object, ...]]]]) -> bool:
        """Statements with their rows, all at once; whether they could be written. The log is told when that changes."""
        try:
            with self._at_once():
                for statement, rows in writes:
                    self._file.executemany(statement, rows)
        except sqlite3.DatabaseError as error:
            if not self._failing:
                logger.warning("%s: cannot be written (%s); going on without, and trying again", self.path, error)
            self._failing = True
            return False
        if self._failing:
            logger.warning("%s: can be written again", self.path)
        self._failing = False
        return True

    @property
    def nbytes(self) -> int:
        """What it takes on disk."""
        files = (self.path.with_name(self.path.name + suffix) for suffix in SUFFIXES)
        return sum(file.stat().st_size for file in files if file.exists())

    def close(self) -> None:
        """Another process may go on with it."""
        if hasattr(self, "_file"):
            self._file.close()

    def remove(self) -> None:
        """It is not needed any more."""
        self._file.close()
        for suffix in SUFFIXES:
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Pending:
    """What is not on disk yet."""

    pieces: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)


class Journal(JournalFile):
    """The journal of one job that answers a file of prompts.

    Raises:
        ValueError: as JournalFile.
    """

    def __init__(self, path: Path, about: Mapping[str, str]) -> None:
        super().__init__(path, TABLES, about)
        self._pending = Pending()
        self._known: dict[str, int] = {}
        self._flushed = time.monotonic()

    def accept(self, requests: Iterable[tuple[str, Request]]) -> list[Request]:
        """Takes requests by their names, and gives them back as they were taken first: with the seed that was drawn
        then, and with what they have of their answers.

        Raises:
            ValueError: it cannot be written.
        """
        taken = list(requests)
        fresh = [(name, json.dumps(each.tokens), json.dumps(asdict(each.params))) for name, each in taken]
        with self._in_words(), self._at_once():
            self._file.executemany("INSERT OR IGNORE INTO requests VALUES (?, ?, ?)", fresh)
        return [self._as_taken(name, request) for name, request in taken]

    def _as_taken(self, name: str, request: Request) -> Request:
        tokens, params = self._file.execute("SELECT tokens, params FROM requests WHERE name = ?", (name,)).fetchone()
        rows = self._file.execute("SELECT tokens FROM pieces WHERE name = ? ORDER BY start", (name,))
        generated = tuple(token for (piece,) in rows for token in json.loads(piece))
        self._known[name] = len(generated)
        values = json.loads(params)
        return Request(
            id=request.id,
            tokens=tuple(json.loads(tokens)),
            params=SamplingParams(**values | {"stop": tuple(values["stop"])}),
            eos_ids=request.eos_ids,
            generated=generated,
        )

    def answers(self) -> dict[str, str]:
        """Those that are whole, by the names of their requests."""
        with self._in_words():
            return dict(self._file.execute("SELECT name, answer FROM answers"))

    @property
    def holds_something(self) -> bool:
        """Whether there is anything to go on from."""
        return any(self._file.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in ("pieces", "answers"))

    def deliver(self, name: str, tokens: Sequence[int]) -> None:
        """Notes what a request has of its answer now: all of its tokens so far."""
        known = self._known[name]
        if len(tokens) > known:
            start, piece = self._pending.pieces.setdefault(name, (known, []))
            piece.extend(tokens[start + len(piece) :])
            self._known[name] = len(tokens)
        self._flush_in_time()

    def end(self, name: str, answer: str) -> None:
        """Notes a whole answer."""
        self._pending.answers[name] = answer
        self._flush_in_time()

    def _flush_in_time(self) -> None:
        if time.monotonic() - self._flushed >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending. While that fails it stays in memory, and the next time may do better."""
        self._flushed = time.monotonic()
        pieces = [(name, start, json.dumps(tokens)) for name, (start, tokens) in self._pending.pieces.items()]
        writes = [
            ("INSERT OR REPLACE INTO pieces VALUES (?, ?, ?)", pieces),
            ("INSERT OR REPLACE INTO answers VALUES (?, ?)", self._pending.answers.items()),
        ]
        if self._try(writes):
            self._pending = Pending()

    def settle(self) -> None:
        """Sees to it that all is on disk.

        Raises:
            OSError: it cannot be written.
        """
        self.flush()
        if self._failing:
            raise OSError(f"{self.path}: cannot be written; make room on its disk")
