"""Started from shards alone: each rank has a folder of its own, with no weights but its own stage's file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import Job, agent_per_rank
from fakes import byte_tokenizer, reference, tiny_checkpoint

from distllm.config import ClusterConfig, PlanConfig
from distllm.core import SamplingParams
from distllm.llm import LLM
from distllm.shards import get_shard_paths, shard_model

PROMPT = "Once upon a time"
TOKENS = 12
Start = Callable[[Sequence[Sequence[str]]], Job]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, so that the last rank needs the first one's table."""
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "llama_tied", num_hidden_layers=12)


@pytest.fixture(scope="module")
def answer(model: Path) -> list[int]:
    return reference(model, byte_tokenizer().encode(PROMPT), TOKENS)


def homes_of(shards: Path, folder: Path) -> list[Path]:
    """For each stage a home whose `model` has manifest, small files and the stage's own file."""
    paths = get_shard_paths(shards)
    homes = [folder / f"home{rank}" for rank in range(len(paths))]
    for home, path in zip(homes, paths, strict=True):
        shutil.copytree(shards, home / "model", ignore=shutil.ignore_patterns("*.safetensors"))
        shutil.copy(path, home / "model")
    return homes


def commands(homes: Sequence[Path], *words: str) -> list[list[str]]:
    """One torchrun for each rank, as on hosts of their own."""
    asked = ["model.path=~/model", f"prompt={PROMPT}", f"sampling.max_tokens={TOKENS}", *words]
    pairs = zip(homes, agent_per_rank(len(homes), *asked), strict=True)
    return [["env", f"HOME={home}", *command] for home, command in pairs]


def test_each_rank_has_its_own_file_alone(model: Path, answer: list[int], tmp_path: Path, start: Start) -> None:
    """The first rank has so much more that layers would be moved, if the others had their files."""
    shard_model(model, tmp_path / "shards", layers=[10, 1, 1])
    homes = homes_of(tmp_path / "shards", tmp_path)
    assert [len(list((home / "model").glob("*.safetensors"))) for home in homes] == [1, 1, 1]
    job = start(commands(homes, "plan.min_gain=0"))
    assert job.wait(120) == [0, 0, 0], job.err.read_text()
    assert job.out.read_text().strip("\n") == byte_tokenizer().decode(answer, skip_special_tokens=True)
    said = job.err.read_text()
    for held in ("embeddings + layers 0-9", "layers 10-10", "layers 11-11 + head"):
        assert f" holds {held}, " in said
    assert "moving layers" not in said


def test_a_rank_whose_file_is_damaged_is_named(model: Path, tmp_path: Path, start: Start) -> None:
    """Rank 0 has never seen the file, but knows from its manifest what should be in it."""
    shard_model(model, tmp_path / "shards", stages=2)
    homes = homes_of(tmp_path / "shards", tmp_path)
    path = homes[1] / "model" / "stage-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (homes[1] / "model" / "manifest.json").unlink()
    job = start(commands(homes, "model.verify=true"))
    assert job.wait(120)[0] != 0
    (error,) = job.errors()
    assert "rank 1 (" in error
    assert f"{path}: tensor model." in error
    assert "is not the one of manifest.json" in error


@pytest.mark.slow
def test_with_all_files_another_split_works(model: Path, answer: list[int], tmp_path: Path) -> None:
    shard_model(model, tmp_path / "shards", stages=2, by="layers")
    plan = PlanConfig(strategy="manual", layers=[2, 10])
    with LLM(tmp_path / "shards", workers=2, cluster=ClusterConfig(threads=1), plan=plan) as llm:
        assert [stage.span.layers for stage in llm.plan.stages] == [2, 10]
        (output,) = llm.generate([PROMPT], SamplingParams(max_tokens=TOKENS))
    assert list(output.token_ids) == answer
