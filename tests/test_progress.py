"""The bar of loading: on a terminal it tells every rank's bytes and rate, elsewhere nothing."""

from __future__ import annotations

import io
import re

import pytest

from distllm.engine.orders import Status
from distllm.engine.progress import LoadProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def last_line(out: io.StringIO) -> str:
    return [line for line in re.split(r"[\r\n]", out.getvalue()) if line.strip()][-1]


def test_every_rank_is_told_with_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    now = [100.0]
    monkeypatch.setattr("distllm.engine.progress.time.monotonic", lambda: now[0])
    out = Terminal()
    with LoadProgress(8 * 10**9, out, show_after_s=0) as progress:
        now[0] += 2
        progress.add_mine(10**9)
        progress.see({1: Status(loaded_bytes=3 * 10**9), 2: Status()})
        now[0] += 2
        progress.see({1: Status(loaded_bytes=3 * 10**9), 2: Status(loaded_bytes=10**9)})
        assert progress.still_s == 2
        line = last_line(out)
    assert "5.00G/8.00G" in line
    assert "rank 0: 1.00 GB, 500 MB/s; rank 1: 3.00 GB, 1.50 GB/s; rank 2: 1.00 GB, 250 MB/s" in line


def test_of_many_ranks_the_slowest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("distllm.engine.progress.time.monotonic", lambda: now[0])
    out = Terminal()
    with LoadProgress(10**9, out, show_after_s=0) as progress:
        now[0] += 1
        progress.add_mine(10**8)
        progress.see({rank: Status(loaded_bytes=10**8 * (2 if rank != 3 else 1) // 2) for rank in range(1, 6)})
        assert "slowest rank 3: 50.0 MB, 50.0 MB/s" in last_line(out)
        assert "rank 1" not in last_line(out)


def test_a_pipe_is_told_nothing() -> None:
    out = io.StringIO()
    with LoadProgress(100, out, show_after_s=0) as progress:
        progress.add_mine(100)
    assert out.getvalue() == ""
