"""Named bytes of files, from one rank to others: over HTTP, in chunks with a checksum each.

Whoever fetches says what comes next, so neither side holds more than a chunk for each stream besides what is kept.
What is sent are tensors; here they are bytes.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
import secrets
import socket
import threading
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any, Self
from urllib.parse import unquote

from distllm.net.address import Interface
from distllm.net.squeeze import squeeze

logger = logging.getLogger(__name__)

CHUNK_BYTES = 4 * 2**20
CHECKSUM = "X-CRC32"
# Of each number, so that its bytes can be put together again.
ITEM_BYTES = "X-Item-Bytes"
ZSTD = "zstd"
RANGE = re.compile(r"bytes=(\d{1,18})-(\d{1,18})")
POLL_S = 0.05
IDLE_S = 60.0
# As long as it takes to send so many bytes, a connection may take no longer than IDLE_S.
WRITE_BYTES = 2**16
# Connections at once, of all ranks together and of whoever else knocks.
MOST_CONNECTIONS = 1024


@dataclass(frozen=True, slots=True)
class Extent:
    """Where some numbers lie, of `item_bytes` each."""

    path: Path
    start: int
    nbytes: int
    item_bytes: int = 1


@dataclass(frozen=True, slots=True)
class Offer:
    """Where to fetch what is offered; whoever has no `token` gets nothing."""

    host: str
    port: int
    token: str = field(repr=False)


class Sender:
    """Serves ranges of files by name, to those who know the token, until it is closed.

    Args:
        interface: whose address to listen on; the port is a free one.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(self, interface: Interface, extents: Mapping[str, Extent]) -> None:
        self._server = _Server(interface.address, extents)
        serve = partial(self._server.serve_forever, poll_interval=POLL_S)
        self._thread = threading.Thread(target=serve, name="distllm-send", daemon=True)
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
    request_queue_size = 128  # all ranks connect at once

    def __init__(self, address: str, extents: Mapping[str, Extent]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.extents = extents
        self.token = secrets.token_urlsafe(32)
        self._open: set[Any] = set()
        super().__init__((address, 0), _Answering)

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002
        return len(self._open) < MOST_CONNECTIONS

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


class _Answering(BaseHTTPRequestHandler):
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
        self.send_header("Content-Range", f"bytes {first}-{last}/{extent.nbytes}")
        self.send_header(CHECKSUM, str(zlib.crc32(content)))
        if self.headers.get("Accept-Encoding") == ZSTD:
            content = squeeze(content, extent.item_bytes)
            self.send_header("Content-Encoding", ZSTD)
            self.send_header(ITEM_BYTES, str(extent.item_bytes))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for start in range(0, len(content), WRITE_BYTES):
            self.wfile.write(content[start : start + WRITE_BYTES])

    def log_message(self, format: str, *args: object) -> None:
        """Not to standard error: anybody can send nonsense to a port."""
        logger.debug(format, *args)

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
