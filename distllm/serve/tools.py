"""Calls of tools: how a model is told of the tools, what it may write, and what it has written.

In the form of Hermes, which many open models are trained on: JSON between <tool_call> and </tool_call>.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distllm.grammars import tagged_grammar

BEGIN, END = "<tool_call>", "</tool_call>"

Tool = Mapping[str, Any]
"""Its name, and its description and parameters (a JSON schema), if it has them."""


def instructions(tools: Sequence[Tool]) -> str:
    """What a model is told of its tools, for a system message."""
    listed = "\n".join(json.dumps({"type": "function", "function": dict(tool)}) for tool in tools)
    return (
        "You may call one or more functions to help with the user's request. These are they, each as a line of "
        f"JSON:\n<tools>\n{listed}\n</tools>\nTo call one, write a JSON object with its name and its arguments between "
        f'tags:\n{BEGIN}\n{{"name": "the name", "arguments": {{...}}}}\n{END}'
    )


def grammar(tools: Sequence[Tool], *, must: bool, several: bool) -> str:
    """What the model may write: calls of these tools with arguments that fit, and text if it need not call any.

    Args:
        must: it calls at least one.
        several: it may call more than one.
    """
    calls = [
        (f'{BEGIN}\n{{"name": {json.dumps(tool["name"])}, "arguments": ', _schema(tool), f"}}\n{END}") for tool in tools
    ]
    return tagged_grammar(BEGIN, calls, must=must, several=several)


def _schema(tool: Tool) -> Mapping[str, object]:
    return tool.get("parameters") or {"type": "object"}


def told(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, str]]:
    """A conversation as plain messages, the tools in the system message, their calls and answers as text."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    if plain[0]["role"] == "system":
        return [{"role": "system", "content": f"{plain[0]['content']}\n\n{instructions(tools)}"}, *plain[1:]]
    return [{"role": "system", "content": instructions(tools)}, *plain]


def _plain(message: Mapping[str, Any]) -> dict[str, str]:
    text = message["content"]
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
    calls = [
        f'{BEGIN}\n{{"name": {json.dumps(call["name"])}, "arguments": {call["arguments"]}}}\n{END}'
        for call in message["tool_calls"]
    ]
    return {"role": message["role"], "content": "\n".join([*([text] if text else []), *calls])}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that a model has written; `arguments` is JSON, as written."""

    index: int
    id: str
    name: str
    arguments: str


class Reading:
    """Tells text from calls in an answer as it grows. What may be the beginning of a tag is held back.

    Args:
        name: of the answer, which the ids of its calls are made of, so that they are the same when it is read again.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._rest = ""
        self._behind_call = False
        self.calls = 0

    def push(self, text: str, *, last: bool) -> tuple[str, list[ToolCall]]:
        """More of the answer: the text in it that is certain, and the calls that are whole."""
        self._rest += text
        said, calls = "", []
        while (begin := self._rest.find(BEGIN)) >= 0:
            call, behind = self._called(begin + len(BEGIN))
            if call is None and not last:
                break
            said += self._text(self._rest[: begin if call else behind])  # what is no call is text
            self._rest = self._rest[behind:]
            if call is not None:
                calls.append(call)
                self._behind_call = True
        certain = len(self._rest) if last else self._certain()
        said += self._text(self._rest[:certain])
        self._rest = self._rest[certain:]
        return said, calls

    def _called(self, begin: int) -> tuple[ToolCall | None, int]:
        """The call that begins here, and where it ends; its arguments may have what looks like its end."""
        stop = self._rest.find(END, begin)
        while stop >= 0:
            if (call := self._call(self._rest[begin:stop])) is not None:
                return call, stop + len(END)
            stop = self._rest.find(END, stop + 1)
        return None, len(self._rest)

    def _text(self, text: str) -> str:
        """Text as it is told: newlines behind a call part it from the next one."""
        if self._behind_call:
            text = text.lstrip("\n")
            self._behind_call = not text
        return text

    def _certain(self) -> int:
        """How much of the rest cannot belong to a tag."""
        if (begin := self._rest.find(BEGIN)) >= 0:
            return begin
        return next((at for at in range(len(self._rest)) if BEGIN.startswith(self._rest[at:])), len(self._rest))

    def _call(self, written: str) -> ToolCall | None:
        """A call, if the text is one."""
        try:
            found = json.loads(written)
            name, arguments = found["name"], found["arguments"]
        except (ValueError, TypeError, KeyError):
            return None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        made_of = uuid.uuid5(uuid.NAMESPACE_URL, f"{self._name}/{self.calls}")
        call = ToolCall(self.calls, f"call_{made_of.hex}", name, json.dumps(arguments, ensure_ascii=False))
        self.calls += 1
        return call
