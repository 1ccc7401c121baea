"""A shard that takes over what another one has: the numbers are the same as if all was read; nothing is read twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from fakes import tiny_checkpoint

from distllm.config import QuantizationConfig
from distllm.core import Plan, Row, SamplingParams, Span, Stage, Step
from distllm.model.blueprint import Blueprint
from distllm.model.quantize import Recipe
from distllm.model.runner import Runner
from distllm.model.shard import Shard
from distllm.plan.replan import loaded_bytes

SLOW = pytest.mark.slow
CPU = torch.device("cpu")
WHOLE = Span(0, 5, embed=True, head=True)
# What a rank held, and what it is to hold.
MOVES = [
    (Span(0, 2, embed=True), Span(0, 3, embed=True)),
    (Span(0, 3, embed=True), Span(0, 1, embed=True)),
    (Span(0, 3, embed=True), WHOLE),
    (WHOLE, Span(0, 2, embed=True)),
    (Span(1, 3), Span(2, 5, head=True)),
    (Span(3, 5, head=True), Span(2, 5, head=True)),
    (Span(3, 5, head=True), Span(2, 4)),
    (Span(5, 5, head=True), Span(4, 5, head=True)),
    (Span(1, 2), Span(3, 4)),
    (WHOLE, WHOLE),
    (WHOLE, Span(2, 4)),
    (WHOLE, Span(3, 5, head=True)),
    (Span(1, 3), Span(1, 3)),
    (Span(0, 3, embed=True), Span(1, 2)),
    (Span(2, 5, head=True), Span(4, 4)),
]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda kind: tiny_checkpoint(tmp_path_factory.mktemp(kind), kind))


def load(known: Blueprint, span: Span, recipe: Recipe | None, *before: Shard) -> Runner:
    stage = Stage(rank=0, span=span, weight_bytes=0, kv_bytes=0, work_share=1.0)
    plan = Plan(stages=(stage,), idle=(), kv_tokens=64)
    runner = known.load(plan, 0, block_tokens=16, max_requests=2, device=CPU, recipe=recipe, before=before)
    assert runner is not None
    return runner


def result(runner: Runner, hidden_size: int) -> torch.Tensor:
    row = Row(0, 0, 0, (5, 6, 7), ((0, 1),), True, SamplingParams(seed=0))
    hidden_TD = torch.linspace(-1, 1, 3 * hidden_size).view(3, -1).to(runner.shard.dtype)
    return runner.run(Step(0, (row,)), None if runner.stage.span.embed else hidden_TD).tensor


@pytest.mark.parametrize(("held", "wanted"), MOVES, ids=str)
@pytest.mark.parametrize("held_as", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "kind", ["llama_tied", "gpt2", *(pytest.param(each, marks=SLOW) for each in ("llama", "mixtral"))]
)
def test_nothing_is_read_twice(
    kind: str, held_as: str, held: Span, wanted: Span, model_of: Callable[[str], Path]
) -> None:
    dtype = "float32" if held_as == "float32" else "bfloat16"
    known = Blueprint(model_of(kind), dtype=dtype, context_length=None)
    recipe = Recipe.of(QuantizationConfig(method="int8")) if held_as == "int8" else None
    before = load(known, held, recipe)
    result(before, known.hidden_size)
    after = load(known, wanted, recipe, before.shard)
    anew = load(known, wanted, recipe)
    assert torch.equal(result(after, known.hidden_size), result(anew, known.hidden_size))
    assert after.shard.nbytes == anew.shard.nbytes
    names = {name: tensor.shape for name, tensor in anew.shard.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in after.shard.model.state_dict().items()} == names
    in_files = Blueprint(model_of(kind), dtype="float32", context_length=None).sizes
    assert after.shard.read_bytes == loaded_bytes(in_files, held, wanted)


def test_what_was_taken_is_the_same_memory(model_of: Callable[[str], Path]) -> None:
    known = Blueprint(model_of("llama"), dtype="float32", context_length=None)
    before = load(known, Span(0, 3, embed=True), None)
    kept = before.shard.base.get_submodule(known.anatomy.layers)[1]
    shard, cache = before.shard, before.cache
    after = load(known, Span(0, 4, embed=True), None, shard)
    assert after.shard.base.get_submodule(known.anatomy.layers)[1] is kept
    assert not hasattr(shard, "model"), "what it had is in use elsewhere"
    assert after.cache is not cache
    assert after.shard.kept == {0, 1, 2, "embed"}


@pytest.mark.parametrize("wanted", [WHOLE, Span(2, 4)], ids=str)
def test_what_has_all_of_it_is_not_built_anew(wanted: Span, model_of: Callable[[str], Path]) -> None:
    known = Blueprint(model_of("llama"), dtype="float32", context_length=None)
    before = load(known, WHOLE, None)
    after = load(known, wanted, None, before.shard)
    assert after.shard is before.shard
    assert after.shard.span == wanted
    assert after.cache is not before.cache


def test_two_that_have_a_part_each(model_of: Callable[[str], Path]) -> None:
    known = Blueprint(model_of("llama"), dtype="float32", context_length=None)
    first, second = load(known, Span(1, 3), None), load(known, Span(3, 5, head=True), None)
    after = load(known, Span(1, 5, head=True), None, first.shard, second.shard)
    anew = load(known, Span(1, 5, head=True), None)
    assert after.shard.read_bytes == 0
    assert torch.equal(result(after, known.hidden_size), result(anew, known.hidden_size))
