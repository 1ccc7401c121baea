"""Weights in fewer bits on a ring: the same tokens however the model is split, and what each rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
from fakes import tiny_checkpoint

from distllm import LLM, SamplingParams
from distllm.config import ClusterConfig, EngineConfig, PlanConfig, QuantizationConfig

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = ["abc", "a longer prompt of some forty characters.", "z"]


def answers(folder: Path, ranks: int, quantization: QuantizationConfig) -> tuple[list[Sequence[int]], list[int]]:
    """Tokens of each prompt, and bytes of weights that each rank holds; the plan knew them before."""
    plan = PlanConfig(strategy="manual", layers=[5] if ranks == 1 else [2, 3])
    cluster = ClusterConfig(workers=ranks, threads=1)
    engine = EngineConfig(kv_tokens=1024)
    with LLM(folder, cluster=cluster, plan=plan, engine=engine, quantization=quantization) as llm:
        tokens = [each.token_ids for each in llm.generate(PROMPTS, PARAMS)]
        held = [rank["held_bytes"] for rank in cast(list[dict[str, int]], llm.stats()["ranks"])]
        if quantization.method != "bnb_nf4":  # whose layers have a code book each
            assert held == [stage.weight_bytes for stage in llm.plan.stages]
        return tokens, held


@pytest.mark.parametrize("method", ["int8", "int4", "bnb_nf4"])
def test_the_split_changes_no_token(tmp_path: Path, method: str) -> None:
    folder = tiny_checkpoint(tmp_path, "llama_tied")
    quantization = QuantizationConfig(method=method)
    whole, (bytes_whole,) = answers(folder, 1, quantization)
    split, bytes_split = answers(folder, 2, quantization)
    assert split == whole
    assert sum(bytes_split) == pytest.approx(bytes_whole, rel=0.01), "a quantized head shares nothing with the table"


def test_some_ranks_quantize_and_others_do_not(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    _, exact_bytes = answers(folder, 2, QuantizationConfig())
    _, all_bytes = answers(folder, 2, QuantizationConfig(method="int8"))
    _, mixed_bytes = answers(folder, 2, QuantizationConfig(method="int8", stages=[1]))
    assert mixed_bytes == [exact_bytes[0], all_bytes[1]]
    assert all_bytes[0] < 0.7 * exact_bytes[0]
    assert all_bytes[1] < 0.7 * exact_bytes[1]


def test_a_rank_that_is_not_there_cannot_quantize(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"^quantization\.stages names rank 2: the job has ranks 0 to 1$"):
        answers(folder, 2, QuantizationConfig(method="int8", stages=[0, 2]))
