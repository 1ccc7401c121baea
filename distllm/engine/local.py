"""Ranks that a program starts on its own host, and that end with it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys

from distllm.net.store import Rendezvous

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 5.0


class LocalRanks:
    """Child processes, one a rank from 1 on. Each ends by itself when the pipe from its parent closes."""

    def __init__(self, rendezvous: Rendezvous, *, join_timeout_s: float, deadline_s: float) -> None:
        command = [sys.executable, "-m", "distllm.engine"]
        command += [f"--world-size={rendezvous.world_size}", f"--host={rendezvous.host}", f"--port={rendezvous.port}"]
        command += [f"--job={rendezvous.job}", f"--join-timeout-s={join_timeout_s}", f"--deadline-s={deadline_s}"]
        command += [f"--log-level={logging.getLevelName(logger.getEffectiveLevel())}"]
        # torch warns of every connection that closes, which is how ranks end.
        environ = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} | dict(os.environ)
        self._children = {
            rank: subprocess.Popen(
                [*command, f"--rank={rank}"],
                stdin=subprocess.PIPE,
                env=environ,
                process_group=0,  # out of the terminal's, whose Ctrl-C is this process's to answer
            )
            for rank in range(1, rendezvous.world_size)
        }

    def ended(self, rank: int) -> str | None:
        """How a child ended, or None while it runs."""
        code = self._children[rank].poll()
        if code is None:
            return None
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def end(self) -> None:
        """Closes the pipes and waits; kills what does not end in time."""
        for child in self._children.values():
            assert child.stdin is not None
            child.stdin.close()
        for rank, child in self._children.items():
            try:
                child.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                logger.warning("rank %d (pid %d) does not end; killing it", rank, child.pid)
                child.kill()
                child.wait(END_TIMEOUT_S)
