"""Faults of ranks under one torchrun each, rank 0 first: `python tests/chaos.py --torchrun --faults 30`.

Each fault strikes a job of its own, which answers a file of prompts. It proves that it happened; then the job must end
well, without help, with the answers of a run in which nothing failed, and leave nothing but them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from fakes import tiny_checkpoint
from faults import DEADLINE_S
from faulty import killed_for_memory, order
from tolls import OUT_OF_MEMORY, WOKEN, Fault, Toll
from waiting import wait_until

RANKS = 3
END_S = 120.0
FAULTY = Path(__file__).parent / "faulty.py"
KINDS = {"SIGKILL": "kill", "SIGSEGV": "segfault", "exception": "raise", "_exit": "exit", WOKEN: "stop"} | OUT_OF_MEMORY
PHASES = {"loading": "load", "forming": "join", "prompt": "prompt", "decode": "decode", "at the end": "end"}
TARGETS = {"rank 0": 0, "middle": 1, "last": 2}
# As in test_master.
PROMPTS = [f"{number} words" for number in (0, 1, 2, 4, 6, 7, 8, 9)]
TOKENS = 200


def matrix() -> list[Fault]:
    """What rank 0 does to itself, and others that die, in every phase that they have."""
    mine = itertools.product(KINDS, PHASES, ["rank 0"])
    others = itertools.product(["SIGKILL", "_exit"], [phase for phase in PHASES if phase != "at the end"], TARGETS)
    return [Fault(*each) for each in itertools.chain(mine, (each for each in others if each[2] != "rank 0"))]


class Batch:
    """One job in a folder of its own."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self._model = model
        (folder / "orders").mkdir(parents=True)
        (folder / "here").mkdir()
        (folder / "prompts").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))

    def words(self) -> list[str]:
        found = [f"model.path={self._model}", "model.dtype=float32", "cluster.threads=1", "plan.calibrate=false"]
        found += [f"prompts={self.folder / 'prompts'}", f"output={self.folder / 'here' / 'out'}", "log_level=warning"]
        found += [f"sampling.max_tokens={TOKENS}", "sampling.ignore_eos=true", "engine.prompt_chunk=32"]
        found += [f"cluster.deadline_s={DEADLINE_S}", f"cluster.load_timeout_s={DEADLINE_S}", "engine.kv_tokens=8192"]
        return [*found, "cluster.join_timeout_s=60"]

    @contextmanager
    def running(self) -> Iterator[list[subprocess.Popen[bytes]]]:
        """One torchrun for each rank."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        agent = [sys.executable, "-m", "torch.distributed.run", "--master-addr=127.0.0.1", f"--master-port={port}"]
        agent += [f"--nnodes={RANKS}", "--nproc-per-node=1", "--max-restarts=9"]
        program = [str(FAULTY), str(self.folder / "orders"), *self.words()]
        commands = [[*agent, f"--node-rank={rank}", *program] for rank in range(RANKS)]
        environ = os.environ | {"TMPDIR": str(self.folder)}  # torchrun keeps folders there
        with (self.folder / "log").open("w") as log:
            jobs = [
                subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL, env=environ) for command in commands
            ]
        try:
            yield jobs
        finally:
            for job in jobs:
                if job.poll() is None:
                    for process in psutil.Process(job.pid).children(recursive=True):
                        process.kill()
                    job.kill()
                    job.wait()

    def rank(self, jobs: list[subprocess.Popen[bytes]], rank: int) -> psutil.Process:
        """The process that is this rank now."""
        (process,) = psutil.Process(jobs[rank].pid).children()
        return process

    def left(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "here").iterdir())

    def answers(self) -> str:
        return (self.folder / "here" / "out").read_text()


def strike(batch: Batch, fault: Fault) -> None:
    """One job with one fault.

    Raises:
        AssertionError: the fault did not happen, the job did not end well, or left something.
    """
    rank = TARGETS[fault.target]
    happened = order(batch.folder / "orders", rank, PHASES[fault.phase], KINDS[fault.kind])
    with batch.running() as jobs:
        seen: dict[int, psutil.Process] = {}

        def strikes() -> bool:
            with suppress(ValueError, psutil.Error):  # while it is started
                seen[rank] = batch.rank(jobs, rank)
            return happened.exists()

        wait_until(strikes, f"{fault} did not happen")
        process = seen[rank]
        if fault.kind == WOKEN:
            wait_until(lambda: process.status() == psutil.STATUS_STOPPED, "it does not stop")
            time.sleep(1.5 * DEADLINE_S)
            process.send_signal(signal.SIGCONT)
        else:
            wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "it lives")
        if fault.kind in OUT_OF_MEMORY:
            assert killed_for_memory(process.pid), "it was not killed for its memory"
        deadline = time.monotonic() + END_S
        codes = [job.wait(max(0.1, deadline - time.monotonic())) for job in jobs]
        assert codes == [0] * RANKS, f"the job ended with {codes}"
    assert batch.left() == ["out"], f"it left {batch.left()}"


def run(given: argparse.Namespace, folder: Path) -> tuple[dict[Fault, Toll], int]:
    """Strikes as often as is wanted; returns what it cost."""
    model = tiny_checkpoint(folder / "model", "llama", max_position_embeddings=4096, num_hidden_layers=12)
    calm = Batch(folder / "calm", model)
    subprocess.run([sys.executable, "-m", "distllm.run", *calm.words()], check=True, capture_output=True)
    chance = random.Random(given.seed)
    faults = [each for each in matrix() if given.only in f"{each.kind} {each.phase} {each.target}"]
    schedule: list[Fault] = []
    while len(schedule) < given.faults:
        schedule += chance.sample(faults, len(faults))
    tolls: dict[Fault, Toll] = {}
    for number, fault in enumerate(schedule[: given.faults]):
        print(f"{number} {fault.kind}, {fault.phase}, {fault.target}", file=sys.stderr, flush=True)
        batch = Batch(folder / str(number), model)
        toll = tolls.setdefault(fault, Toll())
        try:
            strike(batch, fault)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            print(f"{error}\n{(batch.folder / 'log').read_text()}", file=sys.stderr)
            toll.lost += len(PROMPTS)
        else:
            lines = zip(batch.answers().splitlines(), calm.answers().splitlines(), strict=True)
            toll.different += sum(one != other for one, other in lines)
        toll.faults += 1
        shutil.rmtree(batch.folder)
    return tolls, given.faults * len(PROMPTS)
