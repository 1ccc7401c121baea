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
from architectures import FITTING, LAYERS, REFUSED, architecture_checkpoint, architecture_config
from conftest import free_port
from fakes import byte_tokenizer, reference
from safetensors.torch import save_file

PROMPTS = [[(7 * n + 3) % 256 for n in range(length)] for length in (40, 5, 17)]
TOKENS = 12
RANKS = 3


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What three ranks say to each architecture, and what transformers does."""
    work = tmp_path_factory.mktemp("architectures")
    folders = {kind: architecture_checkpoint(work / kind, kind) for kind in FITTING}
    for kind in REFUSED:
        architecture_config(kind).save_pretrained(work / kind)
        byte_tokenizer().save_pretrained(work / kind)
        save_file({f"weight.{n}": torch.zeros(1) for n in range(200)}, work / kind / "model.safetensors")
    order = {
        "folders": {kind: str(work / kind) for kind in (*FITTING, *REFUSED)},
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
    for kind, folder in folders.items():
        found[kind]["wanted"] = [reference(folder, prompt, TOKENS) for prompt in PROMPTS]
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", FITTING)
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
