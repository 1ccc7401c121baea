"""A rival's end of the pipes: jobs in by standard input, answers out by what was its standard output.

Knows nothing of models. Several ranks may share the pipes: one reads the jobs, any may tell of an error.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from collections.abc import Iterator
from typing import TypedDict


class Job(TypedDict):
    """Prompts of token ids to continue at once."""

    prompts: list[list[int]]
    new_tokens: int


class Pipe:
    """Takes over standard input and output: what else is printed goes to standard error from now on.

    Args:
        abrupt: end the process when its standard input closes, whatever it is doing; else `jobs` ends, and no more.
    """

    def __init__(self, *, abrupt: bool = True) -> None:
        self._out = os.dup(1)
        os.dup2(2, 1)
        if abrupt:
            threading.Thread(target=_end_with_input, name="rival-pipe", daemon=True).start()

    def jobs(self) -> Iterator[Job]:
        for line in sys.stdin:
            yield json.loads(line)

    def say(self, **answer: object) -> None:
        """Sends one line, in one write as far as the pipe takes it."""
        line = (json.dumps(answer) + "\n").encode()
        while line:
            line = line[os.write(self._out, line) :]


def _end_with_input() -> None:
    """Ends the process when the other end of standard input closes; reads nothing and takes no time."""
    poll = select.poll()
    poll.register(0, 0)  # a hang-up is told even if nothing is asked for
    poll.poll()
    os._exit(0)
