"""Where people type and read, or pipes in their place: lines in, an answer as it comes, and what is said beside it."""

from __future__ import annotations

import io
import os
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

PROMPT = "> "
CTRL_C = b"\x03"


class Terminal:
    """Standard input and output, and standard error for the rest; only answers go to standard output.

    It is a stream for log lines too, which may come in the middle of an answer.
    """

    def __init__(self) -> None:
        self._is_typed, self._is_seen = sys.stdin.isatty(), sys.stdout.isatty()
        self._in_line = False
        self._lock = threading.Lock()
        if isinstance(sys.stdin, io.TextIOWrapper):  # what is no UTF-8 is refused with the message that has it
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        if self._is_typed and self._is_seen:
            with suppress(ImportError):  # editing, and the lines before by the arrow keys
                import readline  # noqa: F401

    def lines(self) -> Iterator[str]:
        """What is typed, until there is no more: the end of the input, Ctrl-D, or Ctrl-C."""
        while True:
            try:
                yield self._line()
            except (EOFError, KeyboardInterrupt):
                if self._is_typed:
                    self.write("\n")
                return

    def _line(self) -> str:
        if self._is_typed and self._is_seen:
            return input(PROMPT)
        if self._is_typed:
            self.write(PROMPT)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def show(self, text: str) -> None:
        """A piece of an answer."""
        with self._lock:
            sys.stdout.write(text)
            sys.stdout.flush()
            if text:
                self._in_line = not text.endswith("\n")

    def write(self, text: str) -> None:
        """Something beside the answer, on a line of its own."""
        with self._lock:
            if self._in_line and self._is_seen:
                sys.stderr.write("\n")
                self._in_line = False
            sys.stderr.write(text)
            sys.stderr.flush()

    def flush(self) -> None:
        """Everything is written at once."""

    @contextmanager
    def listening(self) -> Iterator[Callable[[], bool]]:
        """Makes Ctrl-C a key meanwhile; by a signal torchrun would end the job. Tells whether it was pressed."""
        if not self._is_typed:
            yield lambda: False
            return
        keyboard = sys.stdin.fileno()
        before, changed = termios.tcgetattr(keyboard), termios.tcgetattr(keyboard)
        changed[3] &= ~(termios.ICANON | termios.ECHO)
        changed[6][termios.VINTR] = changed[6][termios.VMIN] = changed[6][termios.VTIME] = b"\0"
        termios.tcsetattr(keyboard, termios.TCSANOW, changed)
        try:
            yield lambda: CTRL_C in os.read(keyboard, 1024)
        finally:
            termios.tcsetattr(keyboard, termios.TCSANOW, before)
