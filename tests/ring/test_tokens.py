"""The same tokens as transformers' generate() in fp32, however the model is split and the prompts are batched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fakes import KINDS, tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from distllm import LLM, SamplingParams
from distllm.config import ClusterConfig, EngineConfig, PlanConfig

TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair, we had everything before us. "
)
LENGTHS = (1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 32, 64, 100, 150, 223, 256, 400, 700, 1100, 1500)
FEW_LENGTHS = (1, 7, 17, 64, 130)


@dataclass(frozen=True)
class Case:
    """Prompts and what transformers answers to them."""

    folder: Path
    prompts: list[list[int]]
    answers: list[list[int]]
    max_tokens: int


def case(folder: Path, prompts: list[list[int]], max_tokens: int, *, use_cache: bool) -> Case:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=max_tokens, do_sample=False, use_cache=use_cache)
        answers.append(out[0, len(prompt) :].tolist())
    return Case(folder, prompts, answers, max_tokens)


def prose(folder: Path, lengths: Sequence[int]) -> list[list[int]]:
    """Prompts of these lengths, each beginning elsewhere in the text."""
    tokens = AutoTokenizer.from_pretrained(folder).encode(TEXT * 30)
    return [tokens[11 * index : 11 * index + length] for index, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def few(smollm2: Path) -> Case:
    return case(smollm2, prose(smollm2, FEW_LENGTHS), 12, use_cache=True)


@pytest.fixture(scope="module")
def many(smollm2: Path) -> Case:
    return case(smollm2, prose(smollm2, LENGTHS), 24, use_cache=True)


@contextmanager
def opened(folder: Path, ranks: int, layers: list[int] | None = None, chunk: int = 256) -> Iterator[LLM]:
    plan = PlanConfig() if layers is None else PlanConfig(strategy="manual", layers=layers)
    cluster = ClusterConfig(workers=ranks, threads=1)
    engine = EngineConfig(prompt_chunk=chunk, max_requests=32, kv_tokens=8192)
    with LLM(folder, dtype="float32", cluster=cluster, plan=plan, engine=engine) as llm:
        yield llm


def check_together(llm: LLM, wanted: Case) -> None:
    outputs = llm.generate(wanted.prompts, SamplingParams(max_tokens=wanted.max_tokens))
    assert [list(output.token_ids) for output in outputs] == wanted.answers
    assert llm.stats()["kv_blocks_used"] == 0


def check_alone(llm: LLM, wanted: Case) -> None:
    for prompt, answer in zip(wanted.prompts, wanted.answers, strict=True):
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=wanted.max_tokens))
        assert list(output.token_ids) == answer


@pytest.mark.parametrize(
    ("ranks", "layers", "chunk"),
    [(1, None, 256), (2, None, 16), pytest.param(5, [3, 10, 7, 10, 0], 256, marks=pytest.mark.slow)],
    ids=str,
)
def test_smollm2(few: Case, ranks: int, layers: list[int] | None, chunk: int) -> None:
    with opened(few.folder, ranks, layers, chunk) as llm:
        assert len(llm.plan.stages) == ranks
        check_together(llm, few)
        if ranks == 2:
            check_alone(llm, few)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chunk", [256, 16])
@pytest.mark.parametrize(
    ("ranks", "layers"),
    [
        (1, None),
        (2, None),
        (2, [30, 0]),
        (2, [3, 27]),
        (3, None),
        (3, [1, 28, 1]),
        (3, [20, 10, 0]),
        (5, None),
        (5, [2, 11, 5, 12, 0]),
    ],
    ids=str,
)
def test_smollm2_everywhere(many: Case, ranks: int, layers: list[int] | None, chunk: int) -> None:
    with opened(many.folder, ranks, layers, chunk) as llm:
        check_together(llm, many)
        check_alone(llm, many)


@pytest.fixture(scope="module")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A tiny model of one kind; prompts longer than its sliding window."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    prompts = [[(7 * index + 3 * length) % 256 for index in range(length)] for length in (1, 5, 16, 33, 70, 110)]
    return case(folder, prompts, 16, use_cache=False)


@pytest.mark.parametrize("tiny", ["gemma3_text", pytest.param("mixtral", marks=pytest.mark.slow)], indirect=True)
def test_tiny(tiny: Case) -> None:
    with opened(tiny.folder, 3, [2, 2, 1], 16) as llm:
        check_together(llm, tiny)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tiny", list(KINDS), indirect=True)
@pytest.mark.parametrize(
    ("ranks", "layers"), [(1, None), (2, None), (3, [1, 3, 1]), (5, None), (5, [2, 1, 1, 1, 0])], ids=str
)
def test_tiny_everywhere(tiny: Case, ranks: int, layers: list[int] | None) -> None:
    for chunk in (256, 16):
        with opened(tiny.folder, ranks, layers, chunk) as llm:
            check_together(llm, tiny)
            check_alone(llm, tiny)
