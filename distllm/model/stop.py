"""Stop strings in a text that arrives in pieces. Knows nothing of tokens or models."""

from __future__ import annotations


class StopStrings:
    """Ends a stream of text before the first stop string in it.

    The stop string that is complete first wins, and of several complete at the same character the one that starts
    first; so the result does not depend on how the text is cut into pieces. One object serves one stream.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = stops
        self._held = ""  # what may be the beginning of a stop string
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text; return what is certain to come before any stop string, and whether one was found.

        After a match nothing more comes out.
        """
        if self._stopped:
            return "", True
        seen = self._held + text
        matches = [(at + len(stop), at) for stop in self._stops if (at := seen.find(stop)) >= 0]
        if matches:
            self._stopped, self._held = True, ""
            return seen[: min(matches)[1]], True
        sure = len(seen) - max((_overlap(seen, stop) for stop in self._stops), default=0)
        self._held = seen[sure:]
        return seen[:sure], False

    def flush(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins without being complete."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
