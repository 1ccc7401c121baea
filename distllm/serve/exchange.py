"""What one HTTP request asked for: it outlives the connection that it came by, and this process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from distllm.plan.partition import counted
from distllm.serve.calls import Call, Refusal, TooLate, Unavailable
from distllm.serve.ledger import Entry, Ledger
from distllm.serve.messages import Grown
from distllm.serve.metrics import Metrics, Outcome
from distllm.serve.rank0 import Rank0
from distllm.serve.trial import Trials

logger = logging.getLogger(__name__)

FORGET_INTERVAL_S = 30.0
# A request waits to be accepted, then its answer is sent: between the two nobody follows it.
LEAVE_S = 0.02
MOST_TOLD = 20


class Full(RuntimeError):
    """So much waits already that no more is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What the journal keeps of an exchange besides its answers.

    `digest` is that of the request's body, `shape` that of the answer (chat or text), `choices` how many answers each
    prompt has.
    """

    shape: str
    created: int
    client: str
    digest: str
    stream: bool = False
    usage: bool = False
    tools: bool = False
    choices: int = 1


class Exchange:
    """One request and its answers.

    Attributes:
        key: what its client calls it, in order not to have it run twice.
        accepted: done when it is in the journal; has the error if it cannot be answered.
    """

    def __init__(self, name: str, about: About, calls: Sequence[Call], key: str | None = None) -> None:
        self.name = name
        self.about = about
        self.calls = calls
        self.key = key
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.accepted.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody need ask
        self.followers = 0

    @classmethod
    def again(cls, entry: Entry) -> Exchange:
        """As the journal has it."""
        about = About(**entry.about)  # type: ignore[arg-type]
        calls = [
            Call.again(f"{entry.name}/{place}", about.client, tokens, params, pieces)
            for place, (tokens, params, pieces) in enumerate(entry.calls)
        ]
        exchange = cls(entry.name, about, calls, entry.key)
        exchange.accepted.set_result(None)
        return exchange

    def entry(self) -> Entry:
        """As the journal takes it."""
        calls = [(call.tokens or (), call.params, call.pieces) for call in self.calls]
        return Entry(self.name, self.key, asdict(self.about), calls)

    def fail(self, error: Exception) -> None:
        """There will be no more of it, because of this."""
        if not self.accepted.done():
            self.accepted.set_exception(error)
        for call in self.calls:
            if not call.over:
                call.fail(error)

    @property
    def over(self) -> bool:
        """Every answer is whole."""
        return all(call.finish_reason is not None for call in self.calls)

    async def pieces(self, heard: Sequence[int], patience_s: float) -> AsyncIterator[tuple[int, Grown] | None]:
        """Pieces of all answers as they come, each with its answer's place; None when nothing has come for a while.

        Args:
            heard: how many of each answer are not wanted again.

        Raises:
            Refusal, Unavailable: an answer has ended early.
        """
        queue: asyncio.Queue[tuple[int, Grown | Exception | None]] = asyncio.Queue(maxsize=len(self.calls))

        async def follow(place: int, call: Call) -> None:
            try:
                async for piece in call.follow(heard[place]):
                    await queue.put((place, piece))
                await queue.put((place, None))
            except (Refusal, Unavailable) as error:
                await queue.put((place, error))

        tasks = [asyncio.create_task(follow(place, call)) for place, call in enumerate(self.calls)]
        left = len(tasks)
        try:
            while left:
                try:
                    async with asyncio.timeout(patience_s):  # wait_for would make a task of each piece
                        place, piece = await queue.get()
                except TimeoutError:
                    yield None
                    continue
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    left -= 1
                else:
                    yield place, piece
        finally:
            for task in tasks:
                task.cancel()

    async def whole(self) -> None:
        """Waits until every answer is whole.

        Raises:
            Refusal, Unavailable: one has ended early.
        """
        for call in self.calls:
            await call.whole()


class Exchanges:
    """Those that are not whole yet, and through the journal those that are.

    Args:
        most_calls: answers that are waited for at once, at most.
        resume_s: how long clients have to come back after this process was started again.
        timeout_s: longest time that one may take in this process; None for any.
        stands_by: whether another process is to stand by for rank 0's.
    """

    def __init__(
        self,
        ledger: Ledger,
        words: Sequence[str],
        *,
        most_calls: int,
        resume_s: float,
        timeout_s: float | None,
        stands_by: bool,
    ) -> None:
        self.metrics = Metrics()
        self.rank0 = Rank0(words, self._deliver, self.end, self.metrics, stands_by=stands_by)
        self.metrics.watch(self.rank0, ledger)
        self._trials = Trials()
        self._ledger = ledger
        self.most_calls = most_calls
        self._resume_s = resume_s
        self._timeout_s = timeout_s
        self._open: dict[str, Exchange] = {}
        self._keys: dict[str, Exchange] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closing = False

    @property
    def count(self) -> int:
        """Of those that are not whole."""
        return len(self._open)

    def in_flight(self) -> dict[str, object]:
        """How many run and wait, and the oldest of them, without what they say."""
        now = time.time()
        told: list[dict[str, object]] = []
        running = 0
        for exchange in self._open.values():
            runs = any(self.rank0.runs(call) for call in exchange.calls)
            running += runs
            if len(told) < MOST_TOLD:
                tokens = sum(call.known for call in exchange.calls)
                age_s = round(max(0.0, now - exchange.about.created), 1)
                state = "running" if runs else "waiting"
                told.append({"id": exchange.name, "state": state, "age_s": age_s, "tokens": tokens})
        return {"running": running, "waiting": len(self._open) - running, "oldest": told}

    def begin(self, exchange: Exchange) -> None:
        """Has it answered.

        Raises:
            Full: not now.
        """
        waited = sum(len(each.calls) for each in self._open.values())
        if waited + len(exchange.calls) > self.most_calls:
            raise Full(f"{waited} answers are waited for already")
        self.metrics.begun(exchange.calls)
        self._attend(exchange)

    def resume(self) -> None:
        """Goes on with what the journal has that is not whole."""
        for entry in self._ledger.unfinished():
            exchange = Exchange.again(entry)
            self._attend(exchange)
            asyncio.get_running_loop().call_later(self._resume_s, self._leave, exchange)
        if self._open:
            logger.info("going on with %s from %s", counted(len(self._open), "request"), self._ledger.path)

    def find(self, name: str) -> Exchange | None:
        """One by its name, also a whole one that is not forgotten yet."""
        return self._open.get(name) or self._again(self._ledger.find(name))

    def find_key(self, key: str) -> Exchange | None:
        """One by what its client calls it."""
        return self._keys.get(key) or self._again(self._ledger.find_key(key))

    def _again(self, entry: Entry | None) -> Exchange | None:
        """One that the journal has; what is missing of its answers, because there was no room for it, is made again."""
        if entry is None:
            return None
        exchange = Exchange.again(entry)
        if not exchange.over:
            self._attend(exchange)
        return exchange

    @contextmanager
    def followed(self, exchange: Exchange) -> Iterator[None]:
        """While a connection wants it. What nobody wants any more, and nobody can ask for by a key, is given up."""
        exchange.followers += 1
        try:
            yield
        finally:
            exchange.followers -= 1
            asyncio.get_running_loop().call_later(LEAVE_S, self._leave, exchange)

    def _leave(self, exchange: Exchange) -> None:
        if self._closing or exchange.followers > 0 or exchange.key is not None:
            return
        if (task := self._tasks.get(exchange.name)) is not None:
            self._open.pop(exchange.name, None)
            self._ledger.drop([exchange.name])  # nobody may come to it any more, before its task has ended
            task.cancel()

    async def forget(self) -> None:
        """Drops what ended long enough ago, from time to time."""
        while True:
            self._ledger.forget()
            await asyncio.sleep(FORGET_INTERVAL_S)

    def end(self) -> None:
        """From here on what is not whole stays in the journal, whoever leaves."""
        self._closing = True

    async def close(self) -> None:
        """Gives up what is not whole; whoever comes after this process goes on with it."""
        self.end()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._trials.close()
        self._ledger.close()

    def _attend(self, exchange: Exchange) -> None:
        self._open[exchange.name] = exchange
        if exchange.key is not None:
            self._keys[exchange.key] = exchange
        self._tasks[exchange.name] = asyncio.create_task(self._see_through(exchange))

    async def _see_through(self, exchange: Exchange) -> None:
        """From asking whether it can be answered until it is."""
        outcome: Outcome = "left"
        whole = False
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._answered(exchange)
            whole = True
            self._ledger.end(exchange.name)
        except TimeoutError:
            outcome = "timeout"
            logger.warning("%s takes longer than serve.request_timeout_s, and is given up", exchange.name)
            exchange.fail(TooLate(f"the answer takes longer than {self._timeout_s:g} s"))
        except (Refusal, Unavailable) as error:
            outcome = "refused" if isinstance(error, Refusal) else "failed"
            exchange.fail(error)
        finally:
            for call in exchange.calls:
                self.rank0.drop(call)
            if whole or not self._closing:
                self.metrics.ended(exchange.calls, outcome)
            if not whole and not self._closing:
                self._ledger.drop([exchange.name])
            self._open.pop(exchange.name, None)
            del self._tasks[exchange.name]
            if exchange.key is not None:
                del self._keys[exchange.key]

    async def _answered(self, exchange: Exchange) -> None:
        if not exchange.accepted.done():
            await self._accept(exchange)
        for call in exchange.calls:
            if call.finish_reason is None:
                self.rank0.ask(call)
        await exchange.whole()

    async def _accept(self, exchange: Exchange) -> None:
        for call in exchange.calls:
            await self._trials.attempt(call)
        for call in exchange.calls:
            self.rank0.read(call)
        for call in exchange.calls:
            await call.taken()
        try:
            self._ledger.accept(exchange.entry())
        except OSError as error:
            raise Unavailable(str(error)) from error
        self.metrics.accepted(exchange)
        exchange.accepted.set_result(None)

    def _deliver(self, grown: Sequence[tuple[Call, Grown]]) -> None:
        """Into the journal, before anybody hears of it."""
        starts: dict[str, int] = {}
        rows = []
        for call, piece in grown:
            start = starts.get(call.name, call.known)
            starts[call.name] = start + len(piece.tokens)
            name, _, place = call.name.rpartition("/")
            rows.append((name, int(place), start, piece))
        self._ledger.deliver(rows)
        self.metrics.grown(grown)
