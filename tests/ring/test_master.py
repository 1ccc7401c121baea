"""Rank 0 dies in the middle of a file of prompts: real processes, real signals, and the same answers."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from conftest import Job, free_port
from fakes import tiny_checkpoint
from faults import strike
from waiting import WAIT_S, wait_until

from distllm import LLM, SamplingParams
from distllm.config import ClusterConfig, PlanConfig

LOCAL = str(Path(__file__).parents[2] / "launch" / "local.sh")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ALONE = [sys.executable, "-m", "distllm.run"]
FAULTY = str(Path(__file__).parents[1] / "faulty.py")
TOKENS = 300
# In the answers to all of these the best token is always better than the next by far more than rounding.
PROMPTS = [f"{number} words" for number in (0, 1, 2, 4, 6, 7, 8, 9)]
GREEDY = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=1.5, repetition_penalty=1.1, seed=8)
WORDS = {GREEDY: [], SEEDED: ["sampling.temperature=1.5", "sampling.repetition_penalty=1.1", "sampling.seed=8"]}

Start = Callable[[Sequence[Sequence[str]]], Job]
Wanted = dict[SamplingParams, list[tuple[int, ...]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return tiny_checkpoint(folder / "model", "llama", max_position_embeddings=4096, num_hidden_layers=12)


@pytest.fixture(scope="module")
def wanted(model: Path) -> Wanted:
    with LLM(model, dtype="float32", cluster=ClusterConfig(threads=1), plan=PlanConfig(calibrate=False)) as llm:
        return {params: [each.token_ids for each in llm.generate(PROMPTS, params)] for params in (GREEDY, SEEDED)}


class Batch:
    """The command that answers the prompts, as it is started, and what it writes."""

    def __init__(self, folder: Path, model: Path, start: Start) -> None:
        self.output = folder / "out.jsonl"
        self.journal = folder / "out.jsonl.journal"
        self._start = start
        prompts = folder.parent / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
        self._words = [f"model.path={model}", "model.dtype=float32", f"prompts={prompts}", f"output={self.output}"]
        self._words += ["cluster.threads=1", "plan.calibrate=false", "engine.kv_tokens=32768"]
        self._words += [f"sampling.max_tokens={TOKENS}", "sampling.ignore_eos=true"]

    def start(self, *launchers: Sequence[str], words: Sequence[str] = ()) -> Job:
        return self._start([[*launcher, *self._words, *words] for launcher in launchers])

    def wait_for_tokens(self, job: Job) -> None:
        """Until some of the answers are in the journal."""
        wal = self.journal.with_name(self.journal.name + "-wal")
        wait_until(lambda: "holds" in said(job), lambda: f"nothing is loaded: {said(job)}")  # prompts are there before
        before = wal.stat().st_size
        wait_until(lambda: wal.stat().st_size > before + 2**14, lambda: f"nothing is written: {said(job)}")

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


def said(job: Job) -> str:
    return job.err.read_text()


def ends_well(job: Job) -> None:
    assert set(job.wait(WAIT_S)) == {0}, said(job)


@pytest.fixture
def batch(tmp_path: Path, model: Path, start: Start) -> Iterator[Batch]:
    folder = tmp_path / "here"
    folder.mkdir()
    yield Batch(folder, model, start)
    assert [path.name for path in folder.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("params", "ranks"), [(SEEDED, 1), pytest.param(GREEDY, 3, marks=pytest.mark.slow)], ids=["seeded-1", "greedy-3"]
)
def test_the_same_command_goes_on(batch: Batch, wanted: Wanted, params: SamplingParams, ranks: int) -> None:
    words = [*WORDS[params], *([f"cluster.workers={ranks}"] if ranks > 1 else [])]
    first = batch.start(ALONE, words=words)
    batch.wait_for_tokens(first)
    process = psutil.Process(first.launchers[0].pid)
    others = process.children()
    assert len(others) == ranks - 1
    strike(process, signal.SIGKILL)
    assert first.wait(WAIT_S) == [-signal.SIGKILL]
    assert psutil.wait_procs(others, WAIT_S)[1] == [], "ranks outlive rank 0"
    assert batch.written()
    assert not batch.output.exists()
    second = batch.start(ALONE, words=words)
    ends_well(second)
    assert "going on from" in said(second)
    assert batch.answers() == wanted[params]


@pytest.mark.slow
def test_a_seed_that_was_drawn_is_kept(batch: Batch) -> None:
    first = batch.start(ALONE, words=["sampling.temperature=1.5"])
    batch.wait_for_tokens(first)
    strike(psutil.Process(first.launchers[0].pid), signal.SIGKILL)
    first.wait(WAIT_S)
    written = batch.written()
    ends_well(batch.start(ALONE, words=["sampling.temperature=1.5"]))
    found = batch.answers()
    for name, tokens in written.items():
        assert found[int(name)][: len(tokens)] == tuple(tokens)
    assert len(set(found)) == len(PROMPTS)


def test_ranks_wait_for_another_rank_0(batch: Batch, wanted: Wanted) -> None:
    job = batch.start([LOCAL, "3"])
    batch.wait_for_tokens(job)
    before = job.ranks()
    assert before.keys() == {0, 1, 2}
    strike(before[0], signal.SIGKILL)
    wait_until(lambda: job.ranks().get(0, before[0]) != before[0], lambda: "rank 0 is not started again")
    wait_until(lambda: len(re.findall("rank [12] .* has a master again", said(job))) == 2, lambda: said(job))
    after = job.ranks()
    assert (after[1], after[2]) == (before[1], before[2]), "the others have stayed"
    ends_well(job)
    assert batch.answers() == wanted[GREEDY]


@pytest.mark.slow
@pytest.mark.parametrize("together", [[0, 1], [0, 2], [0, 1, 2]], ids=str)
def test_others_die_with_rank_0(batch: Batch, wanted: Wanted, together: list[int]) -> None:
    job = batch.start([LOCAL, "3"])
    batch.wait_for_tokens(job)
    before = job.ranks()
    for rank in together:
        strike(before[rank], signal.SIGKILL)
    ends_well(job)
    assert batch.answers() == wanted[GREEDY]


@pytest.mark.slow
@pytest.mark.parametrize("order", [[0, 0], [0, 1], [1, 0]], ids=str)
def test_one_after_the_other(batch: Batch, wanted: Wanted, order: list[int]) -> None:
    """The second one while rank 0 comes again, or while the first loss is mended."""
    first, second = order
    job = batch.start([LOCAL, "3"])
    batch.wait_for_tokens(job)
    before = job.ranks()
    strike(before[first], signal.SIGKILL)
    wait_until(lambda: job.ranks().get(first, before[first]) != before[first], lambda: "it is not started again")
    strike(job.ranks()[second], signal.SIGKILL)
    ends_well(job)
    assert batch.answers() == wanted[GREEDY]


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [1.0, 2.0, 2.5, 3.0, 3.5, 4.0])
def test_rank_0_dies_while_the_job_comes_up(batch: Batch, wanted: Wanted, after_s: float) -> None:
    job = batch.start([LOCAL, "3"])
    wait_until(lambda: job.ranks().keys() == {0, 1, 2}, lambda: said(job))
    time.sleep(after_s)
    strike(job.ranks()[0], signal.SIGKILL)
    ends_well(job)
    assert batch.answers() == wanted[GREEDY]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("launcher", ["one for all", "c10d"])
def test_a_launcher_that_starts_all_ranks_again(batch: Batch, wanted: Wanted, launcher: str, victim: int) -> None:
    """If another rank dies, rank 0 goes on for the moment that the launcher gives it, and may come to the end."""
    if launcher == "c10d":
        elastic = ["--rdzv-backend=c10d", "--rdzv-id=one", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
        agents = 3 * [[*TORCHRUN, *elastic, "--nnodes=3", "--nproc-per-node=1"]]
    else:
        agents = [[*TORCHRUN, f"--master-port={free_port()}", "--nproc-per-node=3"]]
    job = batch.start(*([*agent, "--max-restarts=3", "-m", "distllm.run"] for agent in agents))
    batch.wait_for_tokens(job)
    strike(job.ranks()[victim], signal.SIGKILL)
    ends_well(job)
    assert victim != 0 or "going on from" in said(job)
    assert batch.answers() == wanted[GREEDY]


@pytest.mark.slow
def test_rank_0_gives_up_and_is_started_again(batch: Batch, wanted: Wanted, tmp_path: Path) -> None:
    """Rank 1 dies again and again before it registers, for longer than rank 0 waits for it."""
    orders = tmp_path / "orders"
    orders.mkdir()
    shared = ["--master-addr=127.0.0.1", f"--master-port={free_port()}", "--nnodes=2", "--nproc-per-node=1"]
    agents = [
        [*TORCHRUN, *shared, "--max-restarts=20", f"--node-rank={rank}", FAULTY, str(orders)] for rank in range(2)
    ]
    (orders / "1-arrive").write_text("kill")
    job = batch.start(*agents, words=["cluster.join_timeout_s=5"])

    def gives_up() -> bool:
        if (orders / "1-arrive.happened").exists():
            (orders / "1-arrive.happened").rename(orders / "1-arrive")
        return "ranks [1] did not " in said(job)

    wait_until(gives_up, lambda: said(job))
    (orders / "1-arrive").unlink(missing_ok=True)
    ends_well(job)
    assert "gave up" not in said(job)
    assert batch.answers() == wanted[GREEDY]


def test_a_job_that_has_ended_is_not_run_again(tmp_path: Path, model: Path) -> None:
    """Launchers start again whatever ends with an error; a line that nobody can answer is no reason to."""
    (tmp_path / "prompts").write_text('{"prompt": "a"}\n{broken\n')
    words = [f"model.path={model}", "prompts=prompts", "output=out", "sampling.max_tokens=5", "plan.calibrate=false"]
    done = subprocess.run([LOCAL, "2", *words], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 1
    assert done.stderr.count("distllm: error: line 2: is not JSON") == 1
    assert done.stderr.count("holds embeddings") == 1, "the model was loaded again"
    assert len((tmp_path / "out").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_rank_that_is_started_again_too_late_ends_well(batch: Batch, wanted: Wanted) -> None:
    """What is left to do takes no longer than a start."""
    shared = ["--master-addr=127.0.0.1", f"--master-port={free_port()}", "--nnodes=3", "--nproc-per-node=1"]
    agents = [[*TORCHRUN, *shared, "--max-restarts=3", f"--node-rank={rank}", "-m", "distllm.run"] for rank in range(3)]
    job = batch.start(*agents)
    batch.wait_for_tokens(job)
    strike(job.ranks()[1], signal.SIGKILL)
    assert set(job.wait(50)) == {0}, f"did it wait for a store that is gone? {said(job)}"
    assert batch.answers() == wanted[GREEDY]
