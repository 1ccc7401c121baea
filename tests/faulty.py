"""A rank that fails when it is told to: `python faulty.py FOLDER --rank=...`, as `python -m distllm.engine` otherwise.

A file FOLDER/RANK-PLACE with the name of a fault makes it happen at the next time that the rank is in that place; the
file is renamed to one that ends with .happened, which proves it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distllm.engine import process, worker
from distllm.model.runner import Runner
from distllm.net.node import Node


def is_prompt(*given: Any) -> bool:
    return bool(given[1].has_prompt)


PLACES: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "load": (worker, "load", lambda *_, **__: True),
    "join": (Node, "wire", lambda *_, **__: True),
    "prompt": (Runner, "run", is_prompt),
    "decode": (Runner, "run", lambda *given: not is_prompt(*given)),
    "arrive": (process, "call_by_name", lambda *given, **_: given[2] == "register"),
}


def fail(kind: str) -> None:
    """One of raise, exit, kill, segfault, stop (which may be woken) and hang."""
    if kind == "raise":
        raise RuntimeError("no such kernel")
    if kind == "exit":
        os._exit(3)
    if kind == "hang":
        time.sleep(1000)
    signals = {"kill": signal.SIGKILL, "segfault": signal.SIGSEGV, "stop": signal.SIGSTOP}
    os.kill(os.getpid(), signals[kind])


def spoil(folder: Path, rank: int, place: str) -> None:
    owner, name, here = PLACES[place]
    real = getattr(owner, name)
    order = folder / f"{rank}-{place}"

    def faulty(*given: Any, **named: Any) -> Any:
        if order.exists() and here(*given, **named):
            kind = order.read_text()
            order.rename(folder / f"{rank}-{place}.happened")
            fail(kind)
        return real(*given, **named)

    setattr(owner, name, faulty)


if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    number = next(int(word.removeprefix("--rank=")) for word in sys.argv if word.startswith("--rank="))
    for each in PLACES:
        spoil(folder, number, each)
    process.main()
