"""Rank 0 dies in the middle of a file of prompts: real processes, real signals, and the same answers."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes import tiny_checkpoint
from faults import strike

from distllm import LLM, SamplingParams
from distllm.config import ClusterConfig, PlanConfig

WAIT_S = 90.0
TOKENS = 300
PROMPTS = [f"{number} words" for number in range(12)]
GREEDY = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=1.5, repetition_penalty=1.1, seed=7)
WORDS = {GREEDY: [], SEEDED: ["sampling.temperature=1.5", "sampling.repetition_penalty=1.1", "sampling.seed=7"]}


def wait_until(seen: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not seen():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return tiny_checkpoint(folder / "model", "llama", max_position_embeddings=4096, num_hidden_layers=12)


@pytest.fixture(scope="module")
def wanted(model: Path) -> dict[SamplingParams, list[tuple[int, ...]]]:
    with LLM(model, dtype="float32", cluster=ClusterConfig(threads=1), plan=PlanConfig(calibrate=False)) as llm:
        return {params: [each.token_ids for each in llm.generate(PROMPTS, params)] for params in (GREEDY, SEEDED)}


class Batch:
    """The command that answers the prompts, in a process of its own."""

    def __init__(self, folder: Path, model: Path, *words: str) -> None:
        self.output = folder / "out.jsonl"
        self.journal = folder / "out.jsonl.journal"
        self._log = folder.parent / f"{folder.name}.log"
        prompts = folder.parent / f"{folder.name}.prompts"
        prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
        self._command = [
            *("-m", "distllm.run", f"model.path={model}", "model.dtype=float32", f"prompts={prompts}"),
            *(f"output={self.output}", "cluster.threads=1", "plan.calibrate=false", "engine.kv_tokens=32768"),
            *(f"sampling.max_tokens={TOKENS}", "sampling.ignore_eos=true", *words),
        ]

    def start(self, *launcher: str) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen([sys.executable, *launcher, *self._command], stdin=subprocess.DEVNULL, stderr=log)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_for_tokens(self) -> None:
        """Until some of every answer is in the journal."""
        wal = self.journal.with_name(self.journal.name + "-wal")
        wait_until(lambda: wal.exists(), f"there is no journal: {self.said}")
        before = wal.stat().st_size
        wait_until(lambda: wal.stat().st_size > before + 2**14, f"nothing is written: {self.said}")

    def written(self) -> dict[str, list[int]]:
        """Tokens in the journal that a process left behind, by prompt."""
        with sqlite3.connect(self.journal) as journal:
            rows = journal.execute("SELECT name, tokens FROM pieces ORDER BY start").fetchall()
        journal.close()
        found: dict[str, list[int]] = {}
        for name, tokens in rows:
            found.setdefault(name, []).extend(json.loads(tokens))
        return found

    def answers(self) -> list[tuple[int, ...]]:
        lines = [json.loads(line) for line in self.output.read_text().splitlines()]
        assert [each["index"] for each in lines] == list(range(len(PROMPTS)))
        return [tuple(each["token_ids"]) for each in lines]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "here").mkdir()
    yield tmp_path / "here"
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(("params", "ranks"), [(GREEDY, 1), (SEEDED, 3)], ids=["greedy-1", "seeded-3"])
def test_the_same_command_goes_on(
    folder: Path, model: Path, wanted: dict[SamplingParams, list[tuple[int, ...]]], params: SamplingParams, ranks: int
) -> None:
    batch = Batch(folder, model, *WORDS[params], *([f"cluster.workers={ranks}"] if ranks > 1 else []))
    first = batch.start()
    batch.wait_for_tokens()
    process = psutil.Process(first.pid)
    others = process.children()
    assert len(others) == ranks - 1
    strike(process, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert psutil.wait_procs(others, WAIT_S)[1] == [], "ranks outlive rank 0"
    written = batch.written()
    assert written
    assert not batch.output.exists()
    assert batch.start().wait(WAIT_S) == 0, batch.said
    assert "going on from" in batch.said
    assert batch.answers() == wanted[params]


def test_a_seed_that_was_drawn_is_kept(folder: Path, model: Path) -> None:
    batch = Batch(folder, model, "sampling.temperature=1.5")
    first = batch.start()
    batch.wait_for_tokens()
    strike(psutil.Process(first.pid), signal.SIGKILL)
    first.wait()
    written = batch.written()
    assert batch.start().wait(WAIT_S) == 0, batch.said
    found = batch.answers()
    for name, tokens in written.items():
        assert found[int(name)][: len(tokens)] == tuple(tokens)
    assert len(set(found)) == len(PROMPTS)
