"""Waiting for what must come, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

WAIT_S = 90.0
POLL_S = 0.005


def wait_until(seen: Callable[[], Any], what: str | Callable[[], str], timeout_s: float = WAIT_S) -> None:
    """Until something is seen.

    Args:
        what: to say if it is not seen in time.

    Raises:
        AssertionError: it is not.
    """
    deadline = time.monotonic() + timeout_s
    while not seen():
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(POLL_S)
