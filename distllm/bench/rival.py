"""Somebody else's engine in processes of its own, spoken to by JSON lines over pipes.

It idles while it waits for a line, and ends when its standard input closes. Every wait for it has a deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from distllm.bench.engines import Prompts, checked
from distllm.bench.figures import Batch
from distllm.config import PLAIN_RIVAL, SPLIT_RIVAL, WHOLE_RIVAL
from distllm.core import EngineError
from distllm.net import address

LISTEN_S = 0.2
END_TIMEOUT_S = 10.0
SHOWN_LINES = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What all engines of a benchmark have in common; `sections` are distllm's other options, for its plain self."""

    folder: Path
    dtype: str
    ranks: int
    deadline_s: float
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Rival:
    """One rival, from start to end; as a context it ends in any case.

    Args:
        environ: variables besides this process's own.
        deadline_s: the longest wait for it to load, or to answer a batch.
    """

    def __init__(self, name: str, command: Sequence[str], environ: Mapping[str, str], deadline_s: float) -> None:
        self.name = name
        self._deadline_s = deadline_s
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the rival
        # A session of its own: Ctrl-C is this process's to answer, which then closes the pipe.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=dict(os.environ) | dict(environ),
            text=True,
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"bench-{name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def wait_ready(self) -> dict[str, Any]:
        """Waits until the rival has loaded its model; returns what it says of that.

        Raises:
            EngineError: it ended, failed, or took too long.
        """
        return self._answer("load its model")

    def run(self, prompts: Prompts, new_tokens: int) -> Batch:
        """Answers all prompts at once; the seconds are by the rival's own clock, without the way through the pipes.

        Raises:
            EngineError: it ended, failed, or took too long.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a rival that is gone says why when its answer is waited for
            self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
            self._process.stdin.flush()
        answer = self._answer("answer a batch")
        batch = Batch(tokens=tuple(map(tuple, answer["tokens"])), seconds=answer["seconds"])
        return checked(batch, self.name, requests=len(prompts), new_tokens=new_tokens)

    def _answer(self, task: str) -> dict[str, Any]:
        line = self._next_line(task)
        if line is None:
            self._lines.put(None)  # whoever asks again is told again
            raise EngineError(self._death())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name} failed: {answer['error']}")
        return answer

    def _next_line(self, task: str) -> str | None:
        deadline = time.monotonic() + self._deadline_s
        while time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                return self._lines.get(timeout=LISTEN_S)
        raise EngineError(f"{self.name} did not {task} within {self._deadline_s:g} s; bench.deadline_s gives it longer")

    def _death(self) -> str:
        """How it ended, with the last of what it said."""
        code = self._wait(END_TIMEOUT_S)
        if code is None:
            ended = "closed its pipe"
        else:
            ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().splitlines()[-SHOWN_LINES:]
        return "\n".join([f"{self.name} {ended}" + (", after saying:" if said else ""), *said])

    def _wait(self, timeout_s: float) -> int | None:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """Closes its pipe and waits for it to end; kills what does not."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            ended = self._wait(END_TIMEOUT_S) is not None
        except BaseException:
            self._kill()
            raise
        if not ended:
            self._kill()
        self._reader.join(END_TIMEOUT_S)
        self._stderr.close()

    def _kill(self) -> None:
        """Kills it and all its children; each has a session of its own, so that no group has them all."""
        try:
            family = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self._process.kill()
        self._wait(END_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _transformers(match: Match) -> Rival:
    """transformers' `generate`, in one process with as many threads as there are ranks."""
    return _generate(WHOLE_RIVAL, [sys.executable], match, [f"--threads={match.ranks}"])


def _transformers_pp(match: Match) -> Rival:
    """transformers' own pipeline parallel, under torchrun, one thread a rank."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={match.ranks}"]
    launcher += [f"--master-addr={address.LOOPBACK}", f"--master-port={_free_port()}"]
    return _generate(SPLIT_RIVAL, launcher, match, ["--threads=1", "--pipeline"])


def _plain(match: Match) -> Rival:
    """distllm without quantization, on as many ranks."""
    command = [sys.executable, "-m", "distllm.bench.rivals.plain", f"--ranks={match.ranks}"]
    command += [f"--sections={json.dumps(match.sections)}"]
    return _run(PLAIN_RIVAL, command, match)


def loader(name: str, how: str, match: Match) -> Rival:
    """A process that loads the model once and tells what that took.

    Args:
        how: packed or in-place, by distllm, or transformers.
    """
    # transformers' loader, which distllm uses too, has threads of its own unless it is told otherwise.
    command = ["env", "HF_DEACTIVATE_ASYNC_LOAD=1", sys.executable, "-m", "distllm.bench.rivals.load"]
    return _run(name, [*command, f"--how={how}"], match)


def _generate(name: str, launcher: Sequence[str], match: Match, options: Sequence[str]) -> Rival:
    return _run(name, [*launcher, "-m", "distllm.bench.rivals.generate", *options], match)


def _run(name: str, command: Sequence[str], match: Match) -> Rival:
    environ = {
        "OMP_NUM_THREADS": "1",  # each sets its own number; this keeps torchrun from a warning
        "GLOO_SOCKET_IFNAME": address.loopback().name,
        "HF_HUB_OFFLINE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return Rival(name, [*command, f"--folder={match.folder}", f"--dtype={match.dtype}"], environ, match.deadline_s)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((address.LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return port


RIVALS: Mapping[str, Callable[[Match], Rival]] = {
    WHOLE_RIVAL: _transformers,
    SPLIT_RIVAL: _transformers_pp,
    PLAIN_RIVAL: _plain,
}
