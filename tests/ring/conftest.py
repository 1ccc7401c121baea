"""Jobs of real processes, started and ended by the tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from fakes import tiny_checkpoint
from faults import GREEDY, LONG, PROMPTS, SEEDED, tokens
from processes import command

from distllm import LLM, SamplingParams

START_TIMEOUT_S = 90.0


class Job:
    """One or more launcher processes; standard output and error go to files."""

    def __init__(self, commands: Sequence[Sequence[str]], folder: Path) -> None:
        self.out = folder / "out.txt"
        self.err = folder / "err.txt"
        environ = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.launchers = [
                subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environ, cwd=folder)
                for command in commands
            ]
        self.seen: dict[int, psutil.Process] = {}

    def ranks(self) -> dict[int, psutil.Process]:
        """The running ranks of the job, by rank, which torchrun tells them by their environment."""
        found = {}
        for launcher in self.launchers:
            for process in _children(launcher.pid):
                with suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
                    rank = process.environ().get("RANK")
                    if rank is not None and "distllm" in " ".join(command(process)):
                        found[int(rank)] = process
        self.seen |= {process.pid: process for process in found.values()}
        return found

    def wait_for_text(self) -> None:
        """Until rank 0 is in the middle of its answer."""
        self.wait_until(lambda: self.out.stat().st_size >= 40)

    def wait_for_error(self, text: str) -> None:
        """Until this stands on standard error."""
        self.wait_until(lambda: text in self.err.read_text())

    def wait_until(self, seen: Callable[[], bool]) -> None:
        """While the job runs."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not seen():
            assert self.launchers[0].poll() is None, f"ended early: {self.err.read_text()}"
            assert time.monotonic() < deadline, f"not seen: {self.err.read_text()}"
            time.sleep(0.05)

    def wait(self, timeout_s: float) -> list[int]:
        """Exit codes of the launchers."""
        deadline = time.monotonic() + timeout_s
        return [launcher.wait(max(0.1, deadline - time.monotonic())) for launcher in self.launchers]

    def errors(self) -> list[str]:
        """The sentences of ours on standard error."""
        return [line for line in self.err.read_text().splitlines() if "distllm: error:" in line]

    def alive(self) -> list[psutil.Process]:
        """Ranks that were seen and still run."""
        return [each for each in self.seen.values() if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]

    def end(self) -> None:
        for launcher in self.launchers:
            if launcher.poll() is None:
                for child in _children(launcher.pid):
                    child.kill()
                launcher.kill()
                launcher.wait(10)
        for process in self.alive():
            process.kill()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def one_agent(ranks: int, *words: str) -> list[list[str]]:
    """One torchrun for all ranks."""
    port = f"--master-port={free_port()}"
    return [
        [sys.executable, "-m", "torch.distributed.run", port, f"--nproc-per-node={ranks}", "-m", "distllm.run", *words]
    ]


def agent_per_rank(ranks: int, *words: str) -> list[list[str]]:
    """A torchrun for each rank, with the static rendezvous."""
    shared = ["--master-addr=127.0.0.1", f"--master-port={free_port()}", f"--nnodes={ranks}", "--nproc-per-node=1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *shared]
    return [[*torchrun, f"--node-rank={rank}", "-m", "distllm.run", *words] for rank in range(ranks)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Sequence[Sequence[str]]], Job]]:
    """Starts jobs, and ends what is left of them."""
    jobs: list[Job] = []

    def start_job(commands: Sequence[Sequence[str]]) -> Job:
        folder = tmp_path / f"job{len(jobs)}"
        folder.mkdir()
        jobs.append(Job(commands, folder))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.end()


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a context so long that an answer does not end before a test does."""
    return tiny_checkpoint(tmp_path_factory.mktemp("endless"), "llama", max_position_embeddings=50_000)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "llama", max_position_embeddings=4096)


@pytest.fixture(scope="session")
def wanted(model: Path) -> dict[SamplingParams, list[tuple[int, ...]]]:
    """Tokens of a run on one rank, in which nothing fails."""
    with LLM(model, dtype="float32") as llm:
        return {params: tokens(llm.generate([*PROMPTS, LONG], params)) for params in (GREEDY, SEEDED)}
