"""A server whose rank 0 dies of a token: `python poisoned.py FILE TOKEN task=serve ...`, as `-m distllm.run` otherwise.

Each death is proven by a line that it writes to the file before.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from distllm.model.runner import Runner
from distllm.run import Front, main
from distllm.serve import life, suspects
from distllm.serve.messages import Role


def poison(file: Path, poisonous: int) -> None:
    """Has this process die when it is to compute with the token."""
    run = Runner.run

    def deadly(runner: Runner, step: Any, *given: Any) -> Any:
        if runner.stage.span.embed and any(poisonous in row.tokens for row in step.rows):
            with file.open("a") as deaths:
                deaths.write(f"{[row.request for row in step.rows]}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return run(runner, step, *given)

    Runner.run = deadly  # type: ignore[method-assign]


if __name__ == "__main__":
    file, token, *words = sys.argv[1:]
    if words[0].isdecimal():  # rank 0's front says by which descriptor it hears
        poison(Path(file), int(token))
        main(words[2:], Front(socket.socket(fileno=int(words[0])), Role(words[1])))
    life.PROGRAM = (__file__, file, token)
    suspects.SUSPECT_DEATHS = suspects.ALONE_DEATHS = 1  # a death takes seconds
    main(words)
