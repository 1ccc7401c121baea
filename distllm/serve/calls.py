"""One answer as the front sees it: what is asked of rank 0, and what has come so far. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, replace

from distllm.core import SamplingParams
from distllm.serve.messages import Ask, Failed, Grown, Prompt, Read, Refused, Taken


class Refusal(ValueError):
    """What is asked cannot be answered; the sentence says why."""


class Unavailable(RuntimeError):
    """The ranks cannot answer now."""


class TooLate(Unavailable):
    """It takes longer than it may."""


class Deadly(Unavailable):
    """Rank 0 dies of it."""


class Call:
    """One answer. Whoever wants it follows its pieces, from any one on, at any time.

    Attributes:
        name: its exchange and its place in that.
        client: who asks.
        params: with a seed, once it is taken.
        tokens: ids of the prompt, once it is taken.
        pieces: what has come, of `known` tokens.
    """

    def __init__(self, name: str, client: str, prompt: Prompt, params: SamplingParams) -> None:
        self.name = name
        self.client = client
        self.prompt = prompt
        self.params = params
        self.tokens: Sequence[int] | None = None
        self.pieces: list[Grown] = []
        self.known = 0
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()

    @classmethod
    def again(
        cls, name: str, client: str, tokens: Sequence[int], params: SamplingParams, pieces: Sequence[Grown]
    ) -> Call:
        """One that was taken before, with what has come of it."""
        call = cls(name, client, tokens, params)
        call.tokens = tokens
        call.pieces = list(pieces)
        call.known = len(call.generated)
        return call

    @property
    def finish_reason(self) -> str | None:
        """Why the answer has ended; None if it has not."""
        return self.pieces[-1].finish_reason if self.pieces else None

    @property
    def over(self) -> bool:
        """No more will come."""
        return self._error is not None or self.finish_reason is not None

    @property
    def generated(self) -> list[int]:
        """Ids of the answer so far."""
        return [token for piece in self.pieces for token in piece.tokens]

    def read(self) -> Read:
        """To ask whether it can be answered."""
        return Read(self.name, self.prompt, asdict(self.params))

    def ask(self) -> Ask:
        """To ask for what is missing of it."""
        assert self.tokens is not None, "it was taken"
        return Ask(self.name, self.tokens, asdict(self.params), self.generated)

    def fail(self, error: Exception) -> None:
        """There will be no more of it, because of this."""
        self._error = error
        self._tell()

    def hear(self, message: Taken | Refused | Grown | Failed) -> None:
        """Takes what rank 0 says of it."""
        match message:
            case Taken():
                self.tokens, self.params = message.tokens, replace(self.params, seed=message.seed)
            case Refused():
                self._error = Refusal(message.reason)
            case Failed():
                self._error = Unavailable(message.reason)
            case Grown():
                self.pieces.append(message)
                self.known += len(message.tokens)
        self._tell()

    def _tell(self) -> None:
        """Wakes whoever waits for news of it."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        if self.over:
            self._ended.set()

    async def taken(self) -> None:
        """Waits until rank 0 has said that it can be answered.

        Raises:
            Refusal, Unavailable: it cannot.
        """
        while self.tokens is None:
            await self._change()

    async def whole(self) -> None:
        """Waits until all of it is there.

        Raises:
            Refusal, Unavailable: it has ended early.
        """
        if not self.over:
            await self._ended.wait()
        if self._error is not None:
            raise self._error

    async def follow(self, heard: int = 0) -> AsyncIterator[Grown]:
        """Its pieces, those that are there and those that come, but for the first `heard`.

        Raises:
            Refusal, Unavailable: it has ended early.
        """
        while True:
            while heard < len(self.pieces):
                heard += 1
                yield self.pieces[heard - 1]
            if self.finish_reason is not None:
                return
            await self._change()

    async def _change(self) -> None:
        changed = self._changed
        if self._error is not None:
            raise self._error
        await changed.wait()


def usage(calls: Sequence[Call], choices: int) -> tuple[int, int]:
    """Tokens of the prompts, each counted once however many choices it has, and of the answers."""
    return sum(len(call.tokens or ()) for call in calls[::choices]), sum(call.known for call in calls)
