"""From sampled tokens to the text that a caller gets: characters, stop strings, the end.

One for each request, used by the engine's thread; the pieces go to whoever asked.
"""

from __future__ import annotations

from collections.abc import Callable

from distllm.core import FinishReason, Logprob, Piece, Request
from distllm.model.grammar import Grammar
from distllm.model.stop import StopStrings
from distllm.model.tokenizer import Detokenizer, Tokenizer

Sink = Callable[[Piece | Exception], None]


class Delivery:
    """The answer to one request as it grows.

    Args:
        grammar: what it must follow, at its beginning.

    Raises:
        ValueError: what is there of the answer does not follow it.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, sink: Sink, grammar: Grammar | None = None) -> None:
        self.request = request
        self._detokenizer = Detokenizer(tokenizer, request.tokens)
        self._stops = StopStrings(request.params.stop)
        self._sink = sink
        self._grammar = grammar
        if grammar is not None:
            for token in request.generated:
                grammar.take(token)

    def allowed(self) -> bytes:
        """What may come next, as a row has it; empty if anything may."""
        return self._grammar.allowed() if self._grammar else b""

    def replay(self) -> None:
        """Hands on the text of the tokens that the request brings along, in one piece."""
        if generated := self.request.generated:
            texts = [self._stops.push(self._detokenizer.push(token))[0] for token in generated]
            self._sink(Piece("".join(texts), generated))

    def push(self, token: int, reason: FinishReason | None, logprob: Logprob | None = None, *, reused: int = 0) -> bool:
        """Takes the next token and hands on the text that is certain.

        Returns:
            Whether the answer ends here by a stop string or because its grammar has no more.
        """
        ends_by_token = reason == "stop"
        try:
            ended = self._grammar is not None and self._grammar.take(token)
        except ValueError as error:
            self.fail(error)
            return True
        text, stopped = self._stops.push("" if ends_by_token else self._detokenizer.push(token))
        if (reason is not None or ended) and not stopped:
            text, stopped = self._finish(text)
        stopped = stopped or (ended and reason is None)
        if stopped:
            reason = "stop"
        self._sink(Piece(text, (token,), reason, () if logprob is None else (logprob,), reused))
        return stopped

    def _finish(self, text: str) -> tuple[str, bool]:
        rest, stopped = self._stops.push(self._detokenizer.flush())
        return text + rest + ("" if stopped else self._stops.flush()), stopped

    def fail(self, error: Exception) -> None:
        """Tells the caller that there will be no more."""
        self._sink(error)
