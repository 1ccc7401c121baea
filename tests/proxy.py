"""A line between two processes that can break or damage what goes through: real sockets on loopback."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Self

BUFFER = 65536


class Proxy:
    """Passes connections on to a port of loopback, and bytes of both directions.

    `cut_after` breaks a connection off once, when so many bytes have come back over it; `flips` turns a bit of the last
    byte that has come when `flip_after` bytes have come back over a connection, so many times. `passed` counts what has
    come back over all, `cuts` and `flipped` what was done.
    """

    def __init__(self, port: int, *, cut_after: int | None = None, flip_after: int = BUFFER, flips: int = 0) -> None:
        self.passed = self.cuts = self.flipped = 0
        self._target = port
        self._cut_after = cut_after
        self._flip_after = flip_after
        self._flips = flips
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            with self._lock:
                self._open += [near, far]
                self._threads += [
                    threading.Thread(target=self._carry, args=(near, far, False)),
                    threading.Thread(target=self._carry, args=(far, near, True)),
                ]
                for thread in self._threads[-2:]:
                    thread.start()

    def _carry(self, source: socket.socket, target: socket.socket, back: bool) -> None:
        came = 0
        with suppress(OSError):
            while content := source.recv(BUFFER):
                came += len(content)
                target.sendall(self._changed(content, came) if back else content)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _changed(self, content: bytes, came: int) -> bytes:
        """
        Raises:
            ConnectionError: it is to be cut here.
        """
        with self._lock:
            self.passed += len(content)
            if self._cut_after is not None and came > self._cut_after:
                self._cut_after = None
                self.cuts += 1
                raise ConnectionError
            if self.flipped < self._flips and came > self._flip_after:
                self.flipped += 1
                return content[:-1] + bytes([content[-1] ^ 1])
        return content

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join(10)
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join(10)
        for each in self._open:
            each.close()
