"""The bar of loading: on a terminal it tells every rank's bytes and rate, elsewhere nothing."""

from __future__ import annotations

import io
import re

import pytest

from distllm.engine.orders import Status
from distllm.engine.progress import LoadProgress

GB = 10**9


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the bar's clock shows."""
    seconds = [100.0]
    monkeypatch.setattr("distllm.engine.progress.time.monotonic", lambda: seconds[0])
    monkeypatch.setenv("COLUMNS", "200")
    return seconds


def last_line(out: io.StringIO) -> str:
    return [line for line in re.split(r"[\r\n]", out.getvalue()) if line.strip()][-1]


def test_every_rank_is_told_with_its_rate(now: list[float]) -> None:
    out = Terminal()
    with LoadProgress({0: 2 * GB, 1: 3 * GB, 2: 3 * GB}, out, show_after_s=0) as progress:
        now[0] += 2
        progress.add_mine(GB)
        progress.see({1: Status(loaded_bytes=3 * GB), 2: Status()})
        now[0] += 2
        progress.see({1: Status(loaded_bytes=3 * GB), 2: Status(loaded_bytes=GB)})
        assert progress.still_s == 2
        assert "5.00G/8.00G" in last_line(out)
        told = "rank 0: 1.00 GB, 250 MB/s; rank 1: 3.00 GB, 750 MB/s; rank 2: 1.00 GB, 250 MB/s"
        assert told in last_line(out)


def test_of_many_ranks_the_last_is_told(now: list[float]) -> None:
    out = Terminal()
    totals = {0: GB, 1: GB, 2: GB, 3: 4 * GB, 4: GB // 10}
    with LoadProgress(totals, out, show_after_s=0) as progress:
        now[0] += 10
        progress.add_mine(GB)
        progress.see({rank: Status(loaded_bytes=min(GB, totals[rank])) for rank in (1, 2, 3, 4)})
        assert "last rank 3: 1.00 GB, 100 MB/s" in last_line(out)
        now[0] += 10
        progress.see({2: Status(), 3: Status(loaded_bytes=4 * GB)})
        assert "last rank 2: 0 B, 0 B/s" in last_line(out)


def test_a_pipe_is_told_nothing() -> None:
    out = io.StringIO()
    with LoadProgress({0: 100}, out, show_after_s=0) as progress:
        progress.add_mine(100)
    assert out.getvalue() == ""
