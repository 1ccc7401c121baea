"""Rank 0 behind the HTTP front: takes questions from a socket, asks the engine, and tells what comes of them."""

from __future__ import annotations

import logging
import queue
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from distllm.core import EngineError, Logprob, Piece, SamplingParams
from distllm.serve.messages import (
    Ask,
    Drop,
    Failed,
    FrontLost,
    Grown,
    Likely,
    Message,
    Read,
    Ready,
    Refused,
    Stop,
    Taken,
    Told,
    decode,
    encode,
)

if TYPE_CHECKING:
    from distllm.engine.delivery import Sink
    from distllm.llm import LLM

logger = logging.getLogger(__name__)

STATS_INTERVAL_S = 1.0
LEAST = -9999.0  # OpenAI's log-probability of what is next to impossible


class Pipe:
    """The socket to the front. Nobody waits to be heard: a thread of its own sends what has gathered."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="distllm-front", daemon=True)
        self._writer.start()

    def send(self, message: Message) -> None:
        self._lines.put(encode(message))

    def _write(self) -> None:
        going = True
        while going:
            lines = [self._lines.get()]
            while not self._lines.empty():
                lines.append(self._lines.get())
            going = None not in lines
            try:
                self._connection.sendall(b"".join(line for line in lines if line is not None))
            except OSError:
                return  # whoever reads notices too

    def heard(self) -> Iterator[Message]:
        """What the front says, until it is gone."""
        with self._connection.makefile("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):  # else whoever wrote it, or this side, hung up in the middle
                    yield decode(line)

    def hang_up(self) -> None:
        """Hears no more."""
        self._connection.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """When all that was said is sent."""
        self._lines.put(None)
        self._writer.join()
        self._connection.close()


class Backend:
    """Answers one front with one model."""

    def __init__(self, llm: LLM, pipe: Pipe) -> None:
        self._llm = llm
        self._pipe = pipe
        self._lock = threading.Lock()
        self._numbers: dict[str, int] = {}
        self._news = threading.Event()  # something has become of the ranks, or it is over
        self._over = False
        # Long prompts and large grammars take their time, in which answers must be asked for and dropped.
        self._reading = ThreadPoolExecutor(1, "distllm-reading")

    def serve(self) -> None:
        """Until the front says that it is enough.

        Raises:
            FrontLost: it is gone.
            EngineError: the engine has ended.
        """
        self._llm.on_end(self._pipe.hang_up)
        self._pipe.send(Ready(self._llm.most_requests))
        self._llm.on_change(self._news.set)
        telling = threading.Thread(target=self._tell, name="distllm-stats", daemon=True)
        telling.start()
        try:
            self._listen()
        finally:
            self._over = True
            self._news.set()
            telling.join()
            self._reading.shutdown(cancel_futures=True)

    def _listen(self) -> None:
        for message in self._pipe.heard():
            match message:
                case Read():
                    self._reading.submit(self._read, message)
                case Ask():
                    self._ask(message)
                case Drop():
                    if (number := self._forget(message.call)) is not None:
                        self._llm.cancel(number)
                case Stop():
                    return
        raise self._llm.failure or FrontLost("the HTTP front has ended")

    def _tell(self) -> None:
        """The thread that tells how the ranks do: once a second, and when something becomes of them."""
        while self._llm.failure is None and not self._over:
            self._pipe.send(Told(self._llm.stats()))
            self._news.wait(STATS_INTERVAL_S)
            self._news.clear()

    def _read(self, read: Read) -> None:
        try:
            params = SamplingParams(**read.params)  # type: ignore[arg-type]
            if isinstance(read.prompt, str) or all(isinstance(each, int) for each in read.prompt):
                request = self._llm.request(read.prompt, params)  # type: ignore[arg-type]
            else:
                request = self._llm.chat_request(read.prompt, params)  # type: ignore[arg-type]
        except ValueError as error:
            self._pipe.send(Refused(read.call, str(error)))
            return
        except Exception as error:  # a request that cannot be read must not take the others with it
            logger.exception("%s cannot be read", read.call)
            self._pipe.send(Refused(read.call, f"it cannot be read: {type(error).__name__}"))
            return
        assert request.params.seed is not None, "one is drawn"
        self._pipe.send(Taken(read.call, request.tokens, request.params.seed))

    def _ask(self, ask: Ask) -> None:
        try:
            request = self._llm.request(ask.tokens, SamplingParams(**ask.params))  # type: ignore[arg-type]
            request = replace(request, generated=tuple(ask.generated))
            with self._lock:  # the answer may be whole before its number is known
                self._numbers[ask.call] = self._llm.submit(request, self._sink(ask))
        except (ValueError, EngineError) as error:  # it is larger than what ranks that are left have room for
            if self._llm.failure is not None:
                raise
            self._pipe.send(Failed(ask.call, str(error)))

    def _sink(self, ask: Ask) -> Sink:
        known = bool(ask.generated)

        def hear(piece: Piece | Exception) -> None:
            nonlocal known
            if known:  # the first piece is what the answer has already
                known = False
                return
            if isinstance(piece, Exception) or piece.finish_reason is not None:
                self._forget(ask.call)
            if isinstance(piece, Piece):
                likely = [self._likely(each) for each in piece.logprobs]
                self._pipe.send(Grown(ask.call, piece.text, piece.token_ids, piece.finish_reason, likely, piece.reused))
            elif isinstance(piece, ValueError):
                self._pipe.send(Refused(ask.call, str(piece)))
            elif self._llm.failure is None:  # else the front will ask the next engine
                self._pipe.send(Failed(ask.call, str(piece)))

        return hear

    def _forget(self, call: str) -> int | None:
        """The engine's number of an answer that nobody waits for any more."""
        with self._lock:
            return self._numbers.pop(call, None)

    def _likely(self, told: Logprob) -> tuple[Likely, list[Likely]]:
        def named(token: int, logprob: float) -> Likely:
            return list(self._llm.token_bytes(token)), logprob if logprob > LEAST else LEAST  # also for no number

        return named(told.token, told.logprob), [named(*each) for each in told.top]
