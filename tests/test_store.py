"""Where ranks meet: ports, deadlines, and the interface that they choose."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from distllm.net import address, store
from distllm.net.address import LOOPBACK
from distllm.net.store import Rendezvous


def rendezvous(port: int, rank: int = 0, world_size: int = 2, **more: bool) -> Rendezvous:
    return Rendezvous(rank=rank, world_size=world_size, host=LOOPBACK, port=port, job="test", **more)


def test_the_store_of_a_host_listens_on_loopback_only() -> None:
    _server, port = store.serve_on_loopback()
    mine = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.laddr and c.laddr.port == port]
    assert mine
    assert set(mine) == {LOOPBACK}


def test_a_port_in_use_is_named() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            store.serve(rendezvous(port, hosts_store=True))


def test_a_store_that_is_not_there_is_named() -> None:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    with pytest.raises(ValueError, match=rf"no store answers at 127\.0\.0\.1:{port} within 0\.5 s"):
        store.connect(rendezvous(port), 0.5)


def test_missing_ranks_are_named() -> None:
    _server, port = store.serve_on_loopback()
    where = rendezvous(port, world_size=3)
    with pytest.raises(ValueError, match=r"ranks \[1, 2\] did not start within 0\.3 s"):
        store.choose_interface(where, store.connect(where, 5), None, 0.3)


def test_ranks_of_one_host_choose_loopback() -> None:
    _server, port = store.serve_on_loopback()
    chosen = []

    def choose(rank: int) -> None:
        where = rendezvous(port, rank)
        chosen.append(store.choose_interface(where, store.connect(where, 5), None, 10))

    threads = [threading.Thread(target=choose, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
    assert [each.address for each in chosen] == [LOOPBACK] * 2


def test_an_interface_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"cluster\.interface=eth99: this host has no such interface .* it has .*lo"):
        address.named("eth99")
    assert address.named("lo").address == address.LOOPBACK


def test_a_name_that_does_not_resolve() -> None:
    with pytest.raises(ValueError, match=r"no route to the master at no-such-host\.invalid:1"):
        address.routing_to("no-such-host.invalid", 1)


@pytest.mark.parametrize("wait", ["for the hosts", "for the master"])
def test_giving_up_is_heard(wait: str) -> None:
    _server, port = store.serve_on_loopback()
    where = rendezvous(port, rank=1)
    client = store.connect(where, 5)

    def listen() -> object:
        if wait == "for the master":
            while store.master(client) is None:
                time.sleep(0.01)
        return store.choose_interface(where, client, None, 10)

    with ThreadPoolExecutor(1) as pool:
        listening = pool.submit(listen)
        with pytest.raises(TimeoutError):
            listening.result(0.3)
        store.give_up(where)
        with pytest.raises(ConnectionError, match=r"^rank 0 gave up$"):
            listening.result(5)


def test_who_comes_late_listens_where_the_job_does() -> None:
    _server, port = store.serve_on_loopback()
    master = rendezvous(port)
    client = store.connect(master, 5)
    client.set("host/0", address.network_id())
    store.announce(master, client, "rank0_life", address.loopback())
    late = store.newcomer(f"{LOOPBACK}:{port}", 5)
    assert (late.rank, late.world_size, late.job) == (2, 2, "test")
    assert store.newcomer(f"{LOOPBACK}:{port}", 5).rank == 3, "nobody else gets that rank"
    assert store.choose_interface(late, client, None, 1) == address.loopback()
    client.set("host/0", "another host")
    with pytest.raises(ValueError, match=r"listen on its loopback only; .* start it with cluster\.interface=NAME$"):
        store.choose_interface(late, client, None, 1)
    store.announce(master, client, "rank0_life", address.Interface("eth7", "192.0.2.1"))
    assert store.choose_interface(late, client, None, 1).address == LOOPBACK, "what routes to the store, in this test"
    assert store.choose_interface(late, client, "lo", 1) == address.named("lo")


def test_nobody_joins_what_is_not_there() -> None:
    _server, port = store.serve_on_loopback()
    with pytest.raises(ValueError, match=rf"^cluster\.join={LOOPBACK}:{port}: no job of distllm has come up there"):
        store.newcomer(f"{LOOPBACK}:{port}", 5)
    for wrong in ("somewhere", "host:", ":29500", "host:port"):
        with pytest.raises(ValueError, match=rf"^cluster\.join={wrong}: give HOST:PORT"):
            store.newcomer(wrong, 5)
