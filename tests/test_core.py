"""The nouns: their rules, their arithmetic, their words."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from distllm.core import Member, ModelSizes, Plan, Row, SamplingParams, Span, Stage, Step

# Layers of different weights, so that a wrong slice gives a wrong sum.
SIZES = ModelSizes(
    layer_bytes=(1, 10, 100, 1000),
    embed_bytes=20_000,
    head_bytes=50_000,
    tied_bytes=19_000,
    kv_bytes=(2, 4, 8, 16),
    layer_work=(0.5, 1.0, 2.0, 4.0),
    head_work=8.0,
    context_length=64,
)


def stage(rank: int, start: int, stop: int) -> Stage:
    return Stage(rank=rank, span=Span(start, stop), weight_bytes=0, kv_bytes=0, work_share=0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", ("a", 3)),
    ],
)
def test_params_out_of_range_are_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^sampling\.{name}=.*must be"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "edge",
    [
        {"max_tokens": 1},
        {"temperature": 0},
        {"top_k": 0},
        {"top_p": 1},
        {"min_p": 0},
        {"min_p": 0.999},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"seed": None},
        {"stop": ()},
        {"repetition_penalty": 0.01},
    ],
)
def test_params_at_the_edge_are_taken(edge: dict[str, Any]) -> None:
    params = SamplingParams(**edge)
    assert {name: getattr(params, name) for name in edge} == edge


def test_stop_is_one_text_or_several() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_params_are_values() -> None:
    params = SamplingParams(seed=3, stop=("x",))
    assert pickle.loads(pickle.dumps(params)) == params == SamplingParams(seed=3, stop=("x",))
    assert hash(params) == hash(SamplingParams(seed=3, stop=("x",)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("span", "text", "layers", "empty"),
    [
        (Span(0, 10, embed=True), "embeddings + layers 0-9", 10, False),
        (Span(10, 20), "layers 10-19", 10, False),
        (Span(20, 21, head=True), "layers 20-20 + head", 1, False),
        (Span(0, 5, embed=True, head=True), "embeddings + layers 0-4 + head", 5, False),
        (Span(0, 0, embed=True), "embeddings", 0, False),
        (Span(5, 5, head=True), "head", 0, False),
        (Span(3, 3), "nothing", 0, True),
    ],
)
def test_span_says_what_it_holds(span: Span, text: str, layers: int, empty: bool) -> None:
    assert (str(span), span.layers, span.is_empty) == (text, layers, empty)


@pytest.mark.parametrize(
    ("span", "weights", "kv", "work"),
    [
        (Span(1, 3), 110, 12, 3.0),
        (Span(0, 2, embed=True), 20_011, 6, 1.5),
        (Span(2, 4, head=True), 51_100, 24, 14.0),
        (Span(0, 4, embed=True, head=True), 52_111, 30, 15.5),
        (Span(4, 4, head=True), 50_000, 0, 8.0),
        (Span(2, 2), 0, 0, 0.0),
    ],
)
def test_sizes_add_up_the_span(span: Span, weights: int, kv: int, work: float) -> None:
    assert (SIZES.weight_bytes(span), SIZES.kv_bytes_per_token(span), SIZES.work(span)) == (weights, kv, work)
    assert SIZES.layers == 4


def test_parts_weigh_as_much_as_the_whole_but_for_what_is_tied() -> None:
    parts = [Span(0, 1, embed=True), Span(1, 3), Span(3, 4, head=True)]
    whole = Span(0, 4, embed=True, head=True)
    assert sum(map(SIZES.weight_bytes, parts)) == SIZES.weight_bytes(whole) + SIZES.tied_bytes
    assert sum(map(SIZES.kv_bytes_per_token, parts)) == SIZES.kv_bytes_per_token(whole)


def test_plan_finds_the_stage_of_a_rank() -> None:
    plan = Plan(stages=(stage(0, 0, 2), stage(3, 2, 4)), idle=(1,), kv_tokens=64)
    assert plan.stage_of(3) is plan.stages[1]
    assert plan.stage_of(0) is plan.stages[0]
    assert plan.stage_of(1) is None


def test_step_counts_the_tokens_of_its_rows() -> None:
    rows = tuple(
        Row(request=i, slot=i, start=start, tokens=tokens, runs=(), samples=True)
        for i, (start, tokens) in enumerate([(0, (5, 6, 7)), (9, (1,))])
    )
    assert (Step(1, rows).tokens, Step(2).tokens) == (4, 0)
    assert (Step(1, rows).has_prompt, Step(1, rows[1:]).has_prompt, Step(2).has_prompt) == (True, False, False)
    assert Step(1, (dataclasses.replace(rows[1], samples=False),)).has_prompt
    assert [row.stop for row in rows] == [3, 10]


def test_member_is_named_by_rank_host_and_pid() -> None:
    member = Member(life="x", rank=2, host="lab", boot_id="b", pid=77, memory_bytes=1, cores=1)
    assert str(member) == "rank 2 (host lab, pid 77)"
