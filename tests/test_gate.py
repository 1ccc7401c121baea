"""Who is let in, with how much, and which addresses the server refuses to listen on."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI, Request

from distllm.serve import page
from distllm.serve.app import Server, make_app
from distllm.serve.gate import Gate, Keys

FIRST, SECOND = "first-key-0123456789", "second-key-0123456789"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n\nann {FIRST}  # her laptop\n{SECOND}\n")
    return path


def asked(gate: Gate, **words: object) -> httpx2.Response:
    async def ask() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(gate), base_url="http://here") as client:
            return await client.request(**({"method": "GET", "url": "/who"} | words))  # type: ignore[arg-type]

    return asyncio.run(ask())


def app() -> FastAPI:
    """The routes without a server behind them, and one that tells who is asking."""
    routes = make_app(Server(None, model="m"))  # type: ignore[arg-type]

    @routes.get("/who")
    async def who(request: Request) -> str:
        return str(request.scope["client_name"])

    @routes.post("/length")
    async def length(request: Request) -> int:
        return len(await request.body())

    return routes


def gate(keys: Keys | None = None) -> Gate:
    return Gate(app(), keys=keys, most_bytes=2000)


def test_everybody_is_let_in_by_address_without_keys() -> None:
    assert asked(gate()).json() == "127.0.0.1"


@pytest.mark.parametrize(
    "given",
    ["", "Bearer", "Bearer wrong", f"Basic {FIRST}", f"Bearer {FIRST}x", f"Bearer {FIRST[:-1]}", "Bearer \xff", FIRST],
)
def test_who_has_no_key_is_refused(path: Path, given: str) -> None:
    for url in ("/who", "/v1/models", "/v1/cluster", "/metrics", "/docs", "/nothing"):
        answer = asked(gate(Keys(path)), url=url, headers={"Authorization": given.encode("latin-1")})
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_who_has_one_is_known_by_its_name(path: Path) -> None:
    inside = gate(Keys(path))
    assert asked(inside, headers={"Authorization": f"Bearer {FIRST}"}).json() == "ann"
    unnamed = "key " + hashlib.sha256(SECOND.encode()).hexdigest()[:12]
    assert asked(inside, headers={"Authorization": f"bearer {SECOND}"}).json() == unnamed
    assert asked(inside, url="/health").status_code == 200, "whether it lives is no secret"


def test_the_page_is_open_and_may_load_nothing_from_elsewhere(path: Path) -> None:
    for url, (_, kind) in page.FILES.items():
        answer = asked(gate(Keys(path)), url=url)
        assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, kind)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';")
        assert not {"'unsafe-inline'", "'unsafe-eval'", "*", "https:"} & set(policy.replace(";", "").split())
        assert not re.search(rb"""(src|href|url|import|fetch)\W{1,3}(https?:)?//""", answer.content)
    for url in ("/page/", "/page/__init__.py", "/page/index.html"):
        assert asked(gate(Keys(path)), url=url).status_code == 401


def test_keys_are_read_again_when_their_file_changes(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = Keys(path)
    path.write_text(f"bob {SECOND}\n")
    assert (keys.name(FIRST), keys.name(SECOND)) == (None, "bob")
    path.write_text("short\n")
    assert keys.name(SECOND) == "bob", "a mistake locks nobody out"
    assert "line 1: give [NAME] KEY" in caplog.text
    path.unlink()
    assert keys.name(SECOND) == "bob"


@pytest.mark.parametrize(
    ("text", "why"),
    [("# none\n", "has no keys"), ("x y z\n", "line 1"), ("\nann short\n", "line 2"), (None, "cannot be read")],
)
def test_files_without_good_keys_are_refused(tmp_path: Path, text: str | None, why: str) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=why):
        Keys(path)


def test_bodies_have_an_end() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b"x" * 100

    assert asked(gate(), method="POST", url="/length", content=b"x" * 2000).json() == 2000
    for content in (b"x" * 2001, chunks()):
        answer = asked(gate(), method="POST", url="/length", content=content)
        assert answer.status_code == 413
        assert "at most 2000 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["serve.host=0.0.0.0"], "everybody who reaches it could use the model"),
        (["serve.host=::"], "everybody who reaches it could use the model"),
        (["serve.host=203.0.113.7"], "cannot listen there"),
        (["serve.api_keys_file=nothing"], "serve.api_keys_file=nothing: cannot be read"),
        (["serve.tls_cert=nothing"], "serve.tls_cert=nothing"),
        (["serve.tls_key=nothing"], "give serve.tls_cert too"),
        (["serve.journal=nothing/journal"], "nothing/journal"),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_what_the_server_will_not_start_with(tmp_path: Path, words: list[str], why: str) -> None:
    command = [sys.executable, "-m", "distllm.run", "task=serve", "serve.port=0", *words]
    environ = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environ, check=False)
    assert done.returncode == 2
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
