"""Who may come in, and how much they may bring: an ASGI layer around the routes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from distllm.serve import page

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

OPEN = ("/health", "/ready", *page.FILES)
SHORTEST_KEY = 16
BODY_TIMEOUT_S = 30.0


class Keys:
    """The API keys of a file: one a line, a name before it if it has one; lines with # are comments.

    Read again when the file changes; as long as the new one cannot be read, the old keys hold.

    Raises:
        ValueError: it cannot be read, or has no keys, or too short ones.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._seen()
        self._digests = _read(path)

    def _seen(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def name(self, key: str) -> str | None:
        """Whose key it is; None if it is nobody's. Takes as long whatever it is."""
        self._refresh()
        digest, found = _digest(key), None
        for known, name in self._digests.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _refresh(self) -> None:
        if (stamp := self._seen()) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._digests = _read(self._path)
            logger.info("%s: read again, %d keys", self._path, len(self._digests))
        except ValueError as error:
            logger.warning("%s; the keys that it had go on to hold", error)


def _read(path: Path) -> Mapping[bytes, str]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"serve.api_keys_file={path}: cannot be read: {error}") from error
    found: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 2 or len(words[-1]) < SHORTEST_KEY:
            rule = f"give [NAME] KEY, the key of {SHORTEST_KEY} characters or more"
            raise ValueError(f"serve.api_keys_file={path}: line {number}: {rule}")
        digest = _digest(words[-1])
        found[digest] = words[0] if len(words) == 2 else f"key {digest.hex()[:12]}"
    if not found:
        raise ValueError(f"serve.api_keys_file={path}: has no keys")
    return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


class Gate:
    """Lets in who has a key, with no more than a request may have; `scope["client_name"]` is who it is.

    Args:
        keys: None lets in everybody, by their addresses.
        most_bytes: of a request's body.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys | None, most_bytes: int) -> None:
        self._app = app
        self._keys = keys
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        client = scope.get("client")
        scope["client_name"] = client[0] if client else "?"
        if self._keys is not None and scope["path"] not in OPEN:
            kind, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            name = self._keys.name(key.strip()) if kind.lower() == "bearer" else None
            if name is None:
                await _refuse(send, 401, "give a valid API key as Authorization: Bearer KEY", "invalid_api_key")
                return
            scope["client_name"] = name
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._most_bytes:
            await _refuse(send, 413, f"a request has at most {self._most_bytes} bytes", "request_too_large")
            return
        await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        """The body, as long as it is not too large and does not take too long."""
        taken, whole, until = 0, False, time.monotonic() + BODY_TIMEOUT_S

        async def take() -> Message:
            nonlocal taken, whole
            if whole:
                return await receive()  # whether the client goes away
            try:
                message = await asyncio.wait_for(receive(), until - time.monotonic())
            except TimeoutError:
                raise HTTPException(408, f"the request was not whole after {BODY_TIMEOUT_S:.0f} s") from None
            taken += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if taken > self._most_bytes:
                raise HTTPException(413, f"a request has at most {self._most_bytes} bytes")
            return message

        return take


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
