"""A model that is looked through but not loaded: it tells what prompts can be answered, before anything expensive."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace

from distllm.config import ModelConfig
from distllm.core import Request, SamplingParams
from distllm.model import source
from distllm.model.blueprint import Blueprint
from distllm.model.checkpoint import Checkpoint
from distllm.model.grammar import Grammars
from distllm.model.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, str]]


class Reader:
    """Makes requests of prompts.

    Raises:
        ValueError: the model or its files cannot be used; the sentence says why.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        self.blueprint = open_blueprint(model)
        self.tokenizer = Tokenizer.load(self.blueprint.checkpoint.path)
        self.grammars = Grammars(self.tokenizer)

    def request(self, prompt: Prompt, params: SamplingParams | None = None, name: str = "the prompt") -> Request:
        """A request for the continuation of a text or of token ids, its seed drawn if it has none.

        The engine that takes it gives it its number.

        Args:
            name: what to call the prompt in errors.

        Raises:
            ValueError: the prompt is empty, too long, or has a token that the model does not know.
        """
        if prompt == "":
            return self._request((), params, name)
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else _whole(prompt, name)
        return self._request(tokens, params, name)

    def chat_request(
        self, messages: Messages, params: SamplingParams | None = None, name: str = "the conversation"
    ) -> Request:
        """As `request`, for chat messages.

        Raises:
            ValueError: as `request`, the messages are malformed, or the model has no chat template.
        """
        return self._request(self.tokenizer.encode_chat(messages), params, name)

    def _request(self, tokens: Sequence[int], params: SamplingParams | None, name: str) -> Request:
        if not tokens:
            raise ValueError(f"{name} is empty; give at least one token")
        vocabulary = int(self.blueprint.config.vocab_size)
        if strange := next((token for token in tokens if not 0 <= token < vocabulary), None):
            raise ValueError(f"{name} has the token id {strange}; the model knows 0 to {vocabulary - 1}")
        context = self.blueprint.sizes.context_length
        if len(tokens) >= context:
            raise ValueError(
                f"{name} has {len(tokens)} tokens; with one for the answer the model's context takes {context}"
            )
        params = params or SamplingParams()
        if params.grammar:
            self.grammars.check(params.grammar)
        if biased := next((token for token, _ in params.logit_bias if not 0 <= token < vocabulary), None):
            raise ValueError(f"logit_bias has the token id {biased}; the model knows 0 to {vocabulary - 1}")
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(63))
        return Request(id=0, tokens=tuple(tokens), params=params, eos_ids=self.tokenizer.eos_ids)


def _whole(tokens: Sequence[int], name: str) -> tuple[int, ...]:
    try:
        return tuple(operator.index(token) for token in tokens)
    except TypeError as error:
        raise ValueError(f"{name} must be a text or a list of token ids: {error}") from error


def open_blueprint(model: ModelConfig) -> Blueprint:
    """
    Raises:
        ValueError: the model cannot be used; the sentence says why.
    """
    checkpoint = Checkpoint(source.files(model), verify=model.verify)
    return Blueprint(checkpoint, dtype=model.dtype, context_length=model.context_length)
