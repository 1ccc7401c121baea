"""Ranks that a program starts on its own host, and that end with it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from distllm import logs
from distllm.net.store import Rendezvous

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 5.0
RESTART_S = 0.5
POLL_S = 0.2


class LocalRanks:
    """Child processes, one a rank from 1 on. Each ends by itself when the pipe from its parent closes.

    They import what they need, and join when they are woken.

    Attributes:
        program: the words for Python that start one.

    Args:
        restarts: how often each is started again when it is lost.
    """

    program: Sequence[str] = ("-m", "distllm.engine")

    def __init__(self, rendezvous: Rendezvous, *, join_timeout_s: float, deadline_s: float, restarts: int) -> None:
        command = [sys.executable, *self.program]
        command += [f"--world-size={rendezvous.world_size}", f"--host={rendezvous.host}", f"--port={rendezvous.port}"]
        command += [f"--job={rendezvous.job}", f"--join-timeout-s={join_timeout_s}", f"--deadline-s={deadline_s}"]
        command += [f"--log-level={logging.getLevelName(logger.getEffectiveLevel())}", f"--log-format={logs.form()}"]
        self._command = command
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._restarts_left = dict.fromkeys(range(1, rendezvous.world_size), restarts)
        self._due: dict[int, float] = {}
        self._awaited: dict[int, float] = {}
        self._patience_s = join_timeout_s
        self._supervisor: threading.Thread | None = None
        self._children = {rank: self._started(rank) for rank in self._restarts_left}

    def wake(self) -> None:
        """Has them join."""
        for child in self._children.values():
            _wake(child)

    def _started(self, rank: int) -> subprocess.Popen[bytes]:
        # torch warns of every connection that closes, which is how ranks end.
        environ = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} | dict(os.environ)
        return subprocess.Popen(
            [*self._command, f"--rank={rank}"],
            stdin=subprocess.PIPE,
            env=environ,
            process_group=0,  # out of the terminal's, whose Ctrl-C is this process's to answer
        )

    def ended(self, rank: int, patience_s: float = 0.0) -> str | None:
        """How a child ended, or None while it runs.

        Args:
            patience_s: how long to wait for its end; a process that dies closes its connections a moment before.
        """
        if rank not in self._children:
            return None
        try:
            code = self._children[rank].wait(patience_s)
        except subprocess.TimeoutExpired:
            return None
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def was_killed(self, rank: int) -> bool:
        """Whether a signal has ended a child."""
        code = self._children[rank].poll() if rank in self._children else None
        return code is not None and code < 0

    def replace(self, rank: int, pid: int) -> None:
        """Starts one that was lost again, a moment later, unless that was done often enough or is under way."""
        with self._lock:
            if self._restarts_left.get(rank, 0) > 0 and self._children[rank].pid == pid:
                self._restarts_left[rank] -= 1
                self._due[rank] = time.monotonic() + RESTART_S
                if self._supervisor is None:
                    self._supervisor = threading.Thread(target=self._supervise, name="distllm-ranks", daemon=True)
                    self._supervisor.start()

    def came(self, rank: int) -> None:
        """One that was started again has registered; from here on its end is for others to notice."""
        with self._lock:
            self._awaited.pop(rank, None)

    def _supervise(self) -> None:
        while not self._ending.wait(POLL_S):
            with self._lock:
                now = time.monotonic()
                failed = {rank: why for rank in self._awaited if (why := self._why_not(rank, now))}
                for rank in failed:
                    del self._awaited[rank]
                for rank in [rank for rank, due in self._due.items() if due <= now]:
                    del self._due[rank]
                    self._start_again(rank, now)
            for rank, why in failed.items():
                logger.warning("rank %d %s", rank, why)
                self.replace(rank, self._children[rank].pid)

    def _why_not(self, rank: int, now: float) -> str | None:
        """Why one that was started again will not come; None while it may."""
        if how := self.ended(rank):
            return f"{how} before it registered"
        waited = now - self._awaited[rank]
        return f"did not register within {waited:.0f} s" if waited > self._patience_s else None

    def _start_again(self, rank: int, now: float) -> None:
        self._children[rank].kill()
        _end([self._children[rank]])
        if not self._ending.is_set():
            self._children[rank] = self._started(rank)
            _wake(self._children[rank])
            self._awaited[rank] = now
            logger.info("rank %d is started again, as pid %d", rank, self._children[rank].pid)

    def kill(self) -> None:
        """Ends them at once: they were not woken, and nobody knows of them."""
        for child in self._children.values():
            child.kill()
        self.end()

    def end(self) -> None:
        """Closes the pipes and waits; kills what does not end in time."""
        self._ending.set()
        if self._supervisor is not None:
            self._supervisor.join()
        _end(list(self._children.values()))


def _wake(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    with suppress(BrokenPipeError):  # it has ended, which is noticed otherwise
        os.write(child.stdin.fileno(), b"\n")


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        assert child.stdin is not None
        child.stdin.close()
    for child in children:
        try:
            child.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.warning("pid %d does not end; killing it", child.pid)
            child.kill()
            child.wait(END_TIMEOUT_S)
