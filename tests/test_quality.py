"""What fewer bits cost: how far the next-token distributions of real models are from those of unrounded weights.

`alice.txt` is the beginning of Alice's Adventures in Wonderland (Lewis Carroll, 1865), which is in the public domain.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from distllm.config import QuantizationConfig
from distllm.core import Plan, Row, Span, Stage, Step
from distllm.model.blueprint import Blueprint
from distllm.model.cache import Layout
from distllm.model.quantize import Recipe
from distllm.model.runner import Runner

TEXT = Path(__file__).parent / "alice.txt"
TOKENS, CHUNK, BLOCK_TOKENS = 4000, 100, 16
CPU = torch.device("cpu")
# Mean KL divergence in nats. SmolLM2's weights come from a file of 4 bits in groups of 32, which int4 finds again.
MOST = {"int8": 0.01, "bnb_int8": 0.05, "int4": 0.1, "int4, head int8": 0.01, "bnb_nf4": 0.4}
# Another model to measure: a folder of a checkpoint.
OTHER = os.environ.get("DISTLLM_QUALITY_MODEL")


class Reader:
    """A whole model that reads a text chunk by chunk."""

    def __init__(self, folder: Path, quantization: QuantizationConfig | None) -> None:
        blueprint = Blueprint(folder, dtype="bfloat16", context_length=None)
        span = Span(0, blueprint.sizes.layers, embed=True, head=True)
        stage = Stage(rank=0, span=span, weight_bytes=0, kv_bytes=0, work_share=1.0)
        runner = blueprint.load(
            Plan(stages=(stage,), idle=(), kv_tokens=TOKENS + BLOCK_TOKENS),
            0,
            block_tokens=BLOCK_TOKENS,
            max_requests=1,
            device=CPU,
            recipe=Recipe.of(quantization) if quantization else None,
        )
        assert runner is not None
        self._runner: Runner = runner

    def log_probabilities(self, start: int, tokens: list[int]) -> torch.Tensor:
        """Of the token after each of these, (tokens, V)."""
        blocks = TOKENS // BLOCK_TOKENS + 1
        step = Step(0, (Row(0, 0, start, tuple(tokens), ((0, blocks),), True),))
        layout = Layout.of(step, BLOCK_TOKENS, CPU)
        logits_TV = self._runner.shard.forward(torch.tensor(tokens), layout, torch.arange(len(tokens)))
        return torch.log_softmax(logits_TV.float(), dim=-1)


def _quantization(method: str, head: str = "auto") -> QuantizationConfig:
    return QuantizationConfig(method=method, head=head)


def divergences(folder: Path) -> dict[str, float]:
    """The mean KL divergence of each method from bfloat16."""
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT.read_text())["input_ids"][:TOKENS]
    assert len(tokens) >= TOKENS - 100
    exact = Reader(folder, None)
    readers = {name: Reader(folder, _quantization(*name.split(", head "))) for name in MOST}
    sums = dict.fromkeys(MOST, 0.0)
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        wanted_TV = exact.log_probabilities(start, chunk)
        for method, reader in readers.items():
            got_TV = reader.log_probabilities(start, chunk)
            sums[method] += (wanted_TV.exp() * (wanted_TV - got_TV)).sum().item()
    return {method: total / len(tokens) for method, total in sums.items()}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_distributions_of_smollm2_stay_near(smollm2: Path) -> None:
    found = divergences(smollm2)
    print(found)
    assert all(0 < found[method] < most for method, most in MOST.items()), found


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(OTHER is None, reason="DISTLLM_QUALITY_MODEL names no folder of another model")
def test_the_distributions_of_another_model_stay_near() -> None:
    found = divergences(Path(str(OTHER)))
    print(found)
    assert 0 < found["int8"] < 0.01
    assert found["int8"] < found["int4"]
