"""The HTTP front: listens, answers, and outlives rank 0, which is a process of its own behind it."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import os
import signal
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from distllm.config import Config, ServeConfig
from distllm.plan.partition import counted
from distllm.serve.access import Access
from distllm.serve.app import Server, make_app, paths
from distllm.serve.connection import Connection
from distllm.serve.exchange import Exchanges
from distllm.serve.gate import Gate, Keys
from distllm.serve.ledger import Ledger

if TYPE_CHECKING:
    from starlette.types import ASGIApp

logger = logging.getLogger(__name__)

BACKLOG = 1024
USAGE_ERROR = 2  # of a rank 0 that has found something that will not do


class Listener(uvicorn.Server):
    """uvicorn, which leaves signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @classmethod
    def of(cls, app: ASGIApp, serve: ServeConfig) -> Listener:
        return cls(
            uvicorn.Config(
                app,
                http=Connection,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # who asks is who is connected
                lifespan="off",
                timeout_graceful_shutdown=math.ceil(serve.drain_s),
                ssl_certfile=serve.tls_cert,
                ssl_keyfile=serve.tls_key,
            )
        )


def serve(config: Config, words: Sequence[str]) -> tuple[int, bool]:
    """Serves until a signal says that it is enough.

    Returns:
        The exit code, and whether rank 0 has told the other ranks how the job ends.

    Args:
        words: the command line, for rank 0.

    Raises:
        ValueError: nothing can or may listen there, or a file cannot be used.
    """
    serve = config.serve
    keys = None if serve.api_keys_file is None else Keys(Path(serve.api_keys_file).expanduser())
    _check_certificate(serve)
    listening = _listen(serve.host, serve.port)
    host, port = listening.getsockname()[:2]
    if keys is None and not serve.insecure and not ipaddress.ip_address(host).is_loopback:
        raise ValueError(
            f"serve.host={serve.host}: everybody who reaches it could use the model; give serve.api_keys_file=FILE, or "
            "serve.insecure=true if that is wanted"
        )
    ledger = _journal(config, port)
    where = f"[{host}]" if ":" in host else host
    logger.info("listening on %s://%s:%d", "http" if serve.tls_cert is None else "https", where, port)
    return asyncio.run(_serve(config, listening, words, ledger, keys))


async def _serve(
    config: Config, listening: socket.socket, words: Sequence[str], ledger: Ledger, keys: Keys | None
) -> tuple[int, bool]:
    serve = config.serve
    exchanges = Exchanges(
        ledger,
        words,
        most_calls=serve.max_queue,
        resume_s=serve.resume_s,
        timeout_s=serve.request_timeout_s,
        stands_by=serve.standby,
    )
    routes = make_app(Server(exchanges, model=_name(config)))
    gate = Gate(routes, keys=keys, most_bytes=serve.max_body_bytes)
    listener = Listener.of(Access(gate, exchanges.metrics, paths(routes)), serve)

    def end() -> None:
        left = counted(exchanges.count, "unanswered request")
        logger.info("ending with %s, which may take %g s", left, serve.drain_s)
        exchanges.end()
        listener.should_exit = True

    loop = asyncio.get_running_loop()
    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, end)
    exchanges.rank0.events.add("started", f"the server has started, as pid {os.getpid()}")
    exchanges.resume()
    forgetting = asyncio.create_task(exchanges.forget())
    running = asyncio.create_task(exchanges.rank0.run())
    running.add_done_callback(lambda _: setattr(listener, "should_exit", True))
    await listener.serve([listening])
    forgetting.cancel()
    await exchanges.close()
    await exchanges.rank0.stop()
    code = await running
    return code, exchanges.rank0.told or code == USAGE_ERROR


def _check_certificate(serve: ServeConfig) -> None:
    """
    Raises:
        ValueError: the files of TLS are not there, or do not belong together.
    """
    if serve.tls_key is not None and serve.tls_cert is None:
        raise ValueError("serve.tls_key is given: give serve.tls_cert too")
    if serve.tls_cert is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(serve.tls_cert, serve.tls_key)
        except OSError as error:
            files = f"serve.tls_cert={serve.tls_cert}, serve.tls_key={serve.tls_key}"
            raise ValueError(f"{files}: cannot be used: {error.strerror or error}") from error


def _name(config: Config) -> str:
    return config.model.name or config.model.path or config.model.hub or "model"


def _journal(config: Config, port: int) -> Ledger:
    """
    Raises:
        ValueError: there is no journal to be had.
    """
    serve, model = config.serve, config.model
    if serve.journal is None:
        home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        path = Path(home, "distllm", f"serve-{port}.journal")
    else:
        path = Path(serve.journal).expanduser()
    try:
        if serve.journal is None:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)  # it has what people say
    except OSError as error:
        raise ValueError(f"serve.journal={path}: cannot be written: {error.strerror}") from error
    where = model.path or model.hub or model.package
    about = f"{where} {model.revision or ''} {model.dtype} {config.quantization}"
    return Ledger(path, model=about, keep_s=serve.keep_s, redact=serve.redact)


def _listen(host: str, port: int) -> socket.socket:
    """
    Raises:
        ValueError: the port is taken, or the address is not one of this host.
    """
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(where[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ValueError(f"serve.host={host}, serve.port={port}: cannot listen there: {reason}") from error
