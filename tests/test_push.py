"""Bytes from one process to another: whole, by whoever may, over lines that break and damage."""

from __future__ import annotations

import http.client
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from proxy import Proxy

from distllm.net.address import loopback
from distllm.net.fetch import Receiver
from distllm.net.push import CHUNK_BYTES, Extent, Offer, Sender

NBYTES = 5 * CHUNK_BYTES + 17
START = 11


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "content"
    path.write_bytes(os.urandom(START + NBYTES + 5))
    return path


@pytest.fixture
def sender(file: Path) -> Iterator[Sender]:
    extents = {"a/b c?": Extent(file, START, NBYTES), "small": Extent(file, 3, 2), "cut": Extent(file, 30, NBYTES)}
    with Sender(loopback(), extents) as serving:
        yield serving


def fetched(
    offer: Offer, name: str, nbytes: int, *, streams: int = 3, patience_s: float = 5.0, compressed: bool = False
) -> bytes:
    content = bytearray(nbytes)
    with Receiver(offer, streams=streams, patience_s=patience_s, compressed=compressed) as receiver:
        receiver.fetch(name, memoryview(content), lambda: None)
    return bytes(content)


def through(proxy: Proxy, sender: Sender) -> Offer:
    return replace(sender.offer, port=proxy.port)


def test_all_bytes_come_and_no_others(sender: Sender, file: Path) -> None:
    content = file.read_bytes()
    assert fetched(sender.offer, "a/b c?", NBYTES) == content[START : START + NBYTES]
    assert fetched(sender.offer, "small", 2) == content[3:5]


def test_it_is_heard_of_every_chunk(sender: Sender) -> None:
    heard: list[None] = []
    with Receiver(sender.offer, streams=2, patience_s=5.0) as receiver:
        receiver.fetch("a/b c?", memoryview(bytearray(NBYTES)), lambda: heard.append(None))
    assert len(heard) == 6


def test_several_fetch_at_once_with_one_receiver(sender: Sender, file: Path) -> None:
    contents = [bytearray(NBYTES) for _ in range(4)]
    with Receiver(sender.offer, streams=2, patience_s=5.0) as receiver:
        threads = [
            threading.Thread(target=receiver.fetch, args=("a/b c?", memoryview(content), lambda: None))
            for content in contents
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert {bytes(content) for content in contents} == {file.read_bytes()[START : START + NBYTES]}


@pytest.mark.parametrize("cut_after", [10, CHUNK_BYTES // 2])
def test_a_break_costs_no_more_than_the_chunks_under_way(sender: Sender, file: Path, cut_after: int) -> None:
    with Proxy(sender.offer.port, cut_after=cut_after) as proxy:
        content = fetched(through(proxy, sender), "a/b c?", NBYTES, streams=1)
    assert proxy.cuts == 1
    assert content == file.read_bytes()[START : START + NBYTES]
    assert NBYTES < proxy.passed < NBYTES + cut_after + 2**20, "it began anew"


def test_a_flipped_bit_is_refused_and_fetched_again(
    sender: Sender, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Proxy(sender.offer.port, flips=1) as proxy:
        content = fetched(through(proxy, sender), "a/b c?", NBYTES)
    assert proxy.flipped == 1
    assert content == file.read_bytes()[START : START + NBYTES]
    assert "a piece of tensor a/b c? arrived damaged and was refused" in caplog.text


def test_a_line_that_damages_everything_is_given_up(sender: Sender) -> None:
    with (
        Proxy(sender.offer.port, flips=10**9) as proxy,
        pytest.raises(ValueError, match=r"^tensor a/b c\? arrives damaged from rank 0 at 127\.0\.0\.1:\d+, 3 times: "),
    ):
        fetched(through(proxy, sender), "a/b c?", NBYTES)
    assert proxy.flipped >= 3


def test_nobody_there(sender: Sender) -> None:
    with Proxy(sender.offer.port) as proxy:
        offer = through(proxy, sender)
    with pytest.raises(ValueError, match=r"^tensor small does not come from rank 0 at .* for 0\.[5-9] s: .*refused"):
        fetched(offer, "small", 2, patience_s=0.5)


def test_whoever_still_fetches_fails_when_it_is_given_up(sender: Sender) -> None:
    """A loader may have threads of its own, which are still at it when another one has failed."""
    failures: list[Exception] = []

    def fetch_on(receiver: Receiver) -> None:
        try:
            while True:
                receiver.fetch("a/b c?", memoryview(bytearray(NBYTES)), lambda: None)
        except ValueError as error:
            failures.append(error)

    with Receiver(sender.offer, streams=1, patience_s=5.0) as receiver:
        threads = [threading.Thread(target=fetch_on, args=(receiver,)) for _ in range(3)]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join(20)
    assert [str(failure) for failure in failures] == ["loading was given up"] * 3


def test_after_a_failure_everything_fails_at_once(sender: Sender) -> None:
    with Receiver(sender.offer, streams=1, patience_s=600.0) as receiver:
        with pytest.raises(
            ValueError, match=r"^tensor none does not come from rank 0 at .*: rank 0 does not offer it$"
        ):
            receiver.fetch("none", memoryview(bytearray(2)), lambda: None)
        with pytest.raises(ValueError, match=r"^tensor none "):
            receiver.fetch("small", memoryview(bytearray(2)), lambda: None)


@pytest.mark.parametrize("item_bytes", [1, 2, 8])
def test_compressed_bytes_are_the_same(tmp_path: Path, item_bytes: int) -> None:
    """Weights take less room on the way; the checksum is that of what is unpacked."""
    content = torch.randn(3_000_000).bfloat16().view(torch.uint8).numpy().tobytes()[:5_000_008]
    (tmp_path / "weights").write_bytes(content)
    extents = {"weights": Extent(tmp_path / "weights", 0, len(content), item_bytes)}
    with Sender(loopback(), extents) as sender, Proxy(sender.offer.port) as proxy:
        assert fetched(through(proxy, sender), "weights", len(content), compressed=True) == content
        assert len(content) * 0.5 < proxy.passed < len(content) * (0.8 if item_bytes == 2 else 1.01)


def test_a_flipped_bit_in_compressed_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = torch.randn(1_000_000).bfloat16().view(torch.uint8).numpy().tobytes()
    (tmp_path / "weights").write_bytes(content)
    extents = {"weights": Extent(tmp_path / "weights", 0, len(content), 2)}
    with Sender(loopback(), extents) as sender, Proxy(sender.offer.port, flips=1) as proxy:
        assert fetched(through(proxy, sender), "weights", len(content), compressed=True) == content
        assert proxy.flipped == 1
    assert caplog.text.count("arrived damaged and was refused") == 1


def test_without_the_library(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"^weights\.compression=zstd needs zstandard: pip install 'distllm\[zstd\]'$"):
        fetched(sender.offer, "small", 2, compressed=True)


def test_a_file_that_is_cut_short_meanwhile(sender: Sender, file: Path) -> None:
    with pytest.raises(ValueError, match=f"rank 0 cannot read {file}: it ends too early$"):
        fetched(sender.offer, "cut", NBYTES)


def test_without_the_token_there_is_nothing(sender: Sender) -> None:
    with pytest.raises(ValueError, match="the token is not that of this job"):
        fetched(replace(sender.offer, token="guessed"), "small", 2)


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ("bytes=0-1", 206),
        ("bytes=0-2", 416),
        ("bytes=1-0", 416),
        ("bytes=-2", 416),
        ("bytes=0-", 416),
        ("bytes=0-1,1-1", 416),
        ("bytes=0-999999999999999999999999", 416),
        ("", 416),
    ],
)
def test_ranges(sender: Sender, asked: str, status: int) -> None:
    """Whatever somebody with the token asks, it is bytes that are offered, and few at a time."""
    line = http.client.HTTPConnection(sender.offer.host, sender.offer.port, timeout=10)
    line.request("GET", "/small", headers={"Range": asked, "Authorization": f"Bearer {sender.offer.token}"})
    response = line.getresponse()
    assert response.status == status
    response.read()
    line.request("GET", "/../small", headers={"Authorization": f"Bearer {sender.offer.token}"})
    assert line.getresponse().status == 404
    line.close()


def test_it_listens_on_loopback_only_and_leaves_nothing(file: Path) -> None:
    before = threading.active_count()
    with Sender(loopback(), {"small": Extent(file, 3, 2)}) as sender:
        assert sender.offer.host == "127.0.0.1"
        assert fetched(sender.offer, "small", 2) == file.read_bytes()[3:5]
        idle = http.client.HTTPConnection(sender.offer.host, sender.offer.port, timeout=10)
        idle.connect()
    with suppress(ConnectionResetError):
        assert idle.sock.recv(1) == b"", "an idle connection stays open"
    idle.close()
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection(sender.offer.host, sender.offer.port, timeout=10).connect()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and "process_request" in thread.name:
            thread.join(10)
    assert threading.active_count() == before
