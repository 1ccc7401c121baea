"""Attention over the cache against a softmax written out in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distllm.core import Row, Step
from distllm.model.attention import (
    ATTENTION,
    INSPECTION,
    AskedMask,
    AttentionKind,
    AttentionRecorder,
    CachedAttention,
    asked_mask,
    attention,
    register,
)
from distllm.model.cache import KVCache, KVShape, Layout

CPU = torch.device("cpu")
BLOCK = 4
BLOCKS = 64
SINK = 0.8  # times the number of the head


@dataclass(frozen=True)
class Sizes:
    heads: int = 6
    groups: int = 2
    key: int = 16
    value: int = 16


class Layer(nn.Module):
    """What an attention function sees of the module that calls it."""

    def __init__(self, answers: CachedAttention | AttentionRecorder, index: int = 0) -> None:
        super().__init__()
        self.layer_idx = index
        self.distllm = answers


def naive(query_HtK: Tensor, keys_GLK: Tensor, values_GLK: Tensor, start: int, **asked: Any) -> Tensor:
    """One row token by token and head by head; (t, H, K)."""
    window, chunk, softcap, scale = (asked.get(name) for name in ("window", "chunk", "softcap", "scale"))
    heads, tokens, size = query_HtK.shape
    out = torch.zeros(tokens, heads, values_GLK.shape[2], dtype=torch.float64)
    for head in range(heads):
        group = head // (heads // keys_GLK.shape[0])
        for token in range(tokens):
            position = start + token
            first = 0 if window is None else max(0, position - int(window) + 1)
            first = first if chunk is None else position // int(chunk) * int(chunk)
            scores_L = keys_GLK[group, first : position + 1] @ query_HtK[head, token]
            scores_L = scores_L * (size**-0.5 if scale is None else scale)
            if softcap is not None:
                scores_L = torch.tanh(scores_L / softcap) * softcap
            if asked.get("sinks"):
                scores_L = torch.cat([scores_L, torch.tensor([SINK * head], dtype=torch.float64)])
            weights_L = scores_L.softmax(0)[: position + 1 - first]
            out[token, head] = weights_L @ values_GLK[group, first : position + 1]
    return out


def runs_of(lengths: list[int], *, scatter: bool) -> list[tuple[tuple[int, int], ...]]:
    blocks = list(range(BLOCKS))
    if scatter:
        random.Random(0).shuffle(blocks)
    found = []
    for length in lengths:
        need = -(-length // BLOCK)
        mine, blocks = blocks[:need], blocks[need:]
        found.append(tuple((block, 1) for block in mine) if scatter else ((mine[0], need),))
    return found


def compare(
    rows: list[tuple[int, int]],
    *,
    sizes: Sizes = Sizes(),
    scatter: bool = False,
    dtype: torch.dtype = torch.float32,
    **asked: Any,
) -> None:
    """Rows of (start, stop) in one step: the past is put into the cache by hand, the rest goes through attention."""
    noise = torch.Generator().manual_seed(0)
    shape = KVShape(sizes.groups, sizes.key, sizes.value)
    cache = KVCache({0: shape}, BLOCK * BLOCKS, dtype, CPU)
    for tensor in cache[0]:
        tensor.fill_(float("nan"))  # a place that nobody wrote must not be read
    queries, keys, values, expected = [], [], [], []
    runs = runs_of([stop for _, stop in rows], scatter=scatter)
    for (start, stop), table in zip(rows, runs, strict=True):
        q = (torch.randn(sizes.heads, stop - start, sizes.key, generator=noise) * 2).to(dtype)
        k = torch.randn(sizes.groups, stop, sizes.key, generator=noise).to(dtype)
        v = torch.randn(sizes.groups, stop, sizes.value, generator=noise).to(dtype)
        blocks = [first + more for first, length in table for more in range(length)]
        for position in range(start):
            place = blocks[position // BLOCK] * BLOCK + position % BLOCK
            cache[0][0][:, place], cache[0][1][:, place] = k[:, position], v[:, position]
        queries.append(q)
        keys.append(k[:, start:])
        values.append(v[:, start:])
        expected.append(naive(q.double(), k.double(), v.double(), start, **asked))
    answers = CachedAttention(cache, {0: AttentionKind(shape, asked.get("window"), asked.get("chunk"))})
    step = Step(0, tuple(Row(n, n, a, (0,) * (b - a), runs[n], samples=False) for n, (a, b) in enumerate(rows)))
    answers.layout = Layout.of(step, BLOCK, CPU)
    packed = [torch.cat(parts, dim=1)[None] for parts in (queries, keys, values)]
    out, weights = attention(
        Layer(answers),
        *packed,
        None,
        scaling=asked.get("scale"),
        softcap=asked.get("softcap"),
        s_aux=torch.arange(sizes.heads, dtype=dtype) * SINK if asked.get("sinks") else None,
    )
    assert weights is None
    assert out.dtype == dtype
    assert out.shape == (1, sum(b - a for a, b in rows), sizes.heads, sizes.value)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out[0].double(), torch.cat(expected), atol=tolerance, rtol=tolerance)


# Whole prompts, chunks that begin in the middle, single tokens, at the edges of blocks and windows.
ROWS = {
    "prompt": [(0, 13)],
    "chunk": [(7, 18)],
    "token": [(18, 19)],
    "first token": [(0, 1)],
    "mixed": [(0, 9), (20, 21), (5, 17), (0, 1), (31, 32), (16, 40)],
}


@pytest.mark.parametrize("scatter", [False, True], ids=["in place", "gathered"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("window", [None, 1, 5, 13, 18, 100])
@pytest.mark.parametrize("rows", ROWS)
def test_rows_see_what_they_should(rows: str, window: int | None, softcap: float | None, scatter: bool) -> None:
    compare(ROWS[rows], window=window, softcap=softcap, scatter=scatter)


@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
@pytest.mark.parametrize("rows", ROWS)
def test_chunks(rows: str, chunk: int) -> None:
    compare(ROWS[rows], chunk=chunk)
    compare(ROWS[rows], chunk=chunk, sinks=True, scatter=True)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("window", [None, 1, 13])
@pytest.mark.parametrize("rows", ROWS)
def test_sinks_take_a_part_and_give_nothing(rows: str, window: int | None, softcap: float | None) -> None:
    compare(ROWS[rows], window=window, softcap=softcap, sinks=True)
    compare(ROWS[rows], window=window, softcap=softcap, sinks=True, dtype=torch.bfloat16)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize(
    "sizes",
    [Sizes(4, 4), Sizes(9, 3), Sizes(8, 1), Sizes(6, 2, key=24, value=8), Sizes(4, 2, key=8, value=24)],
    ids=["no groups", "nine over three", "one group", "small values", "large values"],
)
def test_shapes_of_heads(sizes: Sizes, softcap: float | None) -> None:
    compare(ROWS["mixed"], sizes=sizes, softcap=softcap)
    compare(ROWS["mixed"], sizes=sizes, softcap=softcap, window=6, scatter=True)


@pytest.mark.parametrize("softcap", [None, 50.0], ids=["plain", "softcap"])
def test_scale_of_the_layer(softcap: float | None) -> None:
    compare(ROWS["mixed"], scale=0.7, softcap=softcap)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
def test_bfloat16(softcap: float | None) -> None:
    compare(ROWS["mixed"], window=12, softcap=softcap, scatter=True, dtype=torch.bfloat16)


def test_layers_of_a_step_may_have_masks_of_their_own() -> None:
    """Masks are kept for a step; a layer must not get the mask of another kind of layer."""
    shape = KVShape(1, 8, 8)
    kinds = [AttentionKind(shape, window=4), AttentionKind(shape), AttentionKind(shape, window=9)]
    kinds += [AttentionKind(shape, chunk=4)]
    answers = CachedAttention(KVCache(dict.fromkeys(range(4), shape), 64, torch.float32, CPU), dict(enumerate(kinds)))
    step = Step(0, (Row(0, 0, 0, (0,) * 20, ((0, 5),), samples=False),))
    answers.layout = Layout.of(step, BLOCK, CPU)
    q, k, v = (torch.randn(1, 1, 20, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    for layer, kind in enumerate(kinds):
        out, _ = attention(Layer(answers, layer), q, k, v, None)
        expected = naive(q[0].double(), k[0].double(), v[0].double(), 0, window=kind.window, chunk=kind.chunk)
        torch.testing.assert_close(out[0].double(), expected, atol=1e-5, rtol=1e-5)
    assert len(answers.layout.masks) == 3


def test_keys_and_values_are_kept_where_the_layout_says() -> None:
    cache = KVCache({5: KVShape(2, 4, 4)}, 32, torch.float32, CPU)
    for tensor in cache[5]:
        tensor.zero_()
    answers = CachedAttention(cache, {5: AttentionKind(KVShape(2, 4, 4))})
    answers.layout = Layout.of(Step(0, (Row(0, 0, 0, (0,) * 6, ((6, 1), (2, 1)), samples=False),)), BLOCK, CPU)
    q, k, v = torch.randn(1, 4, 6, 4), torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    attention(Layer(answers, 5), q, k, v, None)
    places = [24, 25, 26, 27, 8, 9]
    assert torch.equal(cache[5][0][:, places], k[0])
    assert torch.equal(cache[5][1][:, places], v[0])
    untouched = [place for place in range(32) if place not in places]
    assert not cache[5][0][:, untouched].any()


# What is asked


def test_what_is_not_built_is_refused() -> None:
    recorder = AttentionRecorder()
    q = torch.zeros(1, 2, 1, 4)
    with pytest.raises(NotImplementedError, match="needs aaa, zzz"):
        attention(Layer(recorder), q, q, q, None, zzz=1, aaa=False)
    with pytest.raises(NotImplementedError, match="masks of its own"):
        attention(Layer(recorder), q, q, q, torch.ones(1, 1, 1, 1))
    with pytest.raises(NotImplementedError, match="does not know the number of its layer"):
        attention(nn.Identity(), q, q, q, None)
    assert not recorder.kinds
    attention(Layer(recorder), q, q, q, None, s_aux=None, dropout=0.0, use_cache=False, is_causal=True)
    assert recorder.kinds
    with pytest.raises(NotImplementedError, match="layer 0 asks for attention more than once"):
        attention(Layer(recorder), q, q, q, None)


def test_a_recorder_notes_what_a_layer_asks() -> None:
    recorder = AttentionRecorder()
    q, k, v = torch.zeros(1, 6, 1, 8), torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 4)
    layer = Layer(recorder, 3)
    out, _ = attention(layer, q, k, v, AskedMask(7), sliding_window=9, softcap=30.0)
    assert out.shape == (1, 1, 6, 4)
    assert recorder.kinds[3] == (layer, AttentionKind(KVShape(2, 8, 4), window=7)), "the mask rules"


def test_a_chunk_is_no_window() -> None:
    window = AttentionKind(KVShape(1, 8, 8), window=4)
    chunk = window.chunked()
    assert [window.since(position) for position in range(9)] == [0, 0, 0, 0, 1, 2, 3, 4, 5]
    assert [chunk.since(position) for position in range(9)] == [0, 0, 0, 0, 4, 4, 4, 4, 8]
    assert AttentionKind(KVShape(1, 8, 8)).since(8) == 0


def test_masks_that_a_model_changes_are_refused() -> None:
    assert asked_mask(local_size=8, use_vmap=False, dtype=torch.float32) == AskedMask(8)
    assert asked_mask() == AskedMask(None)
    with pytest.raises(NotImplementedError, match="masks of its own"):
        asked_mask(use_vmap=True)


def test_registering_twice_changes_nothing() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    register()
    register()
    assert AttentionInterface()[ATTENTION] is AttentionInterface()[INSPECTION] is attention
    assert AttentionMaskInterface()[INSPECTION] is asked_mask
    assert ATTENTION not in AttentionMaskInterface(), "transformers would make masks in every step"
