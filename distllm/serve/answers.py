"""The two shapes of an answer in OpenAI's API: of a conversation, and of a text. Whole, and in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, ClassVar

from distllm.serve.calls import Call, usage
from distllm.serve.exchange import About
from distllm.serve.messages import Grown, Likely
from distllm.serve.tools import Reading, ToolCall

Logprobs = Sequence[tuple[Likely, Sequence[Likely]]]
Json = dict[str, Any]


class Answer:
    """What both have in common.

    Args:
        name: of the exchange.
    """

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, name: str, model: str, about: About) -> None:
        self.name = name
        self.about = about
        self._head = {"id": name, "created": about.created, "model": model}

    def whole(self, calls: Sequence[Call]) -> Json:
        """The whole answer."""
        choices = [
            self._choice(index, self._content(index, call), call.finish_reason, _joined(call))
            for index, call in enumerate(calls)
        ]
        return self._body(self.whole_object, choices) | {"usage": self._usage(calls)}

    def begin(self, index: int) -> Iterator[Json]:  # noqa: ARG002
        """What comes before the first piece of a choice."""
        yield from ()

    def chunk(self, index: int, piece: Grown) -> Json:
        """One piece of a choice."""
        choice = self._choice(index, self._delta(index, piece), piece.finish_reason, piece.logprobs)
        return self._body(self.chunk_object, [choice])

    def usage_chunk(self, calls: Sequence[Call]) -> Json:
        """The last chunk, for those that want to know what it took."""
        return self._body(self.chunk_object, []) | {"usage": self._usage(calls)}

    def _usage(self, calls: Sequence[Call]) -> Json:
        prompt, completion = usage(calls, self.about.choices)
        asked = calls[:: self.about.choices]
        cached = sum(min(call.pieces[0].reused, len(call.tokens or ())) for call in asked if call.pieces)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _body(self, kind: str, choices: list[Json]) -> Json:
        return {**self._head, "object": kind, "choices": choices}

    def _choice(self, index: int, content: Json, reason: str | None, told: Logprobs) -> Json:
        logprobs = self._logprobs(index, told) if told else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _content(self, index: int, call: Call) -> Json:
        raise NotImplementedError

    def _delta(self, index: int, piece: Grown) -> Json:
        raise NotImplementedError

    def _logprobs(self, index: int, told: Logprobs) -> Json:
        raise NotImplementedError


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, name: str, model: str, about: About) -> None:
        super().__init__(name, model, about)
        self._readings: dict[int, Reading] = {}

    def begin(self, index: int) -> Iterator[Json]:
        content = {"delta": {"role": "assistant", "content": ""}}
        yield self._body(self.chunk_object, [self._choice(index, content, None, ())])

    def _read(self, index: int, text: str, *, last: bool) -> tuple[str, list[ToolCall]]:
        if not self.about.tools:
            return text, []
        reading = self._readings.setdefault(index, Reading(f"{self.name}/{index}"))
        return reading.push(text, last=last)

    def _choice(self, index: int, content: Json, reason: str | None, told: Logprobs) -> Json:
        called = index in self._readings and self._readings[index].calls > 0
        return super()._choice(index, content, "tool_calls" if called and reason == "stop" else reason, told)

    def _content(self, index: int, call: Call) -> Json:
        text, called = self._read(index, "".join(piece.text for piece in call.pieces), last=True)
        message: Json = {"role": "assistant", "content": text if text or not called else None, "refusal": None}
        if called:
            message["tool_calls"] = [_tool_call(each) for each in called]
        return {"message": message}

    def _delta(self, index: int, piece: Grown) -> Json:
        text, called = self._read(index, piece.text, last=piece.finish_reason is not None)
        delta: Json = {"content": text} if text else {}
        if called:
            delta["tool_calls"] = [{"index": each.index, **_tool_call(each)} for each in called]
        return {"delta": delta}

    def _logprobs(self, index: int, told: Logprobs) -> Json:  # noqa: ARG002
        def named(likely: Likely) -> Json:
            return {"token": _text(likely), "logprob": likely[1], "bytes": list(likely[0])}

        content = [named(token) | {"top_logprobs": [named(each) for each in top]} for token, top in told]
        return {"content": content, "refusal": None}


class TextAnswer(Answer):
    """Of /v1/completions."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, name: str, model: str, about: About) -> None:
        super().__init__(name, model, about)
        self._offsets: dict[int, int] = {}

    def _content(self, index: int, call: Call) -> Json:  # noqa: ARG002
        return {"text": "".join(piece.text for piece in call.pieces)}

    def _delta(self, index: int, piece: Grown) -> Json:  # noqa: ARG002
        return {"text": piece.text}

    def _logprobs(self, index: int, told: Logprobs) -> Json:
        texts = [_text(token) for token, _ in told]
        *offsets, self._offsets[index] = accumulate(map(len, texts), initial=self._offsets.get(index, 0))
        return {
            "tokens": texts,
            "token_logprobs": [logprob for (_, logprob), _ in told],
            "top_logprobs": [{_text(each): each[1] for each in top} for _, top in told],
            "text_offset": offsets,
        }


SHAPES: dict[str, type[Answer]] = {"chat": ChatAnswer, "text": TextAnswer}


def _joined(call: Call) -> Logprobs:
    return [each for piece in call.pieces for each in piece.logprobs]


def _tool_call(call: ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _text(likely: Likely) -> str:
    return bytes(likely[0]).decode(errors="replace")
