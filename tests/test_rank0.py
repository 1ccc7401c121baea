"""Lives of rank 0 as the front has them: real processes, which only say that they are ready."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import psutil
import pytest

from distllm.serve import life, rank0
from distllm.serve.life import Life
from distllm.serve.messages import Role
from distllm.serve.metrics import Metrics
from distllm.serve.rank0 import Rank0

PROGRAM = """
import socket, sys
front = socket.socket(fileno=int(sys.argv[1]))
if sys.argv[2] != "standby" or front.recv(1):
    front.sendall(b'["Ready", 4]\\n')
    front.recv(100)
"""
DEADLINE_S = 20.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "PROGRAM", ("-c", PROGRAM))
    monkeypatch.setattr(rank0, "STANDBY_PAUSE_S", 0.01)
    monkeypatch.setattr(rank0, "FIRST_PAUSE_S", 0.01)


def refuse(monkeypatch: pytest.MonkeyPatch, role: Role, times: int) -> list[Role]:
    """Has no process of a role be started, so often; what was refused."""
    start, refused = Life.start, list[Role]()

    async def refusing(words: Sequence[str], wanted: Role) -> Life:
        if wanted is role and len(refused) < times:
            refused.append(wanted)
            raise OSError(11, "Resource temporarily unavailable")
        return await start(words, wanted)

    monkeypatch.setattr(Life, "start", refusing)
    return refused


async def until(seen: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not seen():
            await asyncio.sleep(0.01)


def run(scene: Callable[[Rank0], Awaitable[None]], *, stands_by: bool) -> None:
    """Until the scene is over; then all processes must end."""

    async def play() -> None:
        of_rank0 = Rank0([], lambda _: None, lambda: None, Metrics(), stands_by=stands_by)
        running = asyncio.create_task(of_rank0.run())
        try:
            await scene(of_rank0)
        finally:
            await of_rank0.stop()
        assert await running == 0

    asyncio.run(play())
    assert not psutil.Process().children()


def texts(of_rank0: Rank0) -> list[str]:
    return [str(each["text"]) for each in of_rank0.events.told()]


def standing(of_rank0: Rank0) -> list[str]:
    """Pids of those that have stood by so far."""
    return [text.split()[1] for text in texts(of_rank0) if text.endswith("stands by for rank 0")]


async def kill_rank_0(of_rank0: Rank0, *others: str) -> None:
    """The process that is not one of the others."""
    comings = of_rank0.comings
    (running,) = [each for each in psutil.Process().children() if str(each.pid) not in others]
    running.kill()
    await until(lambda: of_rank0.comings == comings + 1)


def test_what_stands_by_takes_over_each_time() -> None:
    async def scene(of_rank0: Rank0) -> None:
        for deaths in range(3):
            await until(lambda deaths=deaths: len(standing(of_rank0)) == deaths + 1)  # type: ignore[misc]
            await kill_rank_0(of_rank0, standing(of_rank0)[-1])
        taken = [text for text in texts(of_rank0) if "that stood by" in text]
        assert taken == [f"rank 0 is the process that stood by, pid {pid}" for pid in standing(of_rank0)[:3]]

    run(scene, stands_by=True)


def test_by_default_nobody_stands_by() -> None:
    async def scene(of_rank0: Rank0) -> None:
        for _ in range(2):
            await until(lambda: of_rank0.ready)
            await kill_rank_0(of_rank0)
        assert sum("rank 0 is started, as pid" in text for text in texts(of_rank0)) == 3

    run(scene, stands_by=False)


def test_without_room_for_a_process_nobody_stands_by(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused = refuse(monkeypatch, Role.STANDBY, times=1)

    async def scene(of_rank0: Rank0) -> None:
        await until(lambda: refused)
        await kill_rank_0(of_rank0)
        await until(lambda: standing(of_rank0))

    run(scene, stands_by=True)
    told = "no process can stand by for rank 0: [Errno 11] Resource temporarily unavailable"
    assert [each.message for each in caplog.records].count(told) == 1


def test_rank_0_is_started_as_soon_as_there_is_room(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused = refuse(monkeypatch, Role.NEXT, times=3)

    async def scene(of_rank0: Rank0) -> None:
        await until(lambda: of_rank0.ready)
        await kill_rank_0(of_rank0)

    run(scene, stands_by=False)
    assert len(refused) == 3
    told = "rank 0 cannot be started: [Errno 11] Resource temporarily unavailable"
    assert [each.message for each in caplog.records].count(told) == 3


def test_what_is_about_to_stand_by_ends_with_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    start, begun, go_on = Life.start, list[Role](), asyncio.Event()

    async def slow(words: Sequence[str], role: Role) -> Life:
        begun.append(role)
        if role is Role.STANDBY:
            await go_on.wait()
        return await start(words, role)

    monkeypatch.setattr(Life, "start", slow)

    async def scene(_: Rank0) -> None:
        await until(lambda: Role.STANDBY in begun)
        asyncio.get_running_loop().call_soon(go_on.set)

    run(scene, stands_by=True)
