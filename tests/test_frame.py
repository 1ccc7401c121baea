"""Frames: what goes in comes out, and never more bytes than promised."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.core import MOST_BIASES, MOST_COPIES, MOST_LOGPROBS, Logprob, Row, SamplingParams, Step
from distllm.net.frame import Frame, Kind, StageTime, decode, encode, largest_bytes

whole = st.integers(0, 2**40)
params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 5),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.9),
    repetition_penalty=st.floats(0.5, 2),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.lists(st.tuples(st.integers(0, 2**20), st.floats(-100, 100)), max_size=5),
    logprobs=st.none() | st.integers(0, MOST_LOGPROBS),
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
    params=st.none(),
    allowed=st.sampled_from([b"", b"\x05\xff\x00", b"\x01" * 64]),
    copies=st.lists(st.tuples(whole, whole, whole), max_size=MOST_COPIES).map(tuple),
) | st.builds(
    Row,
    request=whole,
    slot=st.just(1),
    start=st.just(0),
    tokens=st.just((1, 2)),
    runs=st.just(((0, 1),)),
    samples=st.just(True),
    params=params,
    prompt=whole,
)
seconds = st.floats(0, 1e6)
times = st.lists(st.builds(StageTime, wait=seconds, body=seconds, head=seconds, sent=whole), max_size=6).map(tuple)


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
        mask_bytes=max((len(row.allowed) for row in rows), default=0),
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


def test_the_largest_parameters_and_results_have_room() -> None:
    bias = dict.fromkeys(range(MOST_BIASES), -1.5)
    row = Row(1, 0, 0, (5,), ((0, 1),), True, SamplingParams(seed=0, logit_bias=bias), 1, b"allowed")
    row = replace(row, copies=((1, 2, 3),) * MOST_COPIES)
    likely = Logprob(5, -0.5, tuple((token, -float(token)) for token in range(MOST_LOGPROBS)))
    room = torch.empty(
        largest_bytes(rows=3, tokens=3, runs=3, stages=1, width=0, item_bytes=2, mask_bytes=7), dtype=torch.uint8
    )
    step = Frame(kind=Kind.STEP, step=Step(7, (row,) * 3))
    assert decode(encode(step, room), torch.float32) == step
    tokens = Frame(kind=Kind.TOKENS, step=Step(7), tokens=(5,) * 3, logprobs=tuple((i, likely) for i in range(3)))
    assert decode(encode(tokens, room), torch.float32) == tokens


@pytest.mark.parametrize("kind", [Kind.TOKENS, Kind.PULSE, Kind.END])
def test_results_and_signs_of_life(kind: Kind) -> None:
    tokens = (5, 0, 2**31) if kind is Kind.TOKENS else ()
    frame = Frame(kind=kind, step=Step(3), tokens=tokens, times=(StageTime(0.5, 1.0, 0.25, 2**40),))
    out = decode(encode(frame, torch.empty(1024, dtype=torch.uint8)), torch.float32)
    assert out == frame
