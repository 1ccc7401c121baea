"""Which call rank 0 may die of: one that was asked each time, and of which nothing came. Knows no process."""

from __future__ import annotations

from collections.abc import Sequence

from distllm.serve.calls import Call

SUSPECT_DEATHS = 2  # after so many a call is asked alone
ALONE_DEATHS = 3  # after so many more it is not asked again


class Suspects:
    """Counts the deaths of rank 0 against the calls that it was asked meanwhile.

    One of which something has come since it was asked is innocent. Suspects are asked one at a time, until something
    comes of them; the other calls wait that long.
    """

    def __init__(self) -> None:
        self._deaths: dict[str, int] = {}
        self._asked: dict[str, tuple[Call, tuple[bool, int]]] = {}

    def asked(self, call: Call) -> None:
        """Rank 0 has been asked this now."""
        self._asked[call.name] = call, _progress(call)

    def over(self, call: Call) -> None:
        """Nobody asks for it any more."""
        self._asked.pop(call.name, None)
        self._deaths.pop(call.name, None)

    @property
    def on_trial(self) -> bool:
        """A suspect has been asked, and nothing has come of it yet."""
        return any(self._is_suspect(call) and _progress(call) == before for call, before in self._asked.values())

    def admitted(self, calls: Sequence[Call]) -> Sequence[Call]:
        """Which of these may be asked now."""
        if self.on_trial:
            return []
        suspects = [call for call in calls if self._is_suspect(call)]
        return suspects[:1] or calls

    def rank0_died(self) -> list[Call]:
        """Returns the calls that it dies of, as far as anybody can tell."""
        for name, (call, before) in self._asked.items():
            self._deaths[name] = self._deaths.get(name, 0) + 1 if _progress(call) == before else 0
        most = SUSPECT_DEATHS + ALONE_DEATHS
        guilty = [call for name, (call, _) in self._asked.items() if self._deaths[name] >= most]
        self._asked.clear()
        return guilty

    def _is_suspect(self, call: Call) -> bool:
        return self._deaths.get(call.name, 0) >= SUSPECT_DEATHS


def _progress(call: Call) -> tuple[bool, int]:
    """How far it has come: whether it is taken, and tokens of its answer."""
    return call.tokens is not None, call.known
