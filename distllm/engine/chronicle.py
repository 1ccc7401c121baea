"""What has become of the ranks, with times, for whoever watches: it decides nothing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from distllm.core import Member, Span

Kind = Literal[
    "lost",  # a rank, by name
    "broke",  # the ring, without a loss
    "recovered",  # there is a ring again
    "changed",  # the plan, without a loss
    "joined",  # a rank
    "left",  # a rank that was told to
]

KEPT = 100


@dataclass(frozen=True, slots=True)
class Happening:
    """One of them; `number` counts from 1, `time` is in seconds since 1970."""

    number: int
    time: float
    kind: Kind
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A rank that was lost and has not come back. `layers` are those that it held, none if it had no part."""

    rank: int
    host: str
    pid: int
    layers: tuple[int, int] | None
    since: float
    why: str


class Chronicle:
    """The newest happenings, and who is missing. Written by the engine's thread, read by any.

    Attributes:
        mending: the ring has broken, and there is no other one yet.
    """

    def __init__(self) -> None:
        self.mending = False
        self._happenings: deque[Happening] = deque(maxlen=KEPT)
        self._missing: dict[int, Missing] = {}
        self._count = 0
        self._told: Callable[[], None] = lambda: None

    def on_change(self, told: Callable[[], None]) -> None:
        """Has somebody told, from the engine's thread, whenever there is something new."""
        self._told = told

    def broken(self) -> None:
        """The ring, for a reason that is not known yet."""
        self.mending = True
        self._told()

    def mended(self, text: str) -> None:
        """There is a ring again."""
        self.mending = False
        self.note("recovered", text)

    def note(self, kind: Kind, text: str) -> None:
        self._count += 1
        self._happenings.append(Happening(self._count, time.time(), kind, text))
        self._told()

    def lost(self, held: Mapping[Member, Span | None], why: str) -> None:
        """These are missing from now on, with what they held; a ring may also break without a loss."""
        for member, span in held.items():
            layers = None if span is None else (span.start, span.stop)
            self._missing[member.rank] = Missing(
                rank=member.rank, host=member.host, pid=member.pid, layers=layers, since=time.time(), why=why
            )
        self.note("lost" if held else "broke", why)

    def joined(self, member: Member) -> None:
        self._missing.pop(member.rank, None)
        self.note("joined", f"{member} has come")

    def told(self) -> dict[str, object]:
        """As plain values."""
        return {
            "mending": self.mending,
            "happenings": [asdict(each) for each in tuple(self._happenings)],
            "missing": [asdict(each) for each in tuple(self._missing.values())],
        }
