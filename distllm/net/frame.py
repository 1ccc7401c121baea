"""How a step travels: a fixed head of integers, the row table, the hidden states. No pickle.

A frame is one uint8 tensor:

    int64 x 8   kind, step id, integers in the table, stage times, rows and columns of the hidden states, bytes of
                masks, 0
    int64 x n   the table: the rows of the step, or the tokens that were sampled and how likely they were
    float64 x m what each stage has done so far: seconds waiting, in the layers, in the head, and bytes sent
    bytes       masks, one behind the other: the tokens that some rows may sample
    bytes       hidden states, at a multiple of 64
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch

from distllm.core import MOST_BIASES, MOST_COPIES, MOST_LOGPROBS, Logprob, Row, SamplingParams, Step

HEAD = 8
ROW = 9
ALIGN = 64
PARAMS = struct.Struct("<ddddddqqqqq")
PARAMS_WORDS = PARAMS.size // 8 + 2 * MOST_BIASES
LOGPROB_WORDS = 2 * (1 + MOST_LOGPROBS) + 1
NO_STEP = Step(-1)


class Kind(IntEnum):
    """What a frame is: work, its result, a sign of life when there is no work, or the end of the epoch."""

    STEP = 1
    TOKENS = 2
    PULSE = 3
    END = 4


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds that one stage spent on one step, and the bytes of frames that it sent since it told so last."""

    wait: float
    body: float
    head: float
    sent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One message of the ring. `hidden` is (T, D); `tokens` are those of the rows that sample, in row order.

    `logprobs` are of those tokens whose rows asked for it, by their places among the tokens.
    """

    kind: Kind
    step: Step = NO_STEP
    tokens: tuple[int, ...] = ()
    logprobs: tuple[tuple[int, Logprob], ...] = ()
    times: tuple[StageTime, ...] = ()
    hidden: torch.Tensor | None = None


def largest_bytes(
    *, rows: int, tokens: int, runs: int, stages: int, width: int, item_bytes: int, mask_bytes: int
) -> int:
    """The size of the largest frame of an epoch: that many rows, tokens and runs of blocks in one step."""
    row = max(ROW + 3 * MOST_COPIES + PARAMS_WORDS, LOGPROB_WORDS)
    integers = HEAD + rows * row + tokens + 2 * runs + 4 * stages
    return integers * 8 + rows * mask_bytes + 2 * ALIGN + tokens * width * item_bytes


def encode(frame: Frame, into: torch.Tensor) -> torch.Tensor:
    """Writes a frame into a buffer, uint8, and returns the part that it fills."""
    table = list(_table(frame.step.rows)) if frame.kind is Kind.STEP else list(_results(frame))
    times = [number for time in frame.times for number in (time.wait, time.body, time.head, time.sent)]
    hidden = frame.hidden
    shape = tuple(hidden.shape) if hidden is not None else (0, 0)
    masks = b"".join(row.allowed for row in frame.step.rows)
    head = (frame.kind, frame.step.id, len(table), len(times), *shape, len(masks), 0)
    packed = struct.pack(f"<{HEAD}q{len(table)}q{len(times)}d", *head, *table, *times) + masks
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
    kind, step_id, integers, floats, rows, columns, masked, _ = struct.unpack_from(f"<{HEAD}q", raw)
    table = struct.unpack_from(f"<{integers}q", raw, HEAD * 8)
    flat = struct.unpack_from(f"<{floats}d", raw, (HEAD + integers) * 8)
    spent = zip(flat[::4], flat[1::4], flat[2::4], flat[3::4], strict=True)
    times = tuple(StageTime(wait, body, head, int(sent)) for wait, body, head, sent in spent)
    end = (HEAD + integers + floats) * 8
    masks = bytes(raw[end : end + masked])
    hidden = None
    if rows:
        begin = -(-(end + masked) // ALIGN) * ALIGN
        hidden = buffer[begin : begin + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)
    if kind == Kind.STEP:
        return Frame(kind=Kind.STEP, step=Step(step_id, tuple(_rows(table, masks))), times=times, hidden=hidden)
    tokens, logprobs = _tokens(table)
    return Frame(kind=Kind(kind), step=Step(step_id), tokens=tokens, logprobs=logprobs, times=times)


def _results(frame: Frame) -> Iterator[int]:
    """The number of tokens, the tokens, and of some of them their places, log-probabilities and alternatives."""
    yield len(frame.tokens)
    yield from frame.tokens
    for place, each in frame.logprobs:
        yield from (place, _as_integer(each.logprob), len(each.top))
        yield from (number for token, logprob in each.top for number in (token, _as_integer(logprob)))


def _tokens(table: Sequence[int]) -> tuple[tuple[int, ...], tuple[tuple[int, Logprob], ...]]:
    at = 1 + table[0]
    tokens, logprobs = tuple(table[1:at]), []
    while at < len(table):
        place, logprob, count = table[at : at + 3]
        at += 3
        flat = table[at : at + 2 * count]
        at += 2 * count
        top = tuple((token, _as_float(bits)) for token, bits in zip(flat[::2], flat[1::2], strict=True))
        logprobs.append((place, Logprob(tokens[place], _as_float(logprob), top)))
    return tokens, tuple(logprobs)


def _as_integer(number: float) -> int:
    return int.from_bytes(struct.pack("<d", number), "little", signed=True)


def _as_float(bits: int) -> float:
    return float(struct.unpack("<d", bits.to_bytes(8, "little", signed=True))[0])


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
            len(row.allowed),
            len(row.copies),
        )
        yield from (number for run in row.runs for number in run)
        yield from (number for copy in row.copies for number in copy)
        yield from row.tokens
        if row.params is not None:
            yield from _params_as_integers(row.params, row.prompt)


def _rows(table: Sequence[int], masks: bytes) -> Iterator[Row]:
    at = masked = 0
    while at < len(table):
        request, slot, start, tokens, runs, samples, has_params, mask_bytes, copied = table[at : at + ROW]
        at += ROW
        blocks = _grouped(table[at : at + 2 * runs], 2)
        at += 2 * runs
        copies = _grouped(table[at : at + 3 * copied], 3)
        at += 3 * copied
        ids = tuple(table[at : at + tokens])
        at += tokens
        params, prompt = None, 0
        if has_params:
            params, prompt, words = _params_from_integers(table[at : at + PARAMS_WORDS])
            at += words
        allowed = masks[masked : masked + mask_bytes]
        masked += mask_bytes
        yield Row(request, slot, start, ids, blocks, bool(samples), params, prompt, allowed, copies)


def _grouped(integers: Sequence[int], size: int) -> tuple[Any, ...]:
    return tuple(zip(*(integers[place::size] for place in range(size)), strict=True))


def _params_as_integers(params: SamplingParams, prompt: int) -> Iterator[int]:
    """What the last stage needs of them; the end of a text is the master's business."""
    numbers = (params.temperature, params.top_p, params.min_p)
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    seed = -1 if params.seed is None else params.seed
    logprobs = -1 if params.logprobs is None else params.logprobs
    packed = PARAMS.pack(*numbers, *penalties, params.top_k, seed, logprobs, len(params.logit_bias), prompt)
    yield from struct.unpack(f"<{PARAMS.size // 8}q", packed)
    yield from (number for token, bias in params.logit_bias for number in (token, _as_integer(bias)))


def _params_from_integers(integers: Sequence[int]) -> tuple[SamplingParams, int, int]:
    """The parameters, the length of the prompt, and how many of the integers those are."""
    fixed = PARAMS.size // 8
    unpacked = PARAMS.unpack(struct.pack(f"<{fixed}q", *integers[:fixed]))
    temperature, top_p, min_p, repetition, presence, frequency, top_k, seed, logprobs, biases, prompt = unpacked
    words = fixed + 2 * biases
    flat = integers[fixed:words]
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=tuple((token, _as_float(bits)) for token, bits in zip(flat[::2], flat[1::2], strict=True)),
        logprobs=None if logprobs < 0 else logprobs,
        top_k=top_k,
        seed=None if seed < 0 else seed,
    )
    return params, prompt, words
