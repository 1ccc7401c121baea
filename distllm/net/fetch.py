"""The other end of `push`: bytes by name from a sender, in several streams, each chunk held against its checksum.

After a break only the chunks under way are fetched again. What is fetched are tensors; here they are bytes.
"""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse
from math import inf
from typing import Self
from urllib.parse import quote

from distllm.net.push import CHECKSUM, CHUNK_BYTES, ITEM_BYTES, ZSTD, Offer
from distllm.net.squeeze import Unreadable, library, unsqueeze

logger = logging.getLogger(__name__)

# A connection that brings nothing for so long is taken for broken.
STILL_S = 10.0
# How often a chunk may arrive damaged before it is no accident.
DAMAGED_TRIES = 3
PAUSE_S = 0.2
# Whoever refuses connections for so long has ended, or has given the job up.
REFUSED_S = 3.0
GIVEN_UP = "loading was given up"


class _Damaged(Exception):
    """A chunk's checksum is not the one that was sent with it."""


class _Refused(Exception):
    """The other side answers, but not with what was asked for."""


class Receiver:
    """Fetches what a sender offers.

    Args:
        streams: connections at once.
        patience_s: longest time without a byte, after a connection broke.
        compressed: whether bytes should be made fewer on the way.

    Raises:
        ValueError: the library for that is not installed.
    """

    def __init__(self, offer: Offer, *, streams: int, patience_s: float, compressed: bool = False) -> None:
        if compressed:
            library()
        self._offer = offer
        self._encoding = ZSTD if compressed else "identity"
        self._patience_s = patience_s
        self._pool = ThreadPoolExecutor(streams, thread_name_prefix="distllm-fetch")
        self._lines = threading.local()
        self._all_lines: list[_Line] = []
        self._heard = time.monotonic()
        self._failure: ValueError | None = None

    def fetch(self, name: str, into: memoryview, alive: Callable[[], None]) -> None:
        """Fills a buffer with the bytes of this name; several may be fetched at once.

        Args:
            alive: called whenever a chunk has arrived.

        Raises:
            ValueError: they do not come, or damaged; the sentence says why. After that, everything fails at once.
        """
        try:
            waiting = {
                self._pool.submit(self._chunk, name, start, into[start : start + CHUNK_BYTES])
                for start in range(0, len(into), CHUNK_BYTES)
            }
        except RuntimeError as error:  # the pool takes nothing more
            raise ValueError(GIVEN_UP) from error
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for chunk in done:
                _result(chunk, waiting)
                alive()

    def _chunk(self, name: str, start: int, into: memoryview) -> None:
        """One chunk, as often as it takes."""
        began, damaged = time.monotonic(), 0
        while self._failure is None:
            try:
                self._line.fetch(name, start, into)
                return
            except _Refused as error:
                self._failure = ValueError(f"tensor {name} does not come from {self._where}: {error}")
            except _Damaged:
                damaged += 1
                logger.warning("a piece of tensor %s arrived damaged and was refused; fetching it again", name)
                if damaged == DAMAGED_TRIES:
                    self._failure = ValueError(
                        f"tensor {name} arrives damaged from {self._where}, {DAMAGED_TRIES} times: its checksum is "
                        "wrong; is the network, or the memory of a host, faulty?"
                    )
            except (OSError, HTTPException) as error:
                silent_s = time.monotonic() - max(began, self._heard)
                if silent_s > min(self._patience_s, REFUSED_S if isinstance(error, ConnectionRefusedError) else inf):
                    self._failure = ValueError(
                        f"tensor {name} does not come from {self._where}, and nothing else for {silent_s:.1f} s: "
                        f"{error or type(error).__name__}; is there a firewall between the hosts?"
                    )
                logger.debug("fetching %s broke off: %r", name, error)
                time.sleep(PAUSE_S)
        assert self._failure is not None
        raise self._failure

    @property
    def _line(self) -> _Line:
        """The connection of this thread."""
        if not hasattr(self._lines, "mine"):
            self._lines.mine = _Line(self._offer, self._encoding, self._hear)
            self._all_lines.append(self._lines.mine)
        line: _Line = self._lines.mine
        return line

    def _hear(self) -> None:
        self._heard = time.monotonic()

    @property
    def _where(self) -> str:
        return f"rank 0 at {self._offer.host}:{self._offer.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the threads and their connections; whoever still fetches fails."""
        self._failure = self._failure or ValueError(GIVEN_UP)
        self._pool.shutdown(wait=True)
        for line in self._all_lines:
            line.close()


def _result(chunk: Future[None], others: set[Future[None]]) -> None:
    """Raises what a chunk raised, once the buffer is nobody's to write to any more."""
    error = chunk.exception()
    if error is not None:
        for other in others:
            other.cancel()
        wait(others)
        raise error


class _Line:
    """A connection that is made when it is needed, and anew after it broke."""

    def __init__(self, offer: Offer, encoding: str, heard: Callable[[], None]) -> None:
        self._heard = heard
        self._http = HTTPConnection(offer.host, offer.port, timeout=STILL_S)
        self._asking = {"Authorization": f"Bearer {offer.token}", "Accept-Encoding": encoding}

    def fetch(self, name: str, start: int, into: memoryview) -> None:
        """
        Raises:
            OSError, HTTPException: the connection broke.
            _Damaged, _Refused: what came is not what was sent, or not what was asked for.
        """
        fetched = False
        try:
            wanted = {"Range": f"bytes={start}-{start + len(into) - 1}"}
            self._http.request("GET", f"/{quote(name, safe='')}", headers=self._asking | wanted)
            response = self._http.getresponse()
            if response.status != HTTPStatus.PARTIAL_CONTENT:
                raise _Refused(response.read(1000).decode(errors="replace"))
            self._take(into, response)
            if response.headers.get(CHECKSUM) != str(zlib.crc32(into)):
                raise _Damaged
            fetched = True
        finally:
            if not fetched:
                self.close()

    def _take(self, into: memoryview, response: HTTPResponse) -> None:
        """What was sent for a buffer, as it is or made fewer.

        Raises:
            ConnectionError: less or more comes than should.
            _Damaged: it cannot be what was sent.
        """
        coming = response.length or 0
        if response.headers.get("Content-Encoding") != ZSTD:
            if coming != len(into):
                raise ConnectionError(f"{coming} bytes come where {len(into)} were asked for")
            self._fill(into, response)
            return
        item_bytes = response.headers.get(ITEM_BYTES, "")
        if coming > len(into) + CHUNK_BYTES or item_bytes not in ("1", "2", "4", "8"):
            raise ConnectionError(f"{coming} bytes come, of numbers of {item_bytes} bytes")
        squeezed = bytearray(coming)
        self._fill(memoryview(squeezed), response)
        try:
            unsqueeze(bytes(squeezed), int(item_bytes), into)
        except Unreadable as error:
            raise _Damaged from error

    def _fill(self, into: memoryview, response: HTTPResponse) -> None:
        """
        Raises:
            ConnectionError: the connection ended before.
        """
        filled = 0
        while filled < len(into):
            count = response.readinto(into[filled:])
            if count == 0:
                raise ConnectionError("the connection was closed in the middle")
            self._heard()
            filled += count

    def close(self) -> None:
        self._http.close()
