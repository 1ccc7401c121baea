"""Named bytes of files, from one rank to others: over HTTP, in chunks with a checksum each, in several streams.

Whoever fetches says what comes next, so neither side holds more than a chunk for each stream besides what is kept.
After a break only the chunks under way are fetched again. Knows no tensors.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any, Self
from urllib.parse import quote, unquote

from distllm.net.address import Interface

logger = logging.getLogger(__name__)

CHUNK_BYTES = 4 * 2**20
CHECKSUM = "X-CRC32"
RANGE = re.compile(r"bytes=(\d{1,18})-(\d{1,18})")
IDLE_S = 60.0
# A connection that brings nothing for so long is taken for broken.
STILL_S = 10.0
# How often a chunk may arrive damaged before it is no accident.
DAMAGED_TRIES = 3
PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class Extent:
    """Where some bytes lie."""

    path: Path
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Offer:
    """Where to fetch what is offered; whoever has no `token` gets nothing."""

    host: str
    port: int
    token: str


class Sender:
    """Serves ranges of files by name, to those who know the token, until it is closed.

    Args:
        interface: whose address to listen on; the port is a free one.
    """

    def __init__(self, interface: Interface, extents: Mapping[str, Extent]) -> None:
        self._server = _Server(interface.address, extents)
        self._thread = threading.Thread(target=self._server.serve_forever, name="distllm-send", daemon=True)
        self._thread.start()

    @property
    def offer(self) -> Offer:
        host, port = self._server.server_address[:2]
        return Offer(str(host), int(port), self._server.token)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: str, extents: Mapping[str, Extent]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.extents = extents
        self.token = secrets.token_urlsafe(32)
        self._open: set[Any] = set()
        super().__init__((address, 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Ends the connections too: their threads wait for the next request."""
        for request in list(self._open):
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        logger.debug("sending to %s broke off", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    disable_nagle_algorithm = True  # a head and few bytes after it would wait for each other's acknowledgement
    server: _Server

    def do_GET(self) -> None:
        given = self.headers.get("Authorization", "").encode(errors="replace")
        if not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            self._refuse(HTTPStatus.FORBIDDEN, "the token is not that of this job")
            return
        extent = self.server.extents.get(unquote(self.path.removeprefix("/")))
        if extent is None:
            self._refuse(HTTPStatus.NOT_FOUND, "rank 0 does not offer it")
            return
        asked = RANGE.fullmatch(self.headers.get("Range", ""))
        first, last = (int(asked[1]), int(asked[2])) if asked else (0, -1)
        if not first <= last < min(extent.nbytes, first + CHUNK_BYTES):
            self._refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "no such range of it, or too long a one")
            return
        try:
            content = _read(extent, first, last + 1 - first)
        except OSError as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"rank 0 cannot read {extent.path}: {error}")
            return
        self.send_response_only(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{extent.nbytes}")
        self.send_header(CHECKSUM, str(zlib.crc32(content)))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        content = reason.encode()
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _read(extent: Extent, offset: int, nbytes: int) -> bytes:
    """
    Raises:
        OSError: the file cannot be read, or ends too early.
    """
    handle = os.open(extent.path, os.O_RDONLY)
    try:
        content = os.pread(handle, nbytes, extent.start + offset)
    finally:
        os.close(handle)
    if len(content) < nbytes:
        raise OSError("it ends too early")
    return content


class Damaged(Exception):
    """A chunk's checksum is not the one that was sent with it."""


class Refused(Exception):
    """The other side answers, but not with what was asked for."""


class Receiver:
    """Fetches what a sender offers.

    Args:
        streams: connections at once.
        patience_s: longest time that a chunk may be tried for after its connection broke.
    """

    def __init__(self, offer: Offer, *, streams: int, patience_s: float) -> None:
        self._offer = offer
        self._patience_s = patience_s
        self._pool = ThreadPoolExecutor(streams, thread_name_prefix="distllm-fetch")
        self._lines = threading.local()
        self._failure: ValueError | None = None

    def fetch(self, name: str, into: memoryview, alive: Callable[[], None]) -> None:
        """Fills a buffer with the bytes of this name; several may be fetched at once.

        Args:
            alive: called whenever a chunk has arrived.

        Raises:
            ValueError: they do not come, or damaged; the sentence says why. After that, everything fails at once.
        """
        waiting = {
            self._pool.submit(self._chunk, name, start, into[start : start + CHUNK_BYTES])
            for start in range(0, len(into), CHUNK_BYTES)
        }
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
            except Refused as error:
                self._failure = ValueError(f"tensor {name} does not come from {self._where}: {error}")
            except Damaged:
                damaged += 1
                logger.warning("a piece of tensor %s arrived damaged and was refused; fetching it again", name)
                if damaged == DAMAGED_TRIES:
                    self._failure = ValueError(
                        f"tensor {name} arrives damaged from {self._where}, {DAMAGED_TRIES} times: its checksum is "
                        "wrong; is the network, or the memory of a host, faulty?"
                    )
            except (OSError, HTTPException) as error:
                if time.monotonic() - began > self._patience_s:
                    self._failure = ValueError(
                        f"tensor {name} does not come from {self._where} for {self._patience_s:g} s: "
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
            self._lines.mine = _Line(self._offer)
        line: _Line = self._lines.mine
        return line

    @property
    def _where(self) -> str:
        return f"rank 0 at {self._offer.host}:{self._offer.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the threads and their connections."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._lines = threading.local()


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

    def __init__(self, offer: Offer) -> None:
        self._http = HTTPConnection(offer.host, offer.port, timeout=STILL_S)
        self._asking = {"Authorization": f"Bearer {offer.token}"}

    def fetch(self, name: str, start: int, into: memoryview) -> None:
        """
        Raises:
            OSError, HTTPException: the connection broke.
            Damaged, Refused: what came is not what was sent, or not what was asked for.
        """
        try:
            wanted = {"Range": f"bytes={start}-{start + len(into) - 1}"}
            self._http.request("GET", f"/{quote(name, safe='')}", headers=self._asking | wanted)
            response = self._http.getresponse()
            if response.status != HTTPStatus.PARTIAL_CONTENT:
                raise Refused(response.read(1000).decode(errors="replace"))
            if response.length != len(into):
                raise ConnectionError(f"{response.length} bytes come where {len(into)} were asked for")
            _fill(into, response)
            if response.headers.get(CHECKSUM) != str(zlib.crc32(into)):
                raise Damaged
        except BaseException:
            self._http.close()
            raise


def _fill(into: memoryview, response: HTTPResponse) -> None:
    """
    Raises:
        ConnectionError: the connection ended before.
    """
    filled = 0
    while filled < len(into):
        count = response.readinto(into[filled:])
        if count == 0:
            raise ConnectionError("the connection was closed in the middle")
        filled += count
