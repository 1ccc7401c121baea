"""Blueprints: what is known of a model before a weight is read, and what is refused then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from fakes import CONTEXT, tiny_checkpoint
from safetensors.torch import load_file

from distllm.core import Plan, Row, SamplingParams, Span, Stage, Step
from distllm.model.blueprint import Blueprint
from distllm.model.checkpoint import SINGLE
from distllm.model.linear import PackedLinear, has_kernels

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"))


def blueprint(folder: Path, dtype: str = "auto", context_length: int | None = None) -> Blueprint:
    return Blueprint(folder, dtype=dtype, context_length=context_length)


def test_what_is_known_before_loading(folder: Path) -> None:
    known = blueprint(folder)
    assert known.hidden_size == 64
    assert known.dtype == torch.float32
    assert known.sizes.layers == 5
    assert known.sizes.context_length == CONTEXT
    assert known.sizes.embed_bytes == 320 * 64 * 4
    assert known.sizes.head_bytes == (320 * 64 + 64) * 4
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64
    assert known.sizes.layer_bytes == (layer * 4,) * 5
    assert known.sizes.kv_bytes == (2 * 2 * 16 * 4,) * 5


def test_sizes_follow_the_dtype(folder: Path) -> None:
    full, half = blueprint(folder), blueprint(folder, "bfloat16")
    whole = Span(0, 5, embed=True, head=True)
    assert half.dtype == torch.bfloat16
    stored = sum(tensor.nbytes for tensor in load_file(folder / SINGLE).values())
    assert half.sizes.weight_bytes(whole) * 2 == full.sizes.weight_bytes(whole) == stored
    assert half.sizes.kv_bytes_per_token(whole) * 2 == full.sizes.kv_bytes_per_token(whole)


def test_a_shorter_context(folder: Path) -> None:
    assert blueprint(folder, context_length=100).sizes.context_length == 100
    assert blueprint(folder, context_length=CONTEXT).sizes.context_length == CONTEXT
    with pytest.raises(ValueError, match=f"model.context_length={CONTEXT + 1}: the model allows {CONTEXT} tokens"):
        blueprint(folder, context_length=CONTEXT + 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": "nonesuch"}, "does not know this model"),
        ({"num_hidden_layers": 6}, "no tensor for model.layers.5"),
        ({"intermediate_size": 256}, "but config.json asks for"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path, change: dict[str, object], reason: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=reason):
        blueprint(copy)


def test_a_rank_gets_what_the_plan_gives_it(folder: Path) -> None:
    known = blueprint(folder)
    spans = (Span(0, 3, embed=True), Span(3, 5, head=True))
    stages = tuple(
        Stage(rank=rank, span=span, weight_bytes=0, kv_bytes=0, work_share=0.5)
        for rank, span in zip((0, 2), spans, strict=True)
    )
    plan = Plan(stages=stages, idle=(1,), kv_tokens=64)
    read: list[int] = []
    runner = known.load(plan, 2, block_tokens=16, max_requests=2, device=CPU, progress=read.append)
    assert runner is not None
    assert runner.stage == stages[1]
    assert runner.shard.span == spans[1]
    assert runner.shard.nbytes == known.sizes.weight_bytes(spans[1]) == sum(read)
    assert runner.cache.tokens == 64
    assert runner.cache.nbytes == 64 * known.sizes.kv_bytes_per_token(spans[1])
    assert not any(isinstance(module, PackedLinear) for module in runner.shard.model.modules()), "fp32 stays as it is"
    assert known.load(plan, 1, block_tokens=16, max_requests=2, device=CPU) is None
    assert known.load(plan, 7, block_tokens=16, max_requests=2, device=CPU) is None


@pytest.mark.skipif(not has_kernels(torch.bfloat16), reason="this CPU has no kernels of its own for bfloat16")
@pytest.mark.parametrize("span", [Span(0, 3, embed=True), Span(3, 5, head=True), Span(0, 5, embed=True, head=True)])
def test_packed_weights_are_all_that_is_held_and_change_nothing(span: Span, tmp_path: Path) -> None:
    known = blueprint(tiny_checkpoint(tmp_path, "llama_tied"), "bfloat16")
    stage = Stage(rank=0, span=span, weight_bytes=0, kv_bytes=0, work_share=1.0)
    plan = Plan(stages=(stage,), idle=(), kv_tokens=64)
    torch.manual_seed(0)
    hidden_TD = None if span.embed else torch.randn(3, 64, dtype=torch.bfloat16)
    step = Step(0, (Row(0, 0, 0, (5, 6, 7), ((0, 1),), True, SamplingParams(seed=0)),))
    made = []
    for pack in (True, False):
        done: list[int] = []
        runner = known.load(
            plan, 0, block_tokens=16, max_requests=2, device=CPU, pack_weights=pack, progress=done.append
        )
        assert runner is not None
        assert runner.shard.nbytes == known.sizes.weight_bytes(span)
        assert 0.85 * runner.shard.nbytes < sum(done) <= runner.shard.nbytes
        packed = sum(isinstance(module, PackedLinear) for module in runner.shard.model.modules())
        assert packed == (7 * span.layers + (span.head and not span.embed) if pack else 0)
        made.append(runner.run(step, hidden_TD).tensor)
    assert torch.equal(*made)
