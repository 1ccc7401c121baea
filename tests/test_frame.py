"""Frames: what goes in comes out, and never more bytes than promised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.core import Row, SamplingParams, Step
from distllm.net.frame import Frame, Kind, StageTime, decode, encode, largest_bytes

whole = st.integers(0, 2**40)
params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 5),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.9),
    repetition_penalty=st.floats(0.5, 2),
    top_k=st.integers(0, 1000),
    seed=st.none() | st.integers(0, 2**63 - 1),
)
rows = st.builds(
    Row,
    request=whole,
    slot=st.integers(0, 63),
    start=whole,
    tokens=st.lists(whole, min_size=1, max_size=9).map(tuple),
    runs=st.lists(st.tuples(whole, whole), min_size=1, max_size=5).map(tuple),
    samples=st.booleans(),
    params=st.none() | params,
)
seconds = st.floats(0, 1e6)
times = st.lists(st.builds(StageTime, wait=seconds, body=seconds, head=seconds), max_size=6).map(tuple)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(rows, max_size=6).map(tuple), times, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2)
)
def test_a_step_comes_out_as_it_went_in(
    rows: tuple[Row, ...], times: tuple[StageTime, ...], dtype: torch.dtype, seed: int
) -> None:
    step = Step(7, rows)
    hidden = torch.randn(step.tokens, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
    room = largest_bytes(
        rows=len(rows),
        tokens=step.tokens,
        runs=sum(len(row.runs) for row in rows),
        stages=len(times),
        width=24,
        item_bytes=dtype.itemsize,
    )
    frame = Frame(kind=Kind.STEP, step=step, times=times, hidden=hidden if step.tokens else None)
    sent = encode(frame, torch.empty(room, dtype=torch.uint8))
    # A receiver's buffer is larger than what came, and holds what was there before.
    received = torch.full((room + 99,), 255, dtype=torch.uint8)
    received[: len(sent)] = sent
    out = decode(received, dtype)
    assert (out.kind, out.step, out.times) == (Kind.STEP, step, times)
    if step.tokens:
        assert out.hidden is not None
        assert torch.equal(out.hidden, hidden)


@pytest.mark.parametrize("kind", [Kind.TOKENS, Kind.PULSE, Kind.END])
def test_results_and_signs_of_life(kind: Kind) -> None:
    tokens = (5, 0, 2**31) if kind is Kind.TOKENS else ()
    frame = Frame(kind=kind, step=Step(3), tokens=tokens, times=(StageTime(0.5, 1.0, 0.25),))
    out = decode(encode(frame, torch.empty(1024, dtype=torch.uint8)), torch.float32)
    assert out == frame
