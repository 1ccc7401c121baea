"""A rank reads and holds its own part: weight bytes add up; the peak is little above, even when layers move."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

SPARE_BYTES = 100 * 10**6

IDLE = """
from distllm.engine import process
from distllm.engine.host import peak_memory
from distllm.model import blueprint
from transformers import LlamaForCausalLM
print(peak_memory())
"""

RANKS = """
import json, sys
from dataclasses import replace
from distllm import LLM, SamplingParams
from distllm.config import ClusterConfig, EngineConfig, PlanConfig
from distllm.engine import job

plans = []

def one_layer_moves(plan, members, sizes, wish, min_gain):
    plans.append(plan)
    first, second, third = (stage.span.layers for stage in plan.stages)
    return job.partition(members, sizes, replace(wish, strategy="manual", layers=(first + 1, second, third - 1)))

job.rebalanced = one_layer_moves
engine = EngineConfig(kv_tokens=2048, prompt_chunk=64, max_requests=8)
plan = PlanConfig(calibrate=sys.argv[2] == "moved")
sections = {"cluster": ClusterConfig(workers=3, threads=1), "engine": engine, "plan": plan}
with LLM(sys.argv[1], dtype="bfloat16", quantization=sys.argv[3], weights=sys.argv[4], **sections) as llm:
    llm.generate(["hello"] * 3, SamplingParams(max_tokens=4, ignore_eos=True))
    plans.append(llm.plan)
    held = [[stage.weight_bytes for stage in plan.stages] for plan in plans]
    print(json.dumps({"ranks": llm.stats()["ranks"], "held": held}))
"""


def run(script: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=280, check=True
    )
    return done.stdout


def dense(*, layers: int, tied: bool) -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=1024,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=32_000,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
    )


def mixture() -> PretrainedConfig:
    """Of experts that lie in a tensor each in the files, and all together in the model."""
    return Qwen3MoeConfig(
        hidden_size=1024,
        moe_intermediate_size=512,
        num_experts=32,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=32_000,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def make_checkpoint(folder: Path, dtype: torch.dtype, config: PretrainedConfig) -> tuple[int, int]:
    """More than a gigabyte; gives the bytes of the whole and of its embedding table."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="300MB")
    byte_tokenizer().save_pretrained(folder)
    checkpoint = sum(parameter.nbytes for parameter in set(model.parameters()))
    assert checkpoint > 10**9
    return checkpoint, model.get_input_embeddings().weight.nbytes


def check_peaks(ranks: list[dict[str, int]], held: list[int], one_more: int = 0) -> None:
    """No rank's peak is far above what it held at most, with its KV and one more layer."""
    idle = int(run(IDLE))
    for rank in ranks:
        above = rank["peak_rss_bytes"] - idle
        most = 1.15 * held[rank["rank"]] + rank["kv_bytes"] + one_more + SPARE_BYTES
        assert above <= most, f"rank {rank['rank']}: {above:,} bytes above an idle import, at most {most:,.0f}"
        assert above > 0.5 * rank["weight_bytes"], "the peak should show that weights were read"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_rank_holds_its_own_part_and_little_more(tmp_path: Path, tied: bool, moved: bool) -> None:
    checkpoint, table = make_checkpoint(tmp_path, torch.bfloat16, dense(layers=18, tied=tied))
    told = json.loads(run(RANKS, str(tmp_path), "moved" if moved else "stays", "none", "own"))
    ranks, plans = told["ranks"], told["held"]
    assert len(plans) == 1 + moved
    assert (plans[0] != plans[-1]) == moved
    assert sum(rank["weight_bytes"] for rank in ranks) == checkpoint + table * tied
    layer = (checkpoint - table * (1 if tied else 2)) // 18
    again = sum(rank["read_bytes"] - held for rank, held in zip(ranks, plans[0], strict=True))
    assert round(again / layer, 2) == 2 * moved, "two ranks get one layer more each, and read nothing else"
    check_peaks(ranks, [max(held) for held in zip(*plans, strict=True)])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["none", "int8", "int4"])
def test_casting_and_quantizing_take_one_more_layer(tmp_path: Path, method: str) -> None:
    checkpoint, table = make_checkpoint(tmp_path, torch.float32, dense(layers=9, tied=True))
    told = json.loads(run(RANKS, str(tmp_path), "stays", method, "own"))
    layer = (checkpoint - table) // 9
    assert sum(rank["read_bytes"] for rank in told["ranks"]) == checkpoint + table
    assert sum(*told["held"]) < {"none": 0.56, "int8": 0.33, "int4": 0.25}[method] * checkpoint
    check_peaks(told["ranks"], *told["held"], one_more=layer + layer // 2)  # as it is stored, and cast


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["none", "int8", "int4"])
def test_experts_take_one_more_layer(tmp_path: Path, method: str) -> None:
    checkpoint, table = make_checkpoint(tmp_path, torch.bfloat16, mixture())
    told = json.loads(run(RANKS, str(tmp_path), "stays", method, "own"))
    layer = (checkpoint - table) // 10
    assert sum(rank["read_bytes"] for rank in told["ranks"]) == checkpoint + table
    assert sum(*told["held"]) < {"none": 1.06, "int8": 0.6, "int4": 0.42}[method] * checkpoint
    check_peaks(told["ranks"], *told["held"], one_more=2 * layer)  # as it is stored, and put together


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["none", "int4"])
def test_weights_that_are_sent_take_one_more_layer(tmp_path: Path, method: str) -> None:
    """Nothing of a rank is mapped then: a layer is there as it was sent, and packed or quantized."""
    checkpoint, table = make_checkpoint(tmp_path, torch.bfloat16, dense(layers=18, tied=True))
    told = json.loads(run(RANKS, str(tmp_path), "stays", method, "push"))
    assert sum(rank["read_bytes"] for rank in told["ranks"]) == checkpoint + table
    check_peaks(told["ranks"], *told["held"], one_more=(checkpoint - table) // 18)
