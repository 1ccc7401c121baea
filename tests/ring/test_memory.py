"""A rank reads and holds its own part: weight bytes add up; the peak is little above, even when layers move."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

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
with LLM(sys.argv[1], cluster=ClusterConfig(workers=3, threads=1), engine=engine, plan=plan) as llm:
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


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_rank_holds_its_own_part_and_little_more(tmp_path: Path, tied: bool, moved: bool) -> None:
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=8192,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=32_000,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="300MB")
    byte_tokenizer().save_pretrained(tmp_path)
    checkpoint = sum(parameter.nbytes for parameter in set(model.parameters()))
    table = model.get_input_embeddings().weight.nbytes
    del model
    assert checkpoint > 10**9
    idle = int(run(IDLE))
    told = json.loads(run(RANKS, str(tmp_path), "moved" if moved else "stays"))
    ranks, most_held = told["ranks"], [max(held) for held in zip(*told["held"], strict=True)]
    assert len(told["held"]) == 1 + moved
    assert (told["held"][0] != told["held"][-1]) == moved
    assert sum(rank["weight_bytes"] for rank in ranks) == checkpoint + table * tied
    assert [rank["read_bytes"] for rank in ranks] == [rank["weight_bytes"] for rank in ranks]
    for rank in ranks:
        above = rank["peak_rss_bytes"] - idle
        most = 1.15 * most_held[rank["rank"]] + rank["kv_bytes"] + SPARE_BYTES
        assert above <= most, f"rank {rank['rank']}: {above:,} bytes above an idle import, at most {most:,.0f}"
        assert above > 0.5 * rank["weight_bytes"], "the peak should show that weights were read"
