"""Rank 0 as the front sees it: a process that is started again when it dies, and asked again what it was asked."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from distllm.plan.partition import counted
from distllm.serve.calls import Call, Deadly
from distllm.serve.events import Events
from distllm.serve.life import Life
from distllm.serve.messages import Drop, Failed, Grown, Message, Ready, Refused, Role, Stop, Taken, Told
from distllm.serve.metrics import Metrics
from distllm.serve.suspects import Suspects
from distllm.serve.turns import Turns

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
STANDBY_PAUSE_S = 3.0  # answers that had to wait need the cores first


class Rank0:
    """The process that computes, and the answers that it is asked for.

    A call is read first, so that what cannot be answered is refused at once, and asked when it is its client's turn.

    Attributes:
        ready: whether it can be asked now. What is asked before waits for it.
        stats: what it told last; see `LLM.stats`.
        comings: how often it has become ready.
        events: what became of it, and what it tells of the other ranks.
        told: whether it has heard that it is to end, and the other ranks from it.

    Args:
        words: the command line, which the process gets too.
        journal: takes new pieces of answers before anybody hears of them.
        ending: is told when there will be no more, before those that wait are.
        metrics: are told what becomes of it, and what it tells.
        stands_by: whether another process is to stand by while one is ready.
    """

    def __init__(
        self,
        words: Sequence[str],
        journal: Callable[[Sequence[tuple[Call, Grown]]], None],
        ending: Callable[[], None],
        metrics: Metrics,
        *,
        stands_by: bool,
    ) -> None:
        self._words = words
        self._journal = journal
        self._ending = ending
        self._metrics = metrics
        self._read: dict[str, Call] = {}
        self._asked: dict[str, Call] = {}
        self._turns: Turns[Call] = Turns()
        self._suspects = Suspects()
        self._sent: set[str] = set()  # names of those that it was asked in this life
        self._most = 0
        self._stands_by = stands_by
        self._life: Life | None = None
        self._standby: Life | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self.ready = self.told = False
        self.comings = 0
        self.stats: Mapping[str, Any] = {}
        self.events = Events()
        self._began = 0.0

    @property
    def calls(self) -> int:
        """Answers that are waited for."""
        return len(self._read) + len(self._turns) + len(self._asked)

    def runs(self, call: Call) -> bool:
        """Whether it is at it; else the call waits for its turn, or for the process."""
        return self.ready and call.name in self._asked

    def read(self, call: Call) -> None:
        """Has it say whether a call can be answered."""
        self._read[call.name] = call
        self._let_in()

    def ask(self, call: Call) -> None:
        """Has it answer a call that can be answered, when it is its turn."""
        self._turns.add(call.client, call)
        self._let_in()

    def drop(self, call: Call) -> None:
        """Nobody wants the answer any more; one that is whole is no mistake."""
        if not self._turns.remove(call.client, call) and self._asked.get(call.name) is not None:
            self._send(Drop(call.name))
        self._part_with(call)
        self._let_in()

    def _part_with(self, call: Call) -> None:
        for each in (self._read, self._asked):
            each.pop(call.name, None)
        self._sent.discard(call.name)
        self._suspects.over(call)

    def _let_in(self) -> None:
        """Asks what may be asked now."""
        if not self.ready:
            return
        known = (*self._read.values(), *self._asked.values())
        for call in self._suspects.admitted([each for each in known if each.name not in self._sent]):
            self._put(call)
        while not self._suspects.on_trial and len(self._turns) and len(self._asked) < self._most:
            call = self._turns.next()
            self._asked[call.name] = call
            self._put(call)

    def _put(self, call: Call) -> None:
        self._sent.add(call.name)
        self._suspects.asked(call)
        self._send(call.read() if call.name in self._read else call.ask())

    async def run(self) -> int:
        """Keeps the process running until it is told to stop, or never comes up; returns its exit code, 0 if told.

        One that dies is started again, and asked everything again, with what is there of each answer.
        """
        pause_s = 0.0
        while True:
            before = self.comings
            code = await self._live()
            self._bury()
            if self._stopping.is_set() or self.comings == 0:
                break
            self._metrics.rank0_ended(code)
            pause_s = 0.0 if self.comings > before else min(max(FIRST_PAUSE_S, 2 * pause_s), LONGEST_PAUSE_S)
            left = counted(self.calls, "answer")
            then = "the process that stands by takes its place" if self._is_replaced else "it is started again"
            logger.warning("rank 0 %s; %s, with %s to go on", _how(code), then, left)
            self.events.add("ended", f"rank 0 {_how(code)}; {then}, with {left} to go on")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)
                break
        self._ending()
        waiting = [self._turns.next() for _ in range(len(self._turns))]
        for call in (*self._read.values(), *self._asked.values(), *waiting):
            call.hear(Failed(call.name, "the server has ended"))
        return 0 if self._stopping.is_set() else code

    def _bury(self) -> None:
        """What it was asked is asked again, but for what it dies of."""
        self._sent.clear()
        for call in self._suspects.rank0_died():
            logger.error(
                "rank 0 has died whenever it was asked for %s of %s; it is not asked again", call.name, call.client
            )
            self._part_with(call)
            call.fail(Deadly("the process that computes has died each time that it was asked for this answer"))

    async def stop(self) -> None:
        """Ends the processes in peace."""
        self._stopping.set()
        self.told = self.ready
        self._send(Stop())
        if self._preparing is not None:
            await self._preparing
        if self._standby is not None:
            await self._standby.killed()  # it has done nothing yet
        if self._life is not None and self._life.code is None:
            if not self.ready:  # it listens only then
                self._life.terminate()
            await self._life.ended()

    @property
    def _is_replaced(self) -> bool:
        """Whether a process stands by for the next life."""
        return self._standby is not None and self._standby.code is None

    async def _live(self) -> int:
        """One life of the process; its exit code."""
        try:
            self._life = life = await self._next_life()
        except OSError as error:
            logger.warning("rank 0 cannot be started: %s", error)
            return 1
        self._began = time.monotonic()
        if self._stopping.is_set():
            life.terminate()
        try:
            async for messages in life.heard():
                self._hear(messages)
        finally:
            self.ready = False
            life.hang_up()
        return await life.ended()

    async def _next_life(self) -> Life:
        """That of the process which stands by, if there is one.

        Raises:
            OSError: there is no room for another process.
        """
        standby = self._standby if self._is_replaced else None
        self._standby = None
        if standby is not None:
            standby.wake()
            self.events.add("started", f"rank 0 is the process that stood by, pid {standby.pid}")
            return standby
        life = await Life.start(self._words, Role.NEXT if self.comings else Role.FIRST)
        self.events.add("started", f"rank 0 is started, as pid {life.pid}")
        return life

    async def _prepare(self) -> None:
        """Has another process stand by, once this one has done what had to wait for it."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), STANDBY_PAUSE_S)
        if self._standby is not None or not self.ready or self._stopping.is_set():
            return
        try:
            life = await Life.start(self._words, Role.STANDBY)
        except OSError as error:
            logger.warning("no process can stand by for rank 0: %s", error)
            return
        if self._stopping.is_set():
            await life.killed()
            return
        self._standby = life
        self.events.add("started", f"pid {life.pid} stands by for rank 0")

    def _hear(self, messages: Sequence[Message]) -> None:
        grown = [
            (call, each)
            for each in messages
            if isinstance(each, Grown) and (call := self._asked.get(each.call)) is not None
        ]
        if grown:
            self._journal(grown)
        for message in messages:
            match message:
                case Told():
                    self.stats = message.stats
                    self._metrics.rank0_told(message.stats)
                    self.events.hear(self.stats["happenings"])
                case Ready():
                    self._begin(message.most_calls)
                case Taken() | Refused() if (call := self._read.get(message.call)) is not None:
                    call.hear(message)
                    self._part_with(call)
                case Grown() | Failed() | Refused() if (call := self._asked.get(message.call)) is not None:
                    call.hear(message)
                    if isinstance(message, Failed):
                        self.events.add("failed", f"{call.name}: {message.reason}")
                    if call.over:
                        self._part_with(call)
        self._let_in()

    def _begin(self, most_calls: int) -> None:
        self._most, self.ready = most_calls, True
        self.comings += 1
        self._metrics.rank0_came()
        self.events.forget_rank0()
        if self._stands_by and (self._preparing is None or self._preparing.done()):
            self._preparing = asyncio.create_task(self._prepare())
        self.events.add("ready", f"the model is ready after {time.monotonic() - self._began:.1f} s")

    def _send(self, message: Message) -> None:
        if self._life is not None and (self.ready or isinstance(message, Stop)):
            self._life.send(message)


def _how(code: int) -> str:
    """How a process has ended."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has ended with code {code}"
