"""What an answer may go on with, token by token, when it must follow a grammar. Knows no logits."""

from __future__ import annotations

import threading
from collections import deque

from llguidance import LLMatcher, LLParserLimits

from distllm.core import GRAMMAR_LIMITS
from distllm.model.tokenizer import Tokenizer

KEPT = 32


class Grammars:
    """The grammars of answers with one tokenizer. What following one may take is limited.

    One is read when its request is accepted, and kept until its answer begins, so that nobody waits for it then. No two
    answers share one: llguidance's copies share what they have found out, and with it their limits.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._unused: deque[tuple[str, LLMatcher]] = deque(maxlen=KEPT)
        self._lock = threading.Lock()

    def check(self, grammar: str) -> None:
        """
        Raises:
            ValueError: it is not a grammar, or one that is not supported or takes too much; the sentence says why.
        """
        with self._lock:
            known = any(each == grammar for each, _ in self._unused)
        if not known:
            matcher = self._read(grammar)
            with self._lock:
                self._unused.append((grammar, matcher))

    def begin(self, grammar: str) -> Grammar:
        """For an answer that is to follow it.

        Raises:
            ValueError: as `check`.
        """
        with self._lock:
            found = next((each for each in self._unused if each[0] == grammar), None)
            if found is not None:
                self._unused.remove(found)
        return Grammar(self._read(grammar) if found is None else found[1], self._tokenizer.known)

    def _read(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer.trie, grammar, limits=LLParserLimits(**GRAMMAR_LIMITS), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # of some it shows only in the first step that nothing follows them
        if matcher.is_error():
            raise ValueError(f"the grammar cannot be followed: {_first_line(matcher)}")
        return matcher


class Grammar:
    """How far one answer has come in its grammar.

    Args:
        matcher: at the beginning.
        known: ids of tokens that have a meaning are below it.
    """

    def __init__(self, matcher: LLMatcher, known: int) -> None:
        self._matcher = matcher
        self._mask_bytes = -(-known // 8)

    def allowed(self) -> bytes:
        """A bit for each token, the lowest first: whether it may come next.

        Only the end of the text if the grammar cannot be followed further, which `take` tells.
        """
        return bytes(self._matcher.compute_bitmask()[: self._mask_bytes])

    def take(self, token: int) -> bool:
        """The answer goes on with a token; True if nothing can follow.

        Raises:
            ValueError: the grammar could not be followed so far.
        """
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot be followed further: {_first_line(self._matcher)}")
        return bool(self._matcher.is_stopped())


def _first_line(matcher: LLMatcher) -> str:
    return str(matcher.get_error()).strip().partition("\n")[0]
