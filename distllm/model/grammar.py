"""What an answer may go on with, token by token, when it must follow a grammar. Knows no logits."""

from __future__ import annotations

from llguidance import LLMatcher

from distllm.model.tokenizer import Tokenizer


def check(grammar: str, tokenizer: Tokenizer) -> None:
    """
    Raises:
        ValueError: it is not a grammar, or one that is not supported; the sentence says why.
    """
    if why := LLMatcher.validate_grammar(grammar, tokenizer.trie):
        raise ValueError(f"the grammar cannot be followed: {why.strip().splitlines()[0]}")


class Grammar:
    """How far one answer has come in its grammar.

    Args:
        grammar: one that `check` has passed.
    """

    def __init__(self, grammar: str, tokenizer: Tokenizer) -> None:
        self._matcher = LLMatcher(tokenizer.trie, grammar)
        self._mask_bytes = -(-tokenizer.known // 8)

    def allowed(self) -> bytes:
        """A bit for each token, the lowest first: whether it may come next."""
        return bytes(self._matcher.compute_bitmask()[: self._mask_bytes])

    def take(self, token: int) -> bool:
        """The answer goes on with a token; True if nothing can follow.

        Raises:
            ValueError: the grammar could not be followed so far.
        """
        if not self._matcher.consume_token(token) and self._matcher.is_error():
            raise ValueError(f"the grammar cannot be followed further: {self._matcher.get_error()}")
        return bool(self._matcher.is_stopped())
