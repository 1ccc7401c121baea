"""A stand-in for the Hugging Face Hub: real HTTP on loopback, for its own client; counts what it serves to whom."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves one folder as the repository `someone/model`; the first part of a path tells who asks.

    `bytes_of` counts bytes of safetensors files by (who, file), `cut_after` breaks one download off after so many.
    """

    repository = "someone/model"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_of: Counter[tuple[str, str]] = Counter()
        self.ranges: list[str] = []
        self.cut_after: int | None = None
        self.gated = False
        self.lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    def endpoint(self, who: str) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/{who}"

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        who, _, path = unquote(urlsplit(request.path).path).lstrip("/").partition("/")
        if self.gated:
            self._error(request, 403, "GatedRepo")
        elif path == f"api/models/{self.repository}/revision/main" or path.endswith(f"/revision/{COMMIT}"):
            self._json(request, {"id": self.repository, "sha": COMMIT, "siblings": self._siblings()})
        elif path.startswith(f"api/models/{self.repository}/tree/"):
            self._json(request, self._tree())
        elif path.startswith(f"{self.repository}/resolve/"):
            self._file(request, who, path.split("/", 4)[4], body)
        elif path.startswith(f"api/models/{self.repository}"):
            self._error(request, 404, "RevisionNotFound")
        else:
            self._error(request, 404, "RepoNotFound")

    def _siblings(self) -> list[dict[str, str]]:
        return [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]

    def _tree(self) -> list[dict[str, object]]:
        files = sorted(self.folder.iterdir())
        return [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)} for f in files]

    def _file(self, request: BaseHTTPRequestHandler, who: str, name: str, body: bool) -> None:
        file = self.folder / name
        if not file.exists():
            self._error(request, 404, "EntryNotFound")
            return
        total = file.stat().st_size
        wanted = request.headers.get("Range")
        first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        with file.open("rb") as opened:
            opened.seek(int(first))
            content = opened.read(int(last) + 1 - int(first) if last else -1)
        request.send_response(206 if wanted else 200)
        request.send_header("Content-Length", str(len(content)))
        request.send_header("ETag", f'"{_etag(file)}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Accept-Ranges", "bytes")
        if wanted:
            request.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{total}")
        request.end_headers()
        if not body:
            return
        with self.lock:
            if file.suffix == ".safetensors":
                self.ranges.append(wanted or "bytes=0-")
            if self.cut_after is not None and file.suffix == ".safetensors" and len(content) > self.cut_after:
                content, self.cut_after = content[: self.cut_after], None
                request.close_connection = True
            if file.suffix == ".safetensors":
                self.bytes_of[who, name] += len(content)
        request.wfile.write(content)

    def _json(self, request: BaseHTTPRequestHandler, value: object) -> None:
        content = json.dumps(value).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def _error(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()


def _etag(file: Path) -> str:
    return _sha256(file, file.stat().st_mtime_ns)


@functools.cache
def _sha256(file: Path, _changed: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def fake_hub(folder: Path) -> Iterator[FakeHub]:
    hub = FakeHub(folder)
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join(10)
