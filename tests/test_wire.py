"""Rings of real Gloo sockets, each rank in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import PrefixStore, ProcessGroupGloo

from distllm.net import store
from distllm.net.address import LOOPBACK, loopback
from distllm.net.store import Rendezvous
from distllm.net.wire import Wire, WireBroken, backend_between, call_off

BYTES = 4096


@pytest.fixture
def ring() -> Callable[..., list[Wire]]:
    _server, port = store.serve_on_loopback()

    def form(size: int, epoch: int = 1, deadline_s: float = 5.0, device: str = "cpu") -> list[Wire]:
        def join(position: int) -> Wire:
            where = Rendezvous(rank=position, world_size=size, host=LOOPBACK, port=port, job="test", one_host=True)
            client = store.connect(where, 5)
            return Wire(
                client,
                epoch,
                loopback(),
                position=position,
                devices=[device] * size,
                receive_bytes=BYTES,
                deadline_s=deadline_s,
            )

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(join, range(size)))

    form.server = _server  # type: ignore[attr-defined]
    return form


def frame(number: int, size: int = 64) -> torch.Tensor:
    return torch.full((size,), number, dtype=torch.uint8)


def forward(wire: Wire, count: int) -> None:
    for _ in range(count):
        wire.send(wire.receive()[:64].clone())
    wire.flush()


def test_frames_go_round_in_order(ring: Callable[..., list[Wire]]) -> None:
    wires = ring(3)
    others = [threading.Thread(target=forward, args=(wire, 10)) for wire in wires[1:]]
    for thread in others:
        thread.start()
    home = []
    for number in range(10):
        wires[0].send(frame(number))
        if number >= 2:  # as many in flight as stages
            home.append(int(wires[0].receive()[0]))
    home += [int(wires[0].receive()[0]) for _ in range(2)]
    assert home == list(range(10))
    assert [wires[0].take_sent() for _ in range(2)] == [640, 0]
    for thread in others:
        thread.join(10)
        assert not thread.is_alive()


def test_a_neighbour_that_closes_breaks_the_ring_at_once(ring: Callable[..., list[Wire]]) -> None:
    wires = ring(3, deadline_s=60.0)
    wires[1].close()
    with pytest.raises(WireBroken, match=r"^the stage before has closed its connection$"):
        wires[2].receive()


def test_what_a_neighbour_sent_before_it_closed_comes(ring: Callable[..., list[Wire]]) -> None:
    wires = ring(3, deadline_s=60.0)
    wires[1].send(frame(7))
    wires[1].flush()
    wires[1].close()
    time.sleep(0.3)  # until the end of the connection has come too
    assert int(wires[2].receive()[0]) == 7
    with pytest.raises(WireBroken, match=r"^the stage before has closed its connection$"):
        wires[2].receive()


def test_a_silent_neighbour_breaks_the_ring_at_the_deadline(ring: Callable[..., list[Wire]]) -> None:
    wires = ring(2, deadline_s=1.0)
    began = time.monotonic()
    with pytest.raises(WireBroken, match=r"^the stage before is silent$"):
        wires[0].receive()
    assert time.monotonic() - began >= 0.9


def test_the_next_epoch_forms_after_a_break(ring: Callable[..., list[Wire]]) -> None:
    first = ring(2, epoch=1)
    for wire in first:
        wire.close()
    second = ring(2, epoch=2)
    thread = threading.Thread(target=forward, args=(second[1], 1))
    thread.start()
    second[0].send(frame(9))
    assert int(second[0].receive()[0]) == 9
    thread.join(10)


def test_a_ring_without_all_members_does_not_form(ring: Callable[..., list[Wire]]) -> None:
    del ring
    _server, port = store.serve_on_loopback()
    where = Rendezvous(rank=0, world_size=2, host=LOOPBACK, port=port, job="test", one_host=True)
    with pytest.raises(WireBroken, match="did not form"):
        Wire(
            store.connect(where, 5), 1, loopback(), position=0, devices=["cpu"] * 2, receive_bytes=BYTES, deadline_s=1.0
        )


@pytest.mark.parametrize(
    ("sender", "receiver", "backend"),
    [("cpu", "cpu", "gloo"), ("cuda:0", "cpu", "gloo"), ("cpu", "cuda:1", "gloo"), ("cuda:0", "cuda:1", "nccl")],
)
def test_the_backend_follows_the_devices_of_a_link(sender: str, receiver: str, backend: str) -> None:
    assert backend_between(sender, receiver) == backend


def test_frames_between_gpus_go_through_host_memory_and_that_is_said(
    ring: Callable[..., list[Wire]], caplog: pytest.LogCaptureFixture
) -> None:
    wires = ring(2, device="cuda:0")
    wires[0].send(frame(3))
    assert int(wires[1].receive()[0]) == 3
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"rank at {position} of the ring: frames to the next GPU go through host memory" for position in (0, 1)
    ]


def call_off_while_two_wait(port: int) -> None:
    """For the third of a ring; they are told at once, long before their deadline."""
    where = Rendezvous(rank=0, world_size=3, host=LOOPBACK, port=port, job="test", one_host=True)

    def join(position: int) -> Wire:
        ring = {"position": position, "devices": ["cpu"] * 3, "receive_bytes": BYTES, "deadline_s": 30.0}
        return Wire(store.connect(where, 5), 7, loopback(), **ring)  # type: ignore[arg-type]

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(join, position) for position in (0, 2)]
        with pytest.raises(TimeoutError):
            waiting[0].result(0.5)
        call_off(store.connect(where, 5), 7)
        for each in waiting:
            with pytest.raises(WireBroken, match=r"^the ring was called off$"):
                each.result(10)


def test_a_ring_that_will_not_form_can_be_called_off() -> None:
    _server, port = store.serve_on_loopback()
    call_off_while_two_wait(port)


def test_a_ring_can_be_called_off_when_one_dies_as_soon_as_all_are_there() -> None:
    _server, port = store.serve_on_loopback()
    where = Rendezvous(rank=1, world_size=3, host=LOOPBACK, port=port, job="test", one_host=True)
    dying = PrefixStore("wire/7", store.connect(where, 5))
    dying.set("place/1", "")
    call_off_while_two_wait(port)
    options = ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=10)
    options._devices = [ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    assert ProcessGroupGloo(dying, 1, 3, options).size() == 3, "Gloo has waited for it, and does so no more"
