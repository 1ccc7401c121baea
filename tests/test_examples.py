"""The examples run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from ring.conftest import free_port

from distllm import LLM, SamplingParams

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=150, check=True)


def test_two_ranks(smollm2: Path) -> None:
    out = run(str(EXAMPLES / "two_ranks.py"), str(smollm2)).stdout
    assert "rank 1 holds" in out
    assert "' Paris" in out


def test_under_torchrun(smollm2: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = run(*torchrun, str(EXAMPLES / "under_torchrun.py"), str(smollm2))
    assert done.stdout.startswith("The first man on the moon was")
    assert "rank 1 has served" in done.stderr


@pytest.mark.slow
def test_quantized(smollm2: Path) -> None:
    lines = run(str(EXAMPLES / "quantized.py"), str(smollm2)).stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["int8", "int4"]
    assert all("Paris" in line for line in lines)


@pytest.mark.slow
def test_shards(smollm2: Path) -> None:
    out = run(str(EXAMPLES / "shards.py"), str(smollm2)).stdout
    assert "rank 1 needs stage-1.safetensors, 1" in out
    assert "' Paris" in out
    assert "model.safetensors" in out.splitlines()[-1]


def test_pushed(smollm2: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = run(*torchrun, str(EXAMPLES / "pushed.py"), str(smollm2))
    assert done.stdout.splitlines()[0].startswith("'The capital of France is' -> ' Paris")
    assert re.search(r"^rank 1: 1\d\d MB sent$", done.stdout, re.MULTILINE)


def test_survive(smollm2: Path) -> None:
    done = run(str(EXAMPLES / "survive.py"), str(smollm2))
    assert re.search(r"rank 1 \(.*\) is lost: killed by SIGKILL; the last step it finished is \d", done.stderr)
    assert "going on with 1 request after" in done.stderr
    assert re.search(r"rank 1 \(.*\) has come", done.stderr)
    ring = re.search(r"^now: rank 0 with embeddings.* head$", done.stdout, re.MULTILINE)
    assert ring, done.stdout
    places = re.findall(r"rank (\d) with", ring[0])
    assert sorted(places) == ["0", "1", "2"], "it is back, in the place where least moved"
    with LLM(smollm2) as llm:
        (whole,) = llm.generate("Once upon a time", SamplingParams(max_tokens=30))
    assert done.stdout.startswith(whole.text), "what was delivered before the fault"


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "pushed.py",
        "quantized.py",
        "shards.py",
        "survive.py",
        "two_ranks.py",
        "under_torchrun.py",
    }
