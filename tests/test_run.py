"""The command line as people use it: real processes on a tiny checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from fakes import tiny_checkpoint
from hostile import TEXTS

from distllm.config import ClusterConfig, PlanConfig
from distllm.core import SamplingParams
from distllm.llm import LLM

DEADLINE_S = 120
AT_ONCE = 2

HOSTILE = TEXTS[:3]
# Those that the command line does not take for the name of a file or for standard input.
TYPED = [text for text in TEXTS if text != "-" and not text.startswith("@")]


@dataclass(frozen=True)
class Run:
    """What a process left behind."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if "distllm: error: " in line]


def run(command: Sequence[str], folder: Path, *, stdin: str = "", **environ: str) -> Run:
    return run_python(["-m", *command], folder, stdin=stdin, **environ)


def run_python(command: Sequence[str], folder: Path, *, stdin: str = "", **environ: str) -> Run:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | environ,
        input=stdin.encode(),
        capture_output=True,
        timeout=DEADLINE_S,
    )
    return Run(done.returncode, done.stdout.decode(), done.stderr.decode())


def distllm(*arguments: str) -> list[str]:
    return ["distllm.run", *arguments]


def torchrun(*arguments: str) -> list[str]:
    return ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "distllm.run", *arguments]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "a=b, 'c'")


@pytest.fixture(scope="module")
def words(checkpoint: Path) -> list[str]:
    return [
        f"model.path={checkpoint}",
        "cluster.threads=1",
        "plan.calibrate=false",
        "sampling.max_tokens=12",
        "sampling.ignore_eos=true",
    ]


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, cluster=ClusterConfig(threads=1), plan=PlanConfig(calibrate=False)) as opened:
        yield opened


def answers(llm: LLM, prompts: Sequence[str]) -> list[str]:
    return [each.text for each in llm.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True))]


def test_prompts_reach_the_model_as_typed_and_only_the_answer_is_on_standard_output(
    llm: LLM, words: list[str], tmp_path: Path
) -> None:
    prompts = HOSTILE
    expected = answers(llm, prompts)
    assert len({*expected, *answers(llm, [prompts[0].strip()])}) == 4, "answers that are alike would prove nothing"
    with ThreadPoolExecutor(AT_ONCE) as pool:
        # An old locale on the way: answers are UTF-8 all the same.
        old = {"PYTHONIOENCODING": "ascii:strict"}
        runs = [pool.submit(run, distllm(*words, f"prompt={prompt}"), tmp_path, **old) for prompt in prompts[:2]]
        runs.append(pool.submit(run, distllm(*words, f"prompt={prompts[2]}", "log_level=warning"), tmp_path))
        found = [each.result() for each in runs]
    assert [each.code for each in found] == [0, 0, 0], found
    assert [each.out for each in found] == [f"{text}\n" for text in expected]
    assert all("holds embeddings + layers 0-4 + head" in each.err for each in found[:2])
    assert found[2].err == "", "what is said at info is not said at warning"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_every_prompt_reaches_the_model_as_typed(llm: LLM, words: list[str], tmp_path: Path) -> None:
    assert len(TYPED) >= 20
    expected = answers(llm, TYPED)
    assert len(set(expected)) == len(TYPED), "answers that are alike would prove nothing"
    with ThreadPoolExecutor(AT_ONCE) as pool:
        typed = list(pool.map(lambda text: run(distllm(*words, f"prompt={text}"), tmp_path), TYPED))
        read = list(pool.map(lambda text: run(distllm(*words, "prompt=-"), tmp_path, stdin=f"{text}\n"), TYPED[:3]))
    assert [each.out for each in typed] == [f"{text}\n" for text in expected]
    assert [each.out for each in read] == [f"{text}\n" for text in expected[:3]]


def test_a_file_of_prompts_with_a_broken_line(llm: LLM, words: list[str], tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": "é"}), "", "{broken", json.dumps({"prompt": HOSTILE[0]}, ensure_ascii=False)]
    (tmp_path / "in, 1.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "out=1.jsonl").write_text("old")
    done = run(distllm(*words, "prompts=in, 1.jsonl", "output=out=1.jsonl"), tmp_path)
    assert (done.code, done.out) == (1, "")
    assert done.errors == [
        "distllm: error: line 3: is not JSON: Expecting property name enclosed in double quotes at column 2"
    ]
    found = [json.loads(line) for line in (tmp_path / "out=1.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [each["index"] for each in found] == [0, 1, 2]
    assert [found[0]["text"], found[2]["text"]] == answers(llm, ["é", HOSTILE[0]])
    assert found[2]["prompt"] == HOSTILE[0]
    assert found[1]["error"] == done.errors[0].removeprefix("distllm: error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in, 1.jsonl", "out=1.jsonl"]


def test_a_job_that_cannot_run_says_why_in_one_sentence(checkpoint: Path, words: list[str], tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(checkpoint, cut)
    weights = cut / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    before = sorted(tmp_path.iterdir())
    cases: list[tuple[list[str], str]] = [
        ([*words, "prompt="], "the prompt is empty; give prompt=TEXT"),
        ([*words, f"prompt={'x' * 600}"], "the prompt has 600 tokens; with one for the answer .* takes 512"),
        (["model=llama"], "meta-llama/Llama-3.2-1B-Instruct: .* the Hub cannot be reached; .* model.path=FOLDER"),
        ([f"model.path={cut}"], rf"{weights}: is not a whole safetensors file \([\d,]+ bytes"),
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda case: run(distllm(*case[0]), tmp_path), cases))
    for (_, sentence), done in zip(cases, found, strict=True):
        assert (done.code, done.out) == (2, ""), done
        said = done.errors
        assert len(said) == 1, done.err
        assert re.match(f"distllm: error: {sentence}", said[0]), said
        assert "Traceback" not in done.err
    assert sorted(tmp_path.iterdir()) == before


def test_what_can_be_said_before_loading_is(words: list[str], tmp_path: Path) -> None:
    """Nothing fits, which a plan would find out; the prompts are looked at before there is one."""
    (tmp_path / "in.jsonl").write_text("nonsense\n" + json.dumps({"prompt": "x" * 600}))
    nothing_fits = [*words, "plan.memory_fraction=0.00001"]
    done = run(distllm(*nothing_fits, "prompts=in.jsonl", "output=out.jsonl"), tmp_path)
    assert done.code == 1
    assert [re.sub(r":.*", "", each.removeprefix("distllm: error: ")) for each in done.errors] == ["line 1", "line 2"]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    fits = run(distllm(*nothing_fits, "prompt=hello"), tmp_path)
    assert "does not fit" in fits.err


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", *distllm("--help")], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert (done.returncode, done.stderr) == (1, b"distllm: error: [Errno 28] No space left on device\n")


LATE = """
import signal, sys, time
from distllm import run
from distllm.core import EngineError

def lose_a_rank(config, front):
    signal.raise_signal(signal.SIGTERM)
    try:
        EFFECT
    finally:
        time.sleep(30)

run.VERDICT_S = 0.2
run._run = lose_a_rank
run.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("effect", "code", "sentence"),
    [("raise EngineError('rank 1 is lost')", 1, "rank 1 is lost"), ("pass", 143, "ended by SIGTERM")],
)
def test_a_launchers_end_does_not_hide_the_verdict(effect: str, code: int, sentence: str, tmp_path: Path) -> None:
    done = run_python(["-c", LATE.replace("EFFECT", effect)], tmp_path, WORLD_SIZE="2")
    assert (done.code, done.out, done.err) == (code, "", f"distllm: error: {sentence}\n")


def left_over(mark: str) -> list[str]:
    """Processes that have a word in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "pid"]):
        if any(mark in word for word in process.info["cmdline"] or []):
            found.append(f"{process.info['pid']}: {process.info['cmdline']}")
    return found


def test_two_ranks_answer_as_one(llm: LLM, words: list[str], tmp_path: Path) -> None:
    done = run(torchrun(*words, f"prompt={HOSTILE[1]}"), tmp_path)
    assert (done.code, done.out) == (0, answers(llm, HOSTILE[1:2])[0] + "\n"), done.err
    assert "rank 1 " in done.err
    assert list(tmp_path.iterdir()) == []
    assert left_over(words[0]) == []


@pytest.mark.parametrize("mistake", ["engine.max_requests=abc", "model.path=/no/such/folder"])
def test_two_ranks_speak_of_a_mistake_once(mistake: str, words: list[str], tmp_path: Path) -> None:
    mark = f"model.name={tmp_path}"
    done = run(torchrun(*words, mark, mistake), tmp_path)
    assert done.code != 0
    assert done.out == ""
    assert [line for line in done.errors if mistake in line] == done.errors
    assert len(done.errors) == 1, done.err
    assert list(tmp_path.iterdir()) == []
    assert left_over(mark) == []
