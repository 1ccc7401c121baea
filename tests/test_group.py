"""Who of a group lives, as its store tells it: no RPC, one store, and processes that really end."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest
from torch.distributed import PrefixStore, Store
from waiting import wait_until

from distllm.net import group, store
from distllm.net.group import AgentId, Group
from distllm.net.store import Rendezvous


@pytest.fixture
def shared() -> Iterator[Store]:
    server, port = store.serve_on_loopback()
    yield PrefixStore("rpc", store.connect(Rendezvous(rank=0, world_size=1, host="127.0.0.1", port=port, job="t"), 5))
    del server


def member(shared: Store, name: str, number: int, process: subprocess.Popen[bytes] | None = None) -> Group:
    """One that has joined: this process, or another one."""
    there = group._process()
    if process is not None:
        there = there[0], process.pid, group._started(process.pid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "_process", lambda: there)
        made = Group(shared, AgentId(name, number))
    before = shared.get(group._MEMBERS).decode() if shared.check([group._MEMBERS]) else ""
    shared.set(group._MEMBERS, f"{before}{name}-{number},")
    shared.set(f"names/{number}", name)
    shared.set(f"addrs/{name}", "somewhere")
    return made


def names(seen: Group) -> list[str]:
    return [each.name for each in seen.listed()]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("reaped", [True, False])
def test_the_dead_of_this_host_are_struck_off(shared: Store, sleeper: subprocess.Popen[bytes], reaped: bool) -> None:
    member(shared, "rank1_a", 1, sleeper)
    member(shared, "rank2_b", 2)
    comes = Group(shared, AgentId("rank3_c", 3))
    comes.make_way(succeeds=False)
    assert names(comes) == ["rank1_a", "rank2_b"], "they live"
    sleeper.kill()
    if reaped:
        sleeper.wait()
    else:
        wait_until(lambda: psutil.Process(sleeper.pid).status() == psutil.STATUS_ZOMBIE, "it is not killed")
    comes.make_way(succeeds=False)
    assert names(comes) == ["rank2_b"]
    assert not shared.check(["names/1"])
    assert not shared.check(["addrs/rank1_a"])


def test_a_pid_that_another_process_has_now(shared: Store) -> None:
    member(shared, "rank1_a", 1)
    host, pid, started = group._process()
    shared.set("process/rank1_a", f'["{host}", {pid}, {started - 100}]')
    comes = Group(shared, AgentId("rank2_b", 2))
    comes.make_way(succeeds=False)
    assert names(comes) == []


@pytest.mark.parametrize("who", ["others", "nobody"])
def test_who_had_this_rank_is_buried_first(shared: Store, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "BURIAL_S", 3600.0 if who == "others" else 0.1)
    lives = member(shared, "rank0_a", 1)
    member(shared, "rank1_a", 2)
    bury = threading.Timer(0.2, lambda: lives.strike_off(AgentId("rank1_a", 2)))
    if who == "others":
        bury.start()
    comes = Group(shared, AgentId("rank1_b", 3))
    comes.make_way(succeeds=False)
    assert names(comes) == ["rank0_a"]
    bury.cancel()


def test_a_new_master_takes_those_for_dead_who_do_not_answer(shared: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    member(shared, "rank0_a", 1)
    lives = member(shared, "rank1_b", 2)
    lives.answer()  # there was no call yet
    member(shared, "rank2_c", 3)
    comes = Group(shared, AgentId("rank0_d", 4))
    over = threading.Event()

    def answer() -> None:
        while not over.wait(0.05):
            lives.answer()

    thread = threading.Thread(target=answer)
    thread.start()
    monkeypatch.setattr(group, "ROLL_CALL_S", 1.0)
    comes.make_way(succeeds=True)
    assert names(comes) == ["rank1_b"]
    monkeypatch.setattr(group, "ROLL_CALL_S", 3600.0)
    comes.make_way(succeeds=True)
    assert names(comes) == ["rank1_b"], "all have answered"
    over.set()
    thread.join()
