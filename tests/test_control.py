"""The RPC group lives through deaths: the only test of what relies on torch's private names, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from distllm.net import store

PEER = """
import sys
from distllm.net import control
from distllm.net.group import AgentId
from distllm.net.node import Node
from distllm.net.store import Rendezvous

class Echo:
    def echo(self, thing):
        return thing
    def late(self):
        import time
        time.sleep(30)

rank, port = int(sys.argv[1]), int(sys.argv[2])
try:
    node = Node(Rendezvous(rank=rank, world_size=9, host="127.0.0.1", port=port, job="t", one_host=True), None, 8.0)
except ConnectionError as error:
    print(error, flush=True)
    sys.exit(1)
control.expose("echo", Echo())
print(node.identity.name, node.identity.id, flush=True)
sys.stdin.readline()
"""

# One of another host, whose end nobody here can see.
FOREIGN = "from distllm.net import group\ngroup._process = lambda: ('another host', 1, 0.0)\n" + PEER

MASTER = (
    PEER.replace("sys.stdin.readline()\n", "")
    + """
import gc
import random
import signal
import time
from torch.distributed import rpc
from torch.distributed.rpc import _utils

def crowd(size):
    for index in range(size):
        node.agent._group._store.set(f"addrs/extra{index}", "uv://127.0.0.1:1")
        _utils._update_group_membership(rpc.WorkerInfo(f"extra{index}", 1000 + index), [], {}, True)

class Interrupted(BaseException):
    pass

raised = []

def strike(*_):
    raised.append(time.monotonic())
    raise Interrupted

def interrupt(peer, tries):
    "Strikes once at any moment of a call, and again three seconds later where that was not heard; says how often."
    random.seed(0)
    signal.signal(signal.SIGALRM, strike)
    for _ in range(tries):
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.002), 3.0)
            while True:
                [answer.wait() for answer in [peer.ask("echo", 1, timeout_s=5) for _ in range(4)]]
        except Interrupted:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
    return len(raised)

peers = {}
strays = []
for line in sys.stdin:
    verb, *rest = line.split()
    try:
        if verb == "know":
            peers[rest[0]] = control.Peer(AgentId(rest[0], int(rest[1])), "echo")
            print("ok", flush=True)
        elif verb == "echo":
            print(peers[rest[0]].ask("echo", {"a": (1, 2)}, timeout_s=5).wait(), flush=True)
        elif verb == "late":
            peers[rest[0]].ask("late", timeout_s=0.5).wait()
        elif verb == "name":
            print(control.call_by_name(rest[0], "echo", "echo", 5, timeout_s=5), flush=True)
        elif verb == "bury":
            control_id = AgentId(rest[0], int(rest[1]))
            node.agent.bury([control_id]) if rest[2] == "all" else control.bury_here(control_id)
            print("ok", flush=True)
        elif verb == "strays":
            strays = node.agent.bury_strays([], strays)
            print(len(strays), flush=True)
        elif verb == "crowd":
            crowd(int(rest[0]))
            print("ok", flush=True)
        elif verb == "interrupt":
            print(interrupt(peers[rest[0]], int(rest[1])), flush=True)
        elif verb == "drop":
            del peers[rest[0]]
            gc.collect()
            print("ok", flush=True)
    except control.PeerLost as lost:
        print("lost", lost.reason, lost.timed_out, flush=True)
"""
)


class Process:
    """A peer that answers a line with a line."""

    def __init__(self, script: str, rank: int, port: int, **environ: str) -> None:
        command = [sys.executable, "-c", script, str(rank), str(port)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": os.environ | environ}
        self.popen = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]

    def hear(self) -> str:
        return str(self.popen.stdout.readline().strip())

    def say(self, line: str) -> str:
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()
        return self.hear()


@pytest.fixture
def port() -> Iterator[int]:
    _server, number = store.serve_on_loopback()
    yield number
    del _server


@pytest.mark.timeout(120)
def test_the_group_lives_through_deaths(port: int) -> None:
    processes = [master := Process(MASTER, 0, port)]
    try:
        master.hear()
        for round_ in range(3):
            processes.append(peer := Process(FOREIGN, 1 + round_, port))
            name = peer.hear()
            assert name, "the newcomer joined although others had died"
            agent = name.split()[0]
            assert master.say(f"know {name}") == "ok"
            assert master.say(f"echo {agent}") == "{'a': (1, 2)}"
            assert master.say(f"name {agent}") == "5"
            if round_ == 0:
                assert master.say(f"late {agent}") == "lost it does not answer True"
            os.kill(peer.popen.pid, signal.SIGKILL)
            assert peer.popen.wait(10) == -signal.SIGKILL
            assert master.say(f"echo {agent}") == "lost its connection is closed False"
            if round_ == 1:
                processes.append(late := Process(PEER, 9, port))
                assert late.hear() == "cannot join the other ranks within 8 s; has one died?"
            assert master.say(f"bury {name} all") == "ok"
    finally:
        _end(processes)


@pytest.mark.timeout(150)
def test_an_interrupt_is_heard_at_any_moment_of_a_call(port: int) -> None:
    processes = [master := Process(MASTER, 0, port), peer := Process(PEER, 1, port)]
    try:
        master.hear()
        name = peer.hear()
        assert master.say(f"know {name}") == "ok"
        assert master.say(f"interrupt {name.split()[0]} 1000") == "1000"
    finally:
        _end(processes)


@pytest.mark.timeout(60)
def test_who_dies_before_it_is_known_is_found_and_buried(port: int) -> None:
    processes = [master := Process(MASTER, 0, port)]
    try:
        master.hear()
        processes.append(stray := Process(PEER, 1, port))
        assert stray.hear()
        assert [master.say("strays") for _ in range(3)] == ["1", "1", "1"], "it lives"
        os.kill(stray.popen.pid, signal.SIGKILL)
        assert stray.popen.wait(10) == -signal.SIGKILL
        assert [master.say("strays") for _ in range(2)] == ["1", "0"]
        processes.append(peer := Process(PEER, 2, port))
        assert peer.hear().startswith("rank2_")
    finally:
        _end(processes)


@pytest.mark.timeout(60)
def test_who_comes_in_place_of_a_dead_one_waits_for_its_burial_and_sees_to_it(port: int) -> None:
    processes = [master := Process(MASTER, 0, port)]
    try:
        master.hear()
        for _ in range(2):
            processes.append(peer := Process(FOREIGN, 1, port))
            assert peer.hear().startswith("rank1_")
            os.kill(peer.popen.pid, signal.SIGKILL)
            assert peer.popen.wait(10) == -signal.SIGKILL
    finally:
        _end(processes)


@pytest.mark.timeout(60)
def test_who_comes_strikes_off_the_dead_of_its_host(port: int) -> None:
    processes = [peer := Process(PEER, 1, port)]
    try:
        assert peer.hear()
        os.kill(peer.popen.pid, signal.SIGKILL)
        assert peer.popen.wait(10) == -signal.SIGKILL
        processes.append(other := Process(PEER, 2, port))
        assert other.hear().startswith("rank2_")
    finally:
        _end(processes)


@pytest.mark.timeout(60)
def test_a_reference_to_a_buried_peer_can_be_dropped(port: int) -> None:
    """Freed memory is filled with rubbish, and the group is so large that names in it are hashed: use is fatal."""
    rubbish = "glibc.malloc.tcache_count=0:glibc.malloc.perturb=165"
    processes = [master := Process(MASTER, 0, port, GLIBC_TUNABLES=rubbish)]
    try:
        master.hear()
        processes.append(peer := Process(PEER, 1, port))
        name = peer.hear()
        agent = name.split()[0]
        assert master.say(f"know {name}") == "ok"
        assert master.say(f"echo {agent}") == "{'a': (1, 2)}"
        assert master.say("crowd 30") == "ok"
        os.kill(peer.popen.pid, signal.SIGSTOP)
        assert master.say(f"drop {agent}") == "ok"
        os.kill(peer.popen.pid, signal.SIGKILL)
        assert peer.popen.wait(10) == -signal.SIGKILL
        assert master.say(f"bury {name} all") == "ok"
        with pytest.raises(subprocess.TimeoutExpired):  # torch says a lost farewell again after a second
            master.popen.wait(2.5)
    finally:
        _end(processes)


@pytest.mark.timeout(60)
def test_a_rank_that_cannot_join_says_so(port: int) -> None:
    processes = [peer := Process(FOREIGN, 1, port)]
    try:
        assert peer.hear()
        os.kill(peer.popen.pid, signal.SIGKILL)
        assert peer.popen.wait(10) == -signal.SIGKILL
        command = [sys.executable, "-m", "distllm.engine", "--rank=2", "--world-size=3", "--host=127.0.0.1"]
        command += [f"--port={port}", "--job=t", "--join-timeout-s=5", "--deadline-s=5"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as rank:
            rank.stdin.write("\n")  # it is woken
            rank.stdin.flush()
            assert rank.wait(40) == 1
            said = rank.stderr.read()
        assert "rank 2 ends: cannot join the other ranks within 5 s; has one died?" in said
    finally:
        _end(processes)


def _end(processes: list[Process]) -> None:
    for process in processes:
        process.popen.kill()
        process.popen.wait(10)
        process.popen.stdin.close()
        process.popen.stdout.close()
