"""Clients that are too slow with what they owe are hung up on, and nobody else. Real sockets, uvicorn's server."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import httpx2
import pytest
from test_gate import app
from waiting import wait_until

from distllm.config import ServeConfig
from distllm.serve import connection, gate
from distllm.serve.front import Listener

WAIT_S = 10.0
LIMIT_S = 0.4
HEAD = b"POST /length HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a server with short limits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "OWED_S", LIMIT_S)
        patch.setattr(gate, "BODY_TIMEOUT_S", LIMIT_S)
        routes = app()

        @routes.get("/slow")
        async def slow() -> str:
            await asyncio.sleep(2 * LIMIT_S)
            return "at last"

        listener = Listener.of(gate.Gate(routes, keys=None, most_bytes=2000), ServeConfig())
        with socket.create_server(("127.0.0.1", 0)) as listening:
            serving = threading.Thread(target=asyncio.run, args=[listener.serve([listening])])
            serving.start()
            wait_until(lambda: listener.started, "it does not start", WAIT_S)
            yield listening.getsockname()[1]
            listener.should_exit = True
            serving.join(WAIT_S)
        assert not serving.is_alive()


@pytest.fixture
def client(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as client:
        yield client


def heard(client: socket.socket, dribble: bytes = b"") -> bytes:
    """All until the server hangs up, while `dribble` is sent again and again."""
    over = threading.Event()

    def send() -> None:
        with suppress(OSError):  # it has been closed
            while dribble and not over.wait(LIMIT_S / 10):
                client.sendall(dribble)

    sending = threading.Thread(target=send)
    sending.start()
    try:
        said = b""
        with suppress(ConnectionResetError):  # what it was sent, it has not read
            while data := client.recv(65536):
                said += data
        return said
    finally:
        over.set()
        sending.join(WAIT_S)


def is_served(port: int) -> bool:
    answer = httpx2.post(f"http://127.0.0.1:{port}/length", content=b"x" * 50, timeout=WAIT_S)
    return bool(answer.json() == 50)


@pytest.mark.parametrize("sent", [b"", HEAD, b"GET /hea"], ids=["nothing", "half a head", "half a line"])
def test_a_head_that_is_not_whole_is_waited_for_only_so_long(port: int, client: socket.socket, sent: bytes) -> None:
    client.sendall(sent)
    assert is_served(port)
    assert heard(client) == b""
    assert is_served(port)


def test_a_head_that_comes_byte_by_byte_is_no_better(client: socket.socket) -> None:
    client.sendall(HEAD)
    assert heard(client, b"x") == b""


def test_nor_is_one_behind_an_answer(client: socket.socket) -> None:
    client.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
    said = b""
    while not said.endswith(b'{"status":"ok"}'):
        data = client.recv(65536)
        assert data, said
        said += data
    client.sendall(HEAD)
    assert heard(client, b"x") == b""


def test_a_body_that_does_not_come_is_refused_and_its_rest_not_waited_for(port: int, client: socket.socket) -> None:
    client.sendall(HEAD + b"\r\nhalf")
    assert is_served(port)
    said = heard(client, b"x")
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"was not whole after" in said


def test_the_rest_of_a_body_that_nobody_reads_is_waited_for_only_so_long(client: socket.socket) -> None:
    client.sendall(HEAD.replace(b"/length", b"/nothing").replace(b"100", b"1000") + b"\r\nhalf")
    assert heard(client, b"x").startswith(b"HTTP/1.1 404 ")


def test_an_answer_may_take_its_time(port: int) -> None:
    assert httpx2.get(f"http://127.0.0.1:{port}/slow", timeout=WAIT_S).json() == "at last"
