"""Every architecture at three ranks: transformers' own tokens in fp32, or a sentence; and the docs say so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import (
    FITTING,
    LAYERS,
    REFUSED,
    TEXT_PARTS,
    architecture_answer,
    architecture_checkpoint,
    architecture_config,
)
from conftest import free_port
from fakes import byte_tokenizer
from safetensors.torch import save_file

from distllm.model import attention, families
from distllm.model.checkpoint import Checkpoint

pytestmark = pytest.mark.slow

PROMPTS = [[(7 * n + 3) % 256 for n in range(length)] for length in (40, 5, 17)]
TOKENS = 12
RANKS = 3
DOCS = Path(__file__).parents[2] / "docs" / "models.md"
MARK = "<!-- written by tests/ring/test_architectures.py -->\n"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What three ranks say to each architecture, and what transformers does."""
    work = tmp_path_factory.mktemp("architectures")
    folders = {kind: architecture_checkpoint(work / kind, kind) for kind in (*FITTING, *TEXT_PARTS)}
    for kind in REFUSED:
        architecture_config(kind).save_pretrained(work / kind)
        byte_tokenizer().save_pretrained(work / kind)
        save_file({f"weight.{n}": torch.zeros(1) for n in range(200)}, work / kind / "model.safetensors")
    order = {
        "folders": {kind: str(work / kind) for kind in (*folders, *REFUSED)},
        "prompts": PROMPTS,
        "max_tokens": TOKENS,
        "layers": [1, LAYERS - 2, 1],
        "output": str(work / "answers.json"),
    }
    (work / "order.json").write_text(json.dumps(order))
    script = str(Path(__file__).with_name("many_models.py"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--master-port={free_port()}"]
    command = [*torchrun, f"--nproc-per-node={RANKS}", script, str(work / "order.json")]
    environ = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    job = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=500, check=False)
    assert job.returncode == 0, job.stderr[-3000:]
    found: dict[str, Any] = json.loads((work / "answers.json").read_text())
    attention.register()
    for kind, folder in folders.items():
        found[kind]["sees"] = sees(folder)
        found[kind]["wanted"] = [architecture_answer(folder, kind, prompt, TOKENS) for prompt in PROMPTS]
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", [*FITTING, *TEXT_PARTS])
def test_tokens_are_those_of_transformers(kind: str, answers: dict[str, Any]) -> None:
    answer = answers[kind]
    assert "refused" not in answer
    assert answer["ranks"] == RANKS
    assert answer["tokens"] == answer["wanted"]
    assert len({token for tokens in answer["tokens"] for token in tokens}) > RANKS, "a text of one token tells nothing"


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_by_name(kind: str, answers: dict[str, Any]) -> None:
    assert answers[kind].keys() == {"refused"}
    assert answers[kind]["refused"].startswith(kind)
    assert REFUSED[kind] in answers[kind]["refused"]


def test_enough_architectures() -> None:
    assert len(FITTING) >= 35
    assert not FITTING.keys() & REFUSED.keys()


def sees(folder: Path) -> str:
    """How far back the layers of a model look, in words."""
    kinds = families.inspect(Checkpoint(folder).config).attention
    words = ("sliding window" if kind.window else "chunks" if kind.chunk else "everything" for kind in kinds)
    return ", ".join(sorted(set(words)))


def tables(answers: dict[str, Any]) -> str:
    lines = ["", "## Tested, and the same tokens", "", "| architecture | its layers see |", "|---|---|"]
    lines += [f"| {kind} | {answers[kind]['sees']} |" for kind in sorted(FITTING)]
    lines += ["", "## The text part of models of texts and images", "", "| architecture | run as |", "|---|---|"]
    lines += [f"| {kind} | {TEXT_PARTS[kind]} |" for kind in sorted(TEXT_PARTS)]
    lines += ["", "## Refused", "", "| architecture | sentence |", "|---|---|"]
    lines += [f"| {kind} | {answers[kind]['refused']} |" for kind in sorted(REFUSED)]
    return "\n".join(lines) + "\n"


def test_the_docs_say_so(answers: dict[str, Any]) -> None:
    text, _, written = DOCS.read_text().partition(MARK)
    made = tables(answers)
    if os.environ.get("DISTLLM_WRITE_DOCS"):
        DOCS.write_text(text + MARK + made)
    else:
        assert written == made, "write the tables anew, as docs/models.md says"
