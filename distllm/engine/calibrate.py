"""How long each stage takes for a step, measured on a ring that has nothing else to do."""

from __future__ import annotations

from dataclasses import dataclass

from distllm.config import EngineConfig
from distllm.core import Row, SamplingParams, Step
from distllm.engine.pipeline import Done, Pipeline

ROWS = 4
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one decode step with a few rows: in the layers of each stage, and in the head."""

    layer_seconds: tuple[float, ...]
    head_seconds: float


def time_stages(pipeline: Pipeline, engine: EngineConfig) -> Timing:
    """Sends a few steps round one at a time; the quickest counts, the first is only to warm up.

    Raises:
        WireBroken: the ring is gone.
    """
    rows = min(ROWS, engine.max_requests, pipeline.kv_tokens // engine.block_tokens)
    done = [_one(pipeline, step, rows) for step in range(-ROUNDS, 0)][1:]
    stages = list(zip(*(each.times for each in done), strict=True))
    return Timing(
        layer_seconds=tuple(min(time.body for time in times) for times in stages),
        head_seconds=min(time.head for time in stages[-1]),
    )


def _one(pipeline: Pipeline, step: int, rows: int) -> Done:
    params = SamplingParams(seed=0)
    pipeline.send(Step(step, tuple(Row(-1, row, 0, (0,), ((row, 1),), True, params) for row in range(rows))))
    return pipeline.receive()
