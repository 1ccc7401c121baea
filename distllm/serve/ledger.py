"""The server's journal: what it has accepted, and what came of it, before anybody is told."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distllm.core import SamplingParams
from distllm.journal import JournalFile
from distllm.serve.messages import Grown

logger = logging.getLogger(__name__)

TABLES = (
    "CREATE TABLE exchanges (name TEXT PRIMARY KEY, key TEXT UNIQUE, about TEXT NOT NULL, ended REAL) WITHOUT ROWID",
    "CREATE TABLE calls (name TEXT, place INT, tokens TEXT, params TEXT NOT NULL, PRIMARY KEY (name, place))"
    " WITHOUT ROWID",
    "CREATE TABLE pieces (name TEXT, place INT, start INT, piece TEXT NOT NULL, PRIMARY KEY (name, place, start))"
    " WITHOUT ROWID",
)

UNFINISHED = (
    "SELECT name FROM exchanges WHERE ended IS NULL ORDER BY name NOT IN (SELECT name FROM pieces),"
    " json_extract(about, '$.created')"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One exchange as the journal has it.

    `about` is what else is to be known of it; `calls` has for each answer the prompt, if it is kept, the parameters,
    and the pieces.
    """

    name: str
    key: str | None
    about: dict[str, object]
    calls: Sequence[tuple[Sequence[int], SamplingParams, Sequence[Grown]]]


class Ledger(JournalFile):
    """What the server has accepted and not forgotten.

    Args:
        path: a file; it is made if it is not there.
        model: what answers; a journal with work that another one has begun is refused.
        keep_s: how long what has ended is kept, for those that ask for it again.
        redact: prompts are not kept longer than it takes to answer them.

    Raises:
        ValueError: it is not a journal, cannot be written, another process holds it, or it has work of another model.
    """

    def __init__(self, path: Path, *, model: str, keep_s: float, redact: bool) -> None:
        super().__init__(path, TABLES, {"kind": "server"})
        self._keep_s = keep_s
        self._redact = redact
        self._gaps: set[str] = set()
        try:
            with self._in_words(), self._at_once():
                self._adopt(model)
        except BaseException:
            self.close()
            raise

    def _adopt(self, model: str) -> None:
        before = self._file.execute("SELECT value FROM about WHERE name = 'model'").fetchone()
        if before is not None and before != (model,):
            (open_ones,) = self._file.execute("SELECT count(*) FROM exchanges WHERE ended IS NULL").fetchone()
            if open_ones:
                raise ValueError(
                    f"{self.path}: has {open_ones} requests that another model or dtype has begun to answer "
                    f"({before[0]}); serve that to go on, or delete the file"
                )
            for table in ("pieces", "calls", "exchanges"):
                self._file.execute(f"DELETE FROM {table}")
        self._file.execute("INSERT OR REPLACE INTO about VALUES ('model', ?)", (model,))

    def accept(self, entry: Entry) -> None:
        """Notes what has been accepted.

        Raises:
            OSError: it cannot be written.
        """
        calls = [
            (entry.name, place, json.dumps(tokens), json.dumps(asdict(params)))
            for place, (tokens, params, _) in enumerate(entry.calls)
        ]
        try:
            with self._at_once():
                about = json.dumps(entry.about)
                self._file.execute("INSERT INTO exchanges VALUES (?, ?, ?, NULL)", (entry.name, entry.key, about))
                self._file.executemany("INSERT INTO calls VALUES (?, ?, ?, ?)", calls)
        except sqlite3.DatabaseError as error:
            raise OSError(f"the journal cannot be written: {error}") from error

    def deliver(self, pieces: Iterable[tuple[str, int, int, Grown]]) -> None:
        """Notes pieces of answers: exchange, place of the answer in it, tokens before, and the piece.

        While it cannot be written they are not; what was accepted is answered all the same.
        """
        rows = [(name, place, start, json.dumps(_written(piece))) for name, place, start, piece in pieces]
        if not self._try([("INSERT OR REPLACE INTO pieces VALUES (?, ?, ?, ?)", rows)]):
            self._gaps.update(name for name, *_ in rows)

    def end(self, name: str) -> None:
        """An exchange is whole; if the journal has it not whole, it is not kept."""
        if self._keep_s <= 0 or name in self._gaps:
            self.drop([name])
            return
        writes: list[tuple[str, list[tuple[object, ...]]]]
        writes = [("UPDATE exchanges SET ended = ? WHERE name = ?", [(time.time(), name)])]
        if self._redact:
            rows = self._file.execute("SELECT tokens, place FROM calls WHERE name = ?", (name,)).fetchall()
            blank: list[tuple[object, ...]] = [
                (json.dumps([0] * len(json.loads(tokens))), name, place) for tokens, place in rows
            ]
            writes.append(("UPDATE calls SET tokens = ? WHERE name = ? AND place = ?", blank))
        self._try(writes)

    def drop(self, names: Iterable[str]) -> None:
        """Nobody will ask for these again."""
        names = list(names)
        self._gaps.difference_update(names)
        self._try(_deletes(names))

    def forget(self) -> None:
        """Drops what ended long enough ago."""
        ended = time.time() - self._keep_s
        try:
            old = self._file.execute("SELECT name FROM exchanges WHERE ended < ?", (ended,)).fetchall()
        except sqlite3.DatabaseError as error:
            logger.warning("%s: cannot be read: %s", self.path, error)
            return
        self.drop([name for (name,) in old])

    def unfinished(self) -> Iterator[Entry]:
        """Exchanges that are not whole: those that have something of their answers first, then the oldest."""
        for (name,) in self._file.execute(UNFINISHED).fetchall():
            if (entry := self.find(name)) is not None:
                yield entry

    def find(self, name: str) -> Entry | None:
        """An exchange by its name."""
        found = self._file.execute("SELECT key, about FROM exchanges WHERE name = ?", (name,)).fetchone()
        if found is None:
            return None
        rows = self._file.execute("SELECT tokens, params FROM calls WHERE name = ? ORDER BY place", (name,)).fetchall()
        calls = [
            (json.loads(tokens), _params(params), self._pieces(name, place))
            for place, (tokens, params) in enumerate(rows)
        ]
        return Entry(name, found[0], json.loads(found[1]), calls)

    def find_key(self, key: str) -> Entry | None:
        """An exchange by the key that its client has given it."""
        found = self._file.execute("SELECT name FROM exchanges WHERE key = ?", (key,)).fetchone()
        return None if found is None else self.find(found[0])

    def _pieces(self, name: str, place: int) -> list[Grown]:
        """Up to where some may be missing, because there was no room for them."""
        rows = self._file.execute(
            "SELECT start, piece FROM pieces WHERE name = ? AND place = ? ORDER BY start", (name, place)
        ).fetchall()
        pieces: list[Grown] = []
        known = 0
        for start, piece in rows:
            if start != known:
                break
            pieces.append(Grown(f"{name}/{place}", *json.loads(piece)))
            known += len(pieces[-1].tokens)
        return pieces


def _deletes(names: Iterable[str]) -> list[tuple[str, list[tuple[object, ...]]]]:
    gone: list[tuple[object, ...]] = [(name,) for name in names]
    return [(f"DELETE FROM {table} WHERE name = ?", gone) for table in ("pieces", "calls", "exchanges")]


def _written(piece: Grown) -> tuple[object, ...]:
    """A piece as `_pieces` reads it; `dataclasses.astuple` would copy all that it is made of."""
    return piece.text, piece.tokens, piece.finish_reason, piece.logprobs, piece.reused


def _params(written: str) -> SamplingParams:
    return SamplingParams(**json.loads(written))
