"""The task of a conversation: what is typed is answered, with what was said before in mind."""

from __future__ import annotations

import queue
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distllm.plan.partition import counted

if TYPE_CHECKING:
    from distllm.core import Piece, Request, SamplingParams
    from distllm.engine.reader import Reader
    from distllm.llm import LLM
    from distllm.terminal import Terminal

Messages = list[dict[str, str]]

# How soon Ctrl-C is noticed.
LISTEN_S = 0.05

HELP = """\
/new           forget what was said
/system TEXT   what the model is told before everything else; without a text nothing
/undo          forget the last message and its answer
/retry         answer the last message again
/help          this
/quit          leave, as Ctrl-D does
Ctrl-C stops an answer; what is there of it is kept.
"""


@dataclass(slots=True)
class Conversation:
    """What was said: messages and their answers, in turn."""

    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)

    def messages(self, said: str, *, without: int = 0) -> Messages:
        """All of it with a new message at the end.

        Args:
            without: so many of the oldest turns.
        """
        told = [{"role": "system", "content": self.system}] if self.system else []
        for message, answer in self.turns[without:]:
            told += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
        return [*told, {"role": "user", "content": said}]

    def surplus(self, said: str, tokens: Callable[[Messages], int], room: int) -> int:
        """How many of the oldest turns must be left out for the rest to have at most `room` tokens; perhaps all."""
        for without in range(len(self.turns)):
            if tokens(self.messages(said, without=without)) <= room:
                return without
        return len(self.turns)


class Chat:
    """One conversation with one model.

    Raises:
        ValueError: the model has no chat template.
    """

    def __init__(self, llm: LLM, reader: Reader, terminal: Terminal, params: SamplingParams, *, system: str) -> None:
        self._llm = llm
        self._reader = reader
        self._terminal = terminal
        self._params = params
        self._conversation = Conversation(system)

    def run(self) -> int:
        """Until there is no more to answer; returns 1 if a message could not be."""
        failed = 0
        for line in self._terminal.lines():
            if line.strip() in ("/quit", "/exit"):
                break
            try:
                self._take(line)
            except ValueError as error:
                failed = 1
                self._say(str(error))
        return failed

    def _take(self, line: str) -> None:
        """
        Raises:
            ValueError: it is no command, or cannot be answered; the sentence says why.
        """
        talk = self._conversation
        if not line.startswith("/"):
            if line.strip():
                self._answer(line)
            return
        command, _, rest = line.strip().partition(" ")
        match command:
            case "/new" | "/reset":
                talk.turns.clear()
                self._say("forgotten")
            case "/system":
                talk.system = rest.strip()
                self._say("it will be told so" if talk.system else "it will be told nothing")
            case "/undo":
                self._say(f"forgotten: {self._last()}")
            case "/retry":
                self._answer(self._last())
            case "/help":
                self._terminal.write(HELP)
            case _:
                raise ValueError(f"{command} is no command; /help lists them")

    def _last(self) -> str:
        """The last message, which is forgotten with its answer."""
        if not self._conversation.turns:
            raise ValueError("nothing has been said yet")
        return self._conversation.turns.pop()[0]

    def _answer(self, said: str) -> None:
        request = self._request(said)
        heard: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()
        pieces: list[Piece] = []
        reason = None
        with self._terminal.listening() as stopped:
            number = self._llm.submit(request, heard.put)
            try:
                while reason is None and not stopped():
                    with suppress(queue.Empty):
                        pieces.append(self._shown(heard.get(timeout=LISTEN_S)))
                        reason = pieces[-1].finish_reason
            finally:
                self._llm.cancel(number)  # one that is whole is no mistake
                self._terminal.show("\n")
        if answer := "".join(piece.text for piece in pieces):
            self._conversation.turns.append((said, answer))
        if reason is None:
            self._say("stopped")
        elif reason == "length":
            self._say(f"cut off after {counted(sum(len(piece.token_ids) for piece in pieces), 'token')}")

    def _shown(self, piece: Piece | Exception) -> Piece:
        """
        Raises:
            EngineError: the engine has ended.
        """
        if isinstance(piece, Exception):
            raise piece
        self._terminal.show(piece.text)
        return piece

    def _request(self, said: str) -> Request:
        """The conversation with a new message; its oldest turns are forgotten where it has outgrown the context.

        Raises:
            ValueError: the message alone is too long, or the model's chat template refuses it.
        """
        talk = self._conversation
        room = min(self._reader.blueprint.sizes.context_length, self._llm.plan.kv_tokens)
        surplus = talk.surplus(said, self._tokens, room - min(self._params.max_tokens, room // 2))
        messages = talk.messages(said, without=surplus)
        request = self._llm.chat_request(messages, self._params, "the message" if surplus else "the conversation")
        if surplus:
            del talk.turns[:surplus]
            what = f"its first {counted(surplus, 'turn')}"
            self._say(
                f"the conversation has outgrown the {room} tokens that there is room for, and begins without {what}"
            )
        return request

    def _tokens(self, messages: Messages) -> int:
        return len(self._reader.tokenizer.encode_chat(messages))

    def _say(self, sentence: str) -> None:
        self._terminal.write(f"({sentence})\n")
