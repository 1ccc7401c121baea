"""Work beside the caller, whom what cannot be stopped must not hold up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Made = TypeVar("Made")


def in_thread(action: Callable[[], Made]) -> Future[Made]:
    """Acts beside the caller, who can watch others meanwhile; a process that ends does not wait for it."""
    future: Future[Made] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001 - handed to whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, name="distllm-beside", daemon=True).start()
    return future
