"""The live page: static files, which tell nothing by themselves. What they show they ask the server for, with a key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.responses import Response

SCRIPTS = ("page.js", "api.js", "ring.js", "rates.js", "chat.js")
FILES = {
    "/": ("index.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
    **{f"/page/{name}": (name, "text/javascript") for name in SCRIPTS},
}
"""The files and their types, by path."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_to(app: FastAPI) -> None:
    """Routes of the files, which are read once."""
    for path, (name, kind) in FILES.items():
        app.get(path, include_in_schema=False)(_giving(files(__name__).joinpath(name).read_bytes(), kind))


def _giving(body: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def give(_: Request) -> Response:
        return Response(body, media_type=kind, headers=HEADERS)

    return give
