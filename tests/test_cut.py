"""Cuts into files: every stage holds something, they follow each other, and no other cut is better."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.core import ModelSizes, Span
from distllm.plan.cut import cut_as_told, cut_by_bytes, cut_by_layers
from distllm.plan.partition import Split


def sizes(*layer_bytes: int, embed: int = 5, head: int = 5, tied: int = 0) -> ModelSizes:
    return ModelSizes(
        layer_bytes=layer_bytes,
        embed_bytes=embed,
        head_bytes=head,
        tied_bytes=tied,
        kv_bytes=(1,) * len(layer_bytes),
        layer_work=(1.0,) * len(layer_bytes),
        head_work=1.0,
        context_length=100,
    )


@st.composite
def models(draw: st.DrawFn) -> ModelSizes:
    head = draw(st.integers(1, 40))
    layers = draw(st.lists(st.integers(0, 20), min_size=1, max_size=6))
    return sizes(*layers, embed=draw(st.integers(0, 40)), head=head, tied=draw(st.integers(0, head)))


def all_cuts(layers: int, stages: int) -> list[Split]:
    """Every split into stages of which none is empty."""
    found = []
    for cuts in combinations_with_replacement(range(layers + 1), stages - 1):
        bounds = pairwise((0, *cuts, layers))
        spans = [Span(a, b, embed=i == 0, head=i == stages - 1) for i, (a, b) in enumerate(bounds)]
        if not any(span.is_empty for span in spans):
            found.append(tuple(spans))
    return found


def counts(split: Split) -> list[int]:
    return [span.layers for span in split]


@settings(max_examples=150, deadline=None)
@given(model=models(), data=st.data())
def test_by_bytes_no_cut_has_a_smaller_largest_stage(model: ModelSizes, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, model.layers + 2))
    every = all_cuts(model.layers, stages)
    split = cut_by_bytes(model, stages)
    assert split in every
    assert max(map(model.weight_bytes, split)) == min(max(map(model.weight_bytes, each)) for each in every)


@settings(max_examples=100, deadline=None)
@given(model=models(), data=st.data())
def test_by_layers_all_are_about_equal(model: ModelSizes, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, model.layers))
    split = cut_by_layers(model, stages)
    assert split in all_cuts(model.layers, stages)
    assert max(counts(split)) - min(counts(split)) <= 1
    assert counts(split) == sorted(counts(split), reverse=True)


def test_the_ends_weigh_by_bytes_and_not_by_layers() -> None:
    model = sizes(*[10] * 8, embed=40, head=40, tied=40)
    assert counts(cut_by_bytes(model, 4)) == [0, 4, 4, 0]
    assert counts(cut_by_layers(model, 4)) == [2, 2, 2, 2]


def test_beside_the_largest_the_others_are_about_equal() -> None:
    assert sorted(counts(cut_by_bytes(sizes(*[10] * 30, embed=0, head=1), 4))) == [7, 7, 8, 8]


def test_many_stages_take_no_time() -> None:
    assert len(cut_by_bytes(sizes(*[10] * 100), 64)) == 64


def test_a_cut_as_told() -> None:
    assert counts(cut_as_told(sizes(1, 1, 1), [0, 3, 0])) == [0, 3, 0]
    with pytest.raises(ValueError, match=r"plan\.layers=\[1, 1\] gives 2 layers to 2 ranks; the model has 3 layers"):
        cut_as_told(sizes(1, 1, 1), [1, 1])
    with pytest.raises(ValueError, match=r"plan\.layers=\[1, 0, 2\]: stage 1 would hold nothing; leave its 0 out"):
        cut_as_told(sizes(1, 1, 1), [1, 0, 2])


def test_too_many_stages() -> None:
    with pytest.raises(ValueError, match=r"shard\.stages=4: the model has 3 layers; give fewer"):
        cut_by_layers(sizes(1, 1, 1), 4)
    with pytest.raises(ValueError, match=r"shard\.stages=6: the model has 3 layers and two ends; give fewer"):
        cut_by_bytes(sizes(1, 1, 1), 6)
