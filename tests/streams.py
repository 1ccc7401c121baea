"""Clients of an OpenAI-compatible server that stream, and whether what each got is its own answer, whole and in order.

HTTP is spoken by hand, because hundreds of clients share the cores with the server that they load. Knows no server.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEXT = Path(__file__).parent / "alice.txt"
STALL_S = 300.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
LONGEST_PIECE = 160  # words
# By their first tokens the answers to any two requests must differ, and of these the model must be sure, so that
# numbers that differ in their last bits do not make it go another way.
TELLING = 8
SURE = math.log(0.8)
SURE_AT_ONCE = 16


class Malformed(Exception):
    """The server has sent what is no answer of OpenAI's API, or not the one that was asked for."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """One request: where to, what, and whether it wants to know what it took."""

    path: str
    body: Mapping[str, Any]

    @property
    def usage(self) -> bool:
        return "stream_options" in self.body

    @property
    def most_tokens(self) -> int:
        return int(self.body["max_tokens"])

    def beginning(self) -> Asked:
        """The same for its first tokens alone, with how sure the model is of each."""
        logprobs: dict[str, Any] = {"logprobs": True} if "messages" in self.body else {"logprobs": 1}
        return Asked(self.path, {**self.body, "max_tokens": TELLING} | logprobs)


def mix(seed: int, count: int, model: str, longest: int) -> list[Asked]:
    """Different requests, texts and conversations, greedy and drawn: prompts of about 20 to 500 tokens.

    Each prompt is a piece of a story, more than once, and its beginning: even a little model goes on with what follows
    there, so that its answer is nobody else's, and begins the same in whatever company it is computed.

    Args:
        longest: most tokens of an answer; the shortest have 8.
    """
    chance = random.Random(seed)
    words = TEXT.read_text().split()
    found = []
    for number in range(count):
        start = number * (len(words) - LONGEST_PIECE) // count
        piece = words[start : start + round(_between(chance, 8, LONGEST_PIECE))]
        story = " ".join(piece)
        body: dict[str, Any] = {"model": model, "stream": True, "max_tokens": round(_between(chance, 8, longest))}
        body |= {"temperature": 0.5, "seed": chance.randrange(2**31)} if number % 2 else {"temperature": 0.0}
        body |= {} if number % 8 == 0 else {"stream_options": {"include_usage": True}}
        if number % 4 < 2:
            prompt = f"{story}\n\n{story}\n\n{' '.join(piece[:3])}"
            found.append(Asked("/v1/completions", body | {"prompt": prompt}))
        else:
            turns = [{"role": "user", "content": f"Say this: {story}"}, {"role": "assistant", "content": story}]
            found.append(Asked("/v1/chat/completions", body | {"messages": [*turns, turns[0]]}))
    return found


def _between(chance: random.Random, low: float, high: float) -> float:
    """Short ones are as many as long ones."""
    return float(low * (high / low) ** chance.random())


@dataclass(slots=True, eq=False)
class Stream:
    """One answer as it comes, over as many connections as it takes.

    Attributes:
        pieces: its texts with the times at which they came, by the monotonic clock.
        last: the id of the latest event, if the server gives them.
        resumed: how often its connection broke, or nobody listened.
        refused: how often the server had no room for it.
        unsure: the log-probability of the least likely token, if that was asked for.
    """

    asked: Asked
    began: float = field(default_factory=time.monotonic)
    pieces: list[tuple[float, str]] = field(default_factory=list)
    last: str | None = None
    name: str | None = None
    reason: str | None = None
    usage: Mapping[str, int] | None = None
    resumed: int = 0
    refused: int = 0
    unsure: float = 0.0
    whole: bool = False

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.pieces)

    @property
    def tokens(self) -> int:
        """Of the answer; a piece is a token where nobody says otherwise."""
        return self.usage["completion_tokens"] if self.usage else len(self.pieces)

    def beginning(self, tokens: int) -> str:
        return "".join(text for _, text in self.pieces[:tokens])

    def take(self, name: str | None, data: str) -> None:
        """One event.

        Raises:
            Malformed: it is not what comes next.
        """
        if self.whole:
            raise Malformed(f"there is more after [DONE]: {data}")
        if data == "[DONE]":
            if self.reason is None or (self.asked.usage and self.usage is None):
                raise Malformed(f"[DONE] without {'usage' if self.reason else 'finish_reason'}")
            self.whole = True
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise Malformed(f"an error: {chunk['error']}")
        self.name = self.name or chunk["id"]
        if chunk["id"] != self.name:
            raise Malformed(f"a piece of {chunk['id']} in {self.name}")
        if chunk["choices"]:
            self._take_choice(name, *chunk["choices"])
        else:
            self._take_usage(chunk["usage"])

    def _take_choice(self, name: str | None, choice: Mapping[str, Any]) -> None:
        if self.reason is not None or choice["index"] != 0:
            raise Malformed(f"there is more after the end: {choice}")
        delta = choice.get("delta")
        if delta is not None and "role" in delta and not delta.get("content") and choice["finish_reason"] is None:
            return  # the beginning of a conversation's answer
        text = choice["text"] if delta is None else delta.get("content") or ""
        self.reason = choice["finish_reason"]
        self.pieces.append((time.monotonic(), text))
        if (told := choice.get("logprobs")) is not None:
            logprobs = [each["logprob"] for each in told["content"]] if delta is not None else told["token_logprobs"]
            self.unsure = min([self.unsure, *logprobs])
        if name is not None:
            if name != f"{self.name}:{len(self.pieces)}":
                raise Malformed(f"event {name} is piece {len(self.pieces)} of {self.name}")
            self.last = name

    def _take_usage(self, usage: Mapping[str, int]) -> None:
        if self.usage is not None or self.reason is None or not self.asked.usage:
            raise Malformed(f"nobody asked for usage, or not here: {usage}")
        self.usage = usage
        tokens = usage["completion_tokens"]
        if self.last is not None and tokens != len(self.pieces):
            raise Malformed(f"usage says {tokens} tokens, and {len(self.pieces)} came")
        if usage["total_tokens"] != usage["prompt_tokens"] + tokens or len(self.pieces) > tokens:
            raise Malformed(f"usage does not add up: {usage}")
        if tokens > self.asked.most_tokens or (self.reason == "length" and tokens < self.asked.most_tokens):
            raise Malformed(f"{tokens} tokens and {self.reason}, when {self.asked.most_tokens} were wanted")


async def streamed(stream: Stream, port: int, key: str) -> None:
    """Follows one answer to its end: comes back when the connection breaks, waits while there is no room or nobody.

    Args:
        key: under which it is asked for again if nothing of it came before the connection broke.

    Raises:
        Malformed: the server refuses it, or what comes is not in order.
        TimeoutError: nothing has come for so long that it hangs.
    """
    pause_s = FIRST_PAUSE_S
    async with asyncio.timeout(STALL_S) as patience:
        while not stream.whole:
            try:
                retry_s = await _connected(stream, port, key, patience)
            except (OSError, EOFError):
                stream.resumed += 1
                retry_s = pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if not stream.whole:
                await asyncio.sleep(retry_s)


async def _connected(stream: Stream, port: int, key: str, patience: asyncio.Timeout) -> float:
    """One connection, until the answer is whole or the server says to come back; in how many seconds.

    Raises:
        OSError, EOFError: it broke.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        body = json.dumps(stream.asked.body).encode()
        head = [f"POST {stream.asked.path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: close"]
        head += ["Content-Type: application/json", f"Content-Length: {len(body)}", f"Idempotency-Key: {key}"]
        head += [f"Last-Event-ID: {stream.last}"] if stream.last else []
        writer.write("\r\n".join([*head, "", ""]).encode() + body)
        status, headers = await _head(reader)
        if status in (429, 503):
            stream.refused += 1
            return float(headers.get("retry-after", 1))
        if status != 200:
            raise Malformed(f"status {status}: {(await reader.read()).decode(errors='replace')}")
        async for name, data in _events(_chunks(reader)):
            stream.take(name, data)
            patience.reschedule(asyncio.get_running_loop().time() + STALL_S)
        if not stream.whole:
            raise EOFError
        return 0.0
    finally:
        writer.transport.abort()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    return int(lines[0].split()[1]), {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)
    }


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The body of an answer, which ends by an empty chunk.

    Raises:
        EOFError: or not, because the connection broke.
    """
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[str | None, str]]:
    """Server-sent events: their ids and data."""
    rest = b""
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n\n")
        for event in whole:
            fields = dict(line.split(": ", 1) for line in event.decode().splitlines() if not line.startswith(":"))
            yield fields.get("id"), fields["data"]
    if rest.strip():
        raise Malformed(f"half an event: {rest!r}")


async def sure(port: int, requests: Sequence[Asked], count: int) -> list[Asked]:
    """So many of these whose answers begin with tokens that the model is sure of, and no two alike.

    Raises:
        Malformed: there are not so many.
    """
    tried = dict(zip((each.beginning() for each in requests), requests, strict=True))
    streams = await Clients(port, list(tried)).each_once(SURE_AT_ONCE)
    firm = {each.text: tried[each.asked] for each in streams if each.unsure > SURE}
    if len(firm) < count:
        raise Malformed(f"the model is sure of the answers to {len(firm)} requests, not to {count}")
    return list(firm.values())[:count]


class Clients:
    """So many of them, each with one request after the other, until the time is over; then those under way end.

    Attributes:
        ended: the answers that are whole.
        lost: what became of the others.
        under_way: the answers that are not whole yet.
    """

    def __init__(self, port: int, requests: Sequence[Asked], *, seed: int = 0) -> None:
        self._port = port
        self._requests = requests
        self._seed = seed
        self._name = uuid.uuid4().hex  # the server remembers the keys of other clients
        self._numbers = itertools.count()
        self.ended: list[Stream] = []
        self.lost: list[str] = []
        self.under_way: dict[int, Stream] = {}

    async def run(self, clients: int, seconds: float) -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(*(self._client(number, until) for number in range(clients)))

    async def each_once(self, at_once: int) -> list[Stream]:
        """Every request once, few at once: what their answers should be.

        Raises:
            Malformed: one was lost.
        """
        left = list(reversed(self._requests))

        async def some() -> None:
            while left:
                await self.ask(left.pop())

        await asyncio.gather(*(some() for _ in range(at_once)))
        if self.lost:
            raise Malformed(f"lost although nothing else was asked: {self.lost[0]}")
        return [next(each for each in self.ended if each.asked is asked) for asked in self._requests]

    async def _client(self, number: int, until: float) -> None:
        chance = random.Random(f"{self._seed}/{number}")
        while time.monotonic() < until:
            await self.ask(chance.choice(self._requests))

    async def ask(self, asked: Asked) -> None:
        number = next(self._numbers)
        stream = self.under_way[number] = Stream(asked)
        try:
            await streamed(stream, self._port, f"{self._name}-{number}")
            self.ended.append(stream)
        except (Malformed, TimeoutError, ValueError, KeyError) as error:
            self.lost.append(f"{type(error).__name__}: {error} ({stream.name}, {len(stream.pieces)} pieces)")
        finally:
            del self.under_way[number]


class Referee:
    """Knows what each request should be answered with, and tells apart who got whose answer.

    Answers computed in other company differ in their last bits: in fp32 that changes no token, in bf16 they may go
    other ways from where two tokens were about as likely. But the first tokens of any two requests differ, and nobody
    may get another's, nor what nobody should.

    Args:
        expected: an answer to each request, of a server that had little to do.
        exact: whether all of an answer must be as expected.

    Attributes:
        requests: those that are told apart.
        telling: by how many tokens.
        equal, alike: answers that were as expected, and those that only began so.
        agreed: of those that only began so, the share of their text that was as expected.
        wrong: what was neither.
    """

    def __init__(self, expected: Sequence[Stream], *, exact: bool = False) -> None:
        self._exact = exact
        self.telling = next((count for count in range(1, TELLING) if _differ(expected, count)), TELLING)
        by_beginning = {each.beginning(self.telling): each for each in reversed(expected)}
        self._expected = {each.asked: each for each in by_beginning.values()}
        self.requests = list(self._expected)
        self.equal = self.alike = 0
        self.agreed: list[float] = []
        self.wrong: list[str] = []

    def knows(self, stream: Stream) -> bool:
        """Whether an answer begins as expected."""
        return stream.text.startswith(self._expected[stream.asked].beginning(self.telling))

    def judge(self, stream: Stream) -> None:
        expected = self._expected[stream.asked]
        got, wanted = stream.text, expected.text
        if stream.usage and expected.usage and stream.usage["prompt_tokens"] != expected.usage["prompt_tokens"]:
            self.wrong.append(f"{stream.name}: of another prompt, by its usage")
        elif got == wanted:
            self.equal += 1
        elif self.knows(stream) and not self._exact:
            self.alike += 1
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(got, wanted, strict=False))
            self.agreed.append(len(list(same)) / max(len(got), len(wanted)))
        else:
            others = (each for each in self._expected.values() if each is not expected)
            theirs = any(got.startswith(each.beginning(self.telling)) for each in others)
            whose = "another's answer" if theirs else "not as expected"
            self.wrong.append(f"{stream.name}: {whose}: {got[:60]!r} in place of {wanted[:60]!r}")


def _differ(expected: Sequence[Stream], tokens: int) -> bool:
    return len({each.beginning(tokens) for each in expected}) == len(expected)
