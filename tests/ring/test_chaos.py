"""Faults at random moments, by a seed that repeats them: no request is lost, and in fp32 none gets another token."""

from __future__ import annotations

import logging
import random
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faults import DEADLINE_S, GREEDY, SEEDED, Running, several, strike, workers
from waiting import wait_until

from distllm import SamplingParams

SIGNS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP)
MOST_TOKENS = 250


@dataclass(frozen=True)
class Fault:
    """What happens to which rank, so many tokens and seconds after the requests have begun.

    `meanwhile` is a rank that is struck as soon as the master mends the ring for the first one's sake.
    """

    rank: int
    sign: signal.Signals
    tokens: int
    seconds: float
    meanwhile: int | None


def schedule(seed: int) -> list[Fault]:
    chance = random.Random(seed)
    ranks = chance.sample([1, 2, 3, 4], 4)
    faults = []
    while ranks:
        rank = ranks.pop()
        meanwhile = ranks.pop() if ranks and chance.random() < 0.3 else None
        tokens = chance.choice([0, 1, 5, MOST_TOKENS // 3, MOST_TOKENS])
        faults.append(Fault(rank, chance.choice(SIGNS), tokens, chance.random() * 0.1, meanwhile))
    return faults


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(8))
def test_random_faults(
    seed: int, model: Path, wanted: dict[SamplingParams, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "distllm")
    struck = 0
    with several(model, 5, deadline_s=DEADLINE_S) as llm:
        for number, fault in enumerate(schedule(seed)):
            params = (GREEDY, SEEDED)[number % 2]
            before = len(caplog.messages)
            running = Running(llm, params)
            running.wait_for(fault.tokens)
            time.sleep(fault.seconds)
            strike(workers()[fault.rank], fault.sign)
            struck += 1
            if fault.meanwhile is not None:
                wait_until(lambda before=before: len(caplog.messages) > before, "it was not noticed")  # type: ignore[misc]
                strike(workers()[fault.meanwhile], signal.SIGKILL)
                struck += 1
            assert running.tokens() == wanted[params], fault
        assert struck == 4
        assert [stage.rank for stage in llm.plan.stages] == [0]
    assert not workers()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", [["--faults", "24", "--seed", "5"], ["--minutes", "1.2", "--seed", "3", "--plot"]])
def test_the_script_of_many_faults(how: list[str], tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "launch" / "chaos.sh"
    picture = tmp_path / "soak.png"
    words = [*how, str(picture)] if how[-1] == "--plot" else how
    done = subprocess.run(["bash", str(script), *words], capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = re.search(r"^(\d+) faults, (\d+) requests ended, 0 lost, 0 different$", done.stdout, re.MULTILINE)
    assert counts, done.stdout
    assert int(counts[1]) >= 3
    assert int(counts[2]) > 0
    assert picture.exists() == (how[-1] == "--plot")
    if picture.exists():
        joined = re.search(r"; (\d+) new ranks joined and left; ", done.stdout)
        assert joined, done.stdout
        assert int(joined[1]) >= 1
