"""A server of real ranks, started and ended by tests."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
from conftest import free_port
from processes import child, children
from waiting import wait_until


class Served:
    """A server of three ranks of this host, and a client of it."""

    def __init__(self, model: Path, folder: Path, *words: str) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=90)
        self._command = [sys.executable, "-m", "distllm.run", "task=serve", f"serve.port={port}", "cluster.workers=3"]
        self._command += ["model.dtype=float32", f"model.path={model}", "model.name=little"]
        self._command += [f"serve.journal={folder / 'journal'}", *words]
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """The front, when it is ready."""
        with (self.folder / "err.txt").open("a") as err:
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stderr=err, cwd=self.folder)
        wait_until(lambda: self.is_ready() or self.process.poll() is not None, self.errors)
        assert self.process.poll() is None, self.errors()
        return self.process

    def errors(self) -> str:
        return (self.folder / "err.txt").read_text()

    def is_ready(self) -> bool:
        with suppress(httpx2.TransportError):
            return httpx2.get(f"{self.url}/ready").status_code == 200
        return False

    def cluster(self) -> dict[str, Any]:
        return dict(httpx2.get(f"{self.url}/v1/cluster").json())

    def rank0(self) -> psutil.Process:
        return child(psutil.Process(self.process.pid), "distllm.serve")

    def workers(self) -> list[psutil.Process]:
        return children(self.rank0(), "distllm.engine")

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)
