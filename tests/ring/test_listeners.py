"""What a server of three ranks of one host listens on: what docs/serve.md says, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import httpx2
import psutil
from conftest import Job, free_port, one_agent
from processes import child
from test_serve import Served

LOOPBACK = "127.0.0.1"
EVEN = "plan.strategy=even"  # so that each rank has a part
GRAMMAR = {"model": "little", "prompt": "a", "max_tokens": 2, "response_format": {"type": "json_object"}}


def listeners(process: psutil.Process) -> list[tuple[str, int]]:
    """Where others can reach it: TCP sockets that listen, all of UDP, and Unix sockets that have a name."""
    found = []
    for each in process.net_connections("all"):
        if each.status == psutil.CONN_LISTEN or (each.family.name != "AF_UNIX" and each.type.name == "SOCK_DGRAM"):
            found.append((each.laddr.ip, each.laddr.port))
        elif each.family.name == "AF_UNIX" and each.laddr:
            found.append((str(each.laddr), 0))
    return found


def check(front: psutil.Process, ranks: Sequence[psutil.Process], port: int, *, own_store: bool) -> None:
    """The front listens on its port, each rank for RPC and for the ring, and rank 0 for the store if it is its own."""
    url = f"http://{LOOPBACK}:{port}"
    assert httpx2.post(f"{url}/v1/completions", json=GRAMMAR, timeout=60).status_code == 200
    (listening,) = listeners(front)
    assert listening == (LOOPBACK, port)
    for rank, process in enumerate(ranks):
        assert [address for address, _ in listeners(process)] == [LOOPBACK] * (3 if own_store and rank == 0 else 2)
    known = {front.pid, *(rank.pid for rank in ranks)}
    others = [each for each in front.children(recursive=True) if each.pid not in known]
    assert others, "grammars are tried in one"
    assert not any(listeners(each) for each in others)


def test_ranks_that_the_server_has_started(model: Path, tmp_path: Path) -> None:
    server = Served(model, tmp_path, "cluster.threads=1", EVEN)
    try:
        port = int(server.url.rpartition(":")[2])
        check(psutil.Process(server.process.pid), [server.rank0(), *server.workers()], port, own_store=True)
        assert len(server.workers()) == 2
    finally:
        assert server.end() == 0


def test_ranks_of_torchrun(model: Path, tmp_path: Path, start: Callable[[Sequence[Sequence[str]]], Job]) -> None:
    port = free_port()
    words = ["task=serve", f"serve.port={port}", "cluster.threads=1", f"model.path={model}", "model.name=little", EVEN]
    job = start(one_agent(3, *words, f"serve.journal={tmp_path / 'journal'}"))
    job.wait_for_error("listening on http://")
    job.wait_until(lambda: httpx2.get(f"http://{LOOPBACK}:{port}/ready").status_code == 200)
    agent = psutil.Process(job.launchers[0].pid)
    front = next(each for each in agent.children() if each.environ()["RANK"] == "0")
    rank0 = child(front, "distllm.serve")
    others = [each for each in agent.children() if each != front]
    assert len(others) == 2
    check(front, [rank0, *others], port, own_store=False)
    (store,) = listeners(agent)  # torchrun's, which cannot be told where to listen
    assert store[1] == int(front.environ()["MASTER_PORT"])
