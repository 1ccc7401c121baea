"""A conversation of several ranks at a real terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from conftest import free_port
from faults import strike
from waiting import wait_until

from distllm import LLM, SamplingParams
from distllm.config import ClusterConfig

CTRL_C, CTRL_D, LEFT = "\x03", "\x04", "\x1b[D"
FRANCE, ITALY, STORY = "What is the capital of France?", "And of Italy?", "Tell me a very long story."
TOKENS = 80


class Screen:
    """A command at a terminal of its own."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvp(words[0], words)
        self.text = ""
        self._read = 0

    def press(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def _look(self) -> None:
        while select.select([self._terminal], [], [], 0.02)[0]:
            try:
                self.text += os.read(self._terminal, 4096).decode(errors="replace").replace("\r\n", "\n")
            except OSError:  # nobody has it open any more
                return

    def wait_for(self, pattern: str) -> str:
        """What has come since the last time, up to the pattern."""

        def seen() -> re.Match[str] | None:
            self._look()
            return re.compile(pattern).search(self.text, self._read)

        wait_until(seen, lambda: f"{pattern!r} does not come: {self.text[self._read :]!r}")
        found = seen()
        assert found
        before = self.text[self._read : found.start()]
        self._read = found.end()
        return before

    def ask(self, keys: str, until: str = "\n> ") -> str:
        """What comes when something is typed, behind its echo."""
        self.press(f"{keys}\n")
        self.wait_for("\n")
        return self.wait_for(until)

    def ended(self) -> int:
        """The exit code."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            self._look()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self._terminal)
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"it does not end: {self.text}")

    def kill(self) -> None:
        with suppress(psutil.NoSuchProcess, ProcessLookupError, ChildProcessError):
            for each in psutil.Process(self.pid).children(recursive=True):
                each.kill()
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@pytest.fixture(scope="module")
def alone(smollm2: Path) -> Iterator[LLM]:
    """The same model in this process."""
    with LLM(smollm2, dtype="float32", cluster=ClusterConfig(threads=1)) as llm:
        yield llm


def answer(llm: LLM, *texts: str) -> str:
    told = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return llm.chat(told, SamplingParams(max_tokens=TOKENS)).text


@contextmanager
def conversation(start: list[str], model: Path, folder: Path) -> Iterator[Screen]:
    """A screen at which messages are waited for; in the end it is left in peace."""
    words = ["task=chat", f"model.path={model}", "model.dtype=float32", f"sampling.max_tokens={TOKENS}"]
    screen = Screen([sys.executable, *start, "cluster.threads=1", *words], folder)
    try:
        screen.wait_for("> ")
        yield screen
        ranks = psutil.Process(screen.pid).children(recursive=True)
        screen.press(CTRL_D)
        assert screen.ended() == 0, screen.text
        assert not psutil.wait_procs(ranks, 10)[1]
    finally:
        screen.kill()


WORKERS = ["-m", "distllm.run", "cluster.workers=2"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2"]


@pytest.mark.parametrize("by_torchrun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_is_said_is_remembered_and_ctrl_c_stops_an_answer(
    smollm2: Path, alone: LLM, tmp_path: Path, by_torchrun: bool
) -> None:
    start = [*TORCHRUN, f"--master-port={free_port()}", "-m", "distllm.run"] if by_torchrun else WORKERS
    with conversation(start, smollm2, tmp_path) as screen:
        talk = [FRANCE, screen.ask(FRANCE)]
        assert talk == [FRANCE, answer(alone, FRANCE)]
        talk += [ITALY, screen.ask("And of taly?" + 5 * LEFT + "I")]
        assert talk[-1] == answer(alone, *talk[:3]) != answer(alone, ITALY), "what was said matters"

        screen.ask(STORY, until="(?s)(?=.{60})")
        screen.press(CTRL_C)
        talk += [STORY, screen.wait_for(r"\n\(stopped\)\n> ")]
        whole = answer(alone, *talk[:5])
        assert whole.startswith(talk[-1])
        assert len(talk[-1]) < len(whole)
        assert screen.ask(ITALY) == answer(alone, *talk, ITALY), "what there was of the answer is remembered"


@pytest.mark.slow
def test_an_answer_goes_on_when_a_rank_is_lost(smollm2: Path, alone: LLM, tmp_path: Path) -> None:
    with conversation([*WORKERS, "cluster.restarts=0"], smollm2, tmp_path) as screen:
        screen.ask(STORY, until="(?s)(?=.{60})")
        (worker,) = psutil.Process(screen.pid).children()
        strike(worker, signal.SIGKILL)
        before = screen.wait_for(r"\nrank 1 \(.*\) is lost: .*\n")
        assert "\n" not in before.strip(), "the word on it has lines of its own"
        screen.wait_for(r"going on with 1 request after .* s\n")
        behind = screen.wait_for("\n> ").removesuffix(f"\n(cut off after {TOKENS} tokens)")
        assert answer(alone, STORY) == before + behind
