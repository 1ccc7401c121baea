"""What the HTTP front and rank 0 say to each other: JSON, one list a line, over a socket that only they have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from distllm.core import FinishReason


class FrontLost(ConnectionError):
    """The HTTP front has ended without a word."""


class Role(StrEnum):
    """Why rank 0's process is started."""

    FIRST = "first"
    NEXT = "next"
    """Another one was ready before it: if it fails, there is one to come."""
    STANDBY = "standby"
    """As the next one, when it is woken: until then it gets as far as it can by itself."""


WAKE = b"\n"
"""What a process that stands by is woken with."""

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or chat messages."""


@dataclass(frozen=True, slots=True)
class Read:
    """To rank 0: can this be answered? `params` are those of SamplingParams."""

    call: str
    prompt: Prompt
    params: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Ask:
    """To rank 0: answer this, which can be answered. `generated` is what the answer has already."""

    call: str
    tokens: Sequence[int]
    params: Mapping[str, object]
    generated: Sequence[int]


@dataclass(frozen=True, slots=True)
class Drop:
    """To rank 0: nobody wants this answer any more."""

    call: str


@dataclass(frozen=True, slots=True)
class Stop:
    """To rank 0: end the job."""


@dataclass(frozen=True, slots=True)
class Ready:
    """From rank 0: the model is loaded. More than `most_calls` at once would only wait."""

    most_calls: int


@dataclass(frozen=True, slots=True)
class Taken:
    """From rank 0: it can be answered, with this seed if it had none."""

    call: str
    tokens: Sequence[int]
    seed: int


@dataclass(frozen=True, slots=True)
class Refused:
    """From rank 0: it cannot be answered, because of what was asked."""

    call: str
    reason: str


Likely = tuple[Sequence[int], float]
"""The bytes that a token stands for, and its log-probability."""


@dataclass(frozen=True, slots=True)
class Grown:
    """From rank 0: the answer goes on; the last piece says why it ends.

    `logprobs` has for each token how likely it was, and the likeliest in its place. `reused` are tokens of the prompt
    that were not computed for it.
    """

    call: str
    text: str
    tokens: Sequence[int]
    finish_reason: FinishReason | None = None
    logprobs: Sequence[tuple[Likely, Sequence[Likely]]] = ()
    reused: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """From rank 0: it cannot be answered any more, because of what became of the ranks."""

    call: str
    reason: str


@dataclass(frozen=True, slots=True)
class Told:
    """From rank 0, from time to time: how the ranks do; see `LLM.stats`."""

    stats: Mapping[str, Any]


Message = Read | Ask | Drop | Stop | Ready | Taken | Refused | Grown | Failed | Told
KINDS: dict[str, type[Message]] = {
    each.__name__: each for each in (Read, Ask, Drop, Stop, Ready, Taken, Refused, Grown, Failed, Told)
}


def encode(message: Message) -> bytes:
    """One line, with its end."""
    values = [getattr(message, each.name) for each in fields(message)]
    return json.dumps([type(message).__name__, *values]).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Reads a line that `encode` wrote."""
    kind, *values = json.loads(line)
    return KINDS[kind](*values)
