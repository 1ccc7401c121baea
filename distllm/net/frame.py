"""How a step travels: a fixed head of integers, the row table, the hidden states. No pickle.

A frame is one uint8 tensor:

    int64 x 8   kind, step id, integers in the table, stage times, rows and columns of the hidden states, 0, 0
    int64 x n   the table: the rows of the step, or the tokens that were sampled
    float64 x m what each stage has done so far: seconds waiting, in the layers, in the head
    bytes       hidden states, at a multiple of 64
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from distllm.core import Row, SamplingParams, Step

HEAD = 8
ALIGN = 64
PARAMS = struct.Struct("<ddddqq")
NO_STEP = Step(-1)


class Kind(IntEnum):
    """What a frame is: work, its result, a sign of life when there is no work, or the end of the epoch."""

    STEP = 1
    TOKENS = 2
    PULSE = 3
    END = 4


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds that one stage spent on one step."""

    wait: float
    body: float
    head: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One message of the ring. `hidden` is (T, D); `tokens` are those of the rows that sample, in row order."""

    kind: Kind
    step: Step = NO_STEP
    tokens: tuple[int, ...] = ()
    times: tuple[StageTime, ...] = ()
    hidden: torch.Tensor | None = None


def largest_bytes(*, rows: int, tokens: int, runs: int, stages: int, width: int, item_bytes: int) -> int:
    """The size of the largest frame of an epoch: that many rows, tokens and runs of blocks in one step."""
    integers = HEAD + rows * (7 + PARAMS.size // 8) + tokens + 2 * runs + 3 * stages
    return integers * 8 + 2 * ALIGN + tokens * width * item_bytes


def encode(frame: Frame, into: torch.Tensor) -> torch.Tensor:
    """Writes a frame into a buffer, uint8, and returns the part that it fills."""
    table = list(_table(frame.step.rows)) if frame.kind is Kind.STEP else list(frame.tokens)
    times = [seconds for time in frame.times for seconds in (time.wait, time.body, time.head)]
    hidden = frame.hidden
    shape = tuple(hidden.shape) if hidden is not None else (0, 0)
    head = (frame.kind, frame.step.id, len(table), len(times), *shape, 0, 0)
    packed = struct.pack(f"<{HEAD}q{len(table)}q{len(times)}d", *head, *table, *times)
    into[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    end = len(packed)
    if hidden is not None:
        begin = -(-end // ALIGN) * ALIGN
        end = begin + hidden.nbytes
        into[begin:end].view(hidden.dtype).view(shape).copy_(hidden)
    return into[:end]


def decode(buffer: torch.Tensor, dtype: torch.dtype) -> Frame:
    """Reads a frame; its hidden states are a view of the buffer."""
    raw: memoryview = buffer.numpy().data
    kind, step_id, integers, floats, rows, columns, _, _ = struct.unpack_from(f"<{HEAD}q", raw)
    table = struct.unpack_from(f"<{integers}q", raw, HEAD * 8)
    flat = struct.unpack_from(f"<{floats}d", raw, (HEAD + integers) * 8)
    times = tuple(StageTime(*flat[i : i + 3]) for i in range(0, floats, 3))
    hidden = None
    if rows:
        begin = -(-(HEAD + integers + floats) * 8 // ALIGN) * ALIGN
        hidden = buffer[begin : begin + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)
    if kind == Kind.STEP:
        return Frame(kind=Kind.STEP, step=Step(step_id, tuple(_rows(table))), times=times, hidden=hidden)
    return Frame(kind=Kind(kind), step=Step(step_id), tokens=table, times=times)


def _table(rows: Sequence[Row]) -> Iterator[int]:
    for row in rows:
        yield from (
            row.request,
            row.slot,
            row.start,
            len(row.tokens),
            len(row.runs),
            row.samples,
            row.params is not None,
        )
        yield from (number for run in row.runs for number in run)
        yield from row.tokens
        if row.params is not None:
            yield from _params_as_integers(row.params)


def _rows(table: Sequence[int]) -> Iterator[Row]:
    at = 0
    while at < len(table):
        request, slot, start, tokens, runs, samples, has_params = table[at : at + 7]
        at += 7
        flat = table[at : at + 2 * runs]
        at += 2 * runs
        ids = tuple(table[at : at + tokens])
        at += tokens
        params = None
        if has_params:
            params = _params_from_integers(table[at : at + PARAMS.size // 8])
            at += PARAMS.size // 8
        yield Row(request, slot, start, ids, tuple(zip(flat[::2], flat[1::2], strict=True)), bool(samples), params)


def _params_as_integers(params: SamplingParams) -> tuple[int, ...]:
    """What the last stage needs of them; the end of a text is the master's business."""
    numbers = (params.temperature, params.top_p, params.min_p, params.repetition_penalty)
    packed = PARAMS.pack(*numbers, params.top_k, -1 if params.seed is None else params.seed)
    return struct.unpack(f"<{PARAMS.size // 8}q", packed)


def _params_from_integers(integers: Sequence[int]) -> SamplingParams:
    packed = struct.pack(f"<{len(integers)}q", *integers)
    temperature, top_p, min_p, penalty, top_k, seed = PARAMS.unpack(packed)
    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        top_k=top_k,
        seed=None if seed < 0 else seed,
    )
