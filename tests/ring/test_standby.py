"""A process that stands by for rank 0, in a server of real ranks that die."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx2
import psutil
import pytest
from conftest import Job, free_port, one_agent
from serving import Served
from waiting import wait_until

ASKED = {"model": "little", "prompt": "Once", "max_tokens": 1500, "seed": 3, "logit_bias": {"257": -100}}


def standing_by(url: str) -> list[int]:
    """Pids of the processes that have stood by so far."""
    texts = [each["text"] for each in httpx2.get(f"{url}/v1/cluster").json()["events"]]
    return [int(told[1]) for text in texts if (told := re.fullmatch(r"pid (\d+) stands by for rank 0", text))]


def standby(served: Served, *, number: int = 1) -> int:
    """The pid of the first process that stands by, or a later one."""
    wait_until(lambda: len(standing_by(served.url)) == number, served.errors)
    return standing_by(served.url)[-1]


def kill_rank_0_in_the_middle(served: Served, *, expected: str) -> None:
    came: list[str] = []

    def listen() -> None:
        for chunk in served.client.completions.create(stream=True, **ASKED):  # type: ignore[call-overload]
            came.append(chunk.choices[0].text)

    listener = threading.Thread(target=listen)
    listener.start()
    wait_until(lambda: len(came) >= 5, "no text came")
    rank0 = psutil.Process(served.cluster()["ranks"][0]["pid"])
    rank0.kill()
    rank0.wait(10)
    assert len("".join(came)) < len(expected), "it was struck in the middle"
    listener.join(90)
    assert not listener.is_alive()
    assert "".join(came) == expected


@pytest.fixture
def served(model: Path, tmp_path: Path) -> Iterator[Served]:
    served = Served(model, tmp_path, "serve.standby=true", "cluster.workers=2")
    try:
        yield served
    finally:
        served.end()


def test_it_takes_over_in_the_middle_of_an_answer(served: Served) -> None:
    expected = served.client.completions.create(**ASKED).choices[0].text  # type: ignore[call-overload]
    first = standby(served)
    kill_rank_0_in_the_middle(served, expected=expected)
    assert served.cluster()["ranks"][0]["pid"] == first, "what stood by is rank 0"
    second = standby(served, number=2)
    family = psutil.Process(served.process.pid)
    wait_until(lambda: len(family.children(recursive=True)) == 4, "each has one rank more")
    ended = family.children(recursive=True)
    assert {first, second} <= {each.pid for each in ended}
    assert served.end() == 0
    _, left = psutil.wait_procs(ended, timeout=10)
    assert not left


def test_under_torchrun_the_other_rank_stays(
    model: Path, tmp_path: Path, start: Callable[[Sequence[Sequence[str]]], Job]
) -> None:
    url = f"http://127.0.0.1:{(port := free_port())}"
    words = ["task=serve", f"serve.port={port}", "serve.standby=true", f"model.path={model}", "cluster.threads=1"]
    job = start(one_agent(2, *words, f"serve.journal={tmp_path / 'journal'}"))
    job.wait_for_error("listening on http://")

    def pids() -> list[int]:
        return [each["pid"] for each in httpx2.get(f"{url}/v1/cluster").json().get("ranks", ())]

    job.wait_until(lambda: len(pids()) == 2)
    job.wait_until(lambda: standing_by(url))
    (before, other), (first,) = pids(), standing_by(url)
    psutil.Process(before).kill()
    job.wait_until(lambda: pids() == [first, other])
    job.ranks()  # to be looked for in the end
    started = psutil.Process(job.launchers[0].pid).children()
    next(each for each in started if each.environ()["RANK"] == "0").terminate()
    assert job.wait(60) == [0]
    assert not job.alive()


@pytest.mark.slow
def test_one_that_dies_is_of_no_use_and_of_no_harm(served: Served) -> None:
    expected = served.client.completions.create(**ASKED).choices[0].text  # type: ignore[call-overload]
    (waiting := psutil.Process(first := standby(served))).kill()
    waiting.wait(10)
    kill_rank_0_in_the_middle(served, expected=expected)
    assert served.cluster()["ranks"][0]["pid"] != first
    assert standby(served, number=2), "there is another one"


@pytest.mark.slow
def test_one_whose_front_dies_ends(served: Served) -> None:
    waiting = psutil.Process(standby(served))
    family = psutil.Process(served.process.pid).children(recursive=True)
    assert waiting in family
    served.process.kill()
    served.process.wait(10)
    _, left = psutil.wait_procs(family, timeout=20)
    assert not left
    assert "Traceback" not in served.errors()
