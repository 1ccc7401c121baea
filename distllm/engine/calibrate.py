"""How long each stage takes for a step, measured on a ring that has nothing else to do.

As many steps are under way as there will be later, because stages that share a host slow each other down.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from distllm.config import EngineConfig
from distllm.core import Row, SamplingParams, Step
from distllm.engine.pipeline import Done, Pipeline

ROWS = 8
STEPS = 12
# On a slow model fewer steps will do, but never fewer than two rounds, of which the first is to warm up.
ENOUGH_S = 2.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one decode step with a few rows: in the layers of each stage, and in the head."""

    layer_seconds: tuple[float, ...]
    head_seconds: float


def time_stages(pipeline: Pipeline, engine: EngineConfig) -> Timing:
    """The median times of a few steps, after those that warm up.

    Raises:
        WireBroken: the ring is gone.
    """
    wanted = pipeline.steps_in_flight
    places = min(ROWS * wanted, engine.max_requests, pipeline.kv_blocks)
    together = min(wanted, places)
    done = _run(pipeline, _steps(together, places // together), together)[together:]
    stages = list(zip(*(each.times for each in done), strict=True))
    return Timing(
        layer_seconds=tuple(median(time.body for time in times) for times in stages),
        head_seconds=median(time.head for time in stages[-1]),
    )


def _steps(together: int, rows: int) -> Iterator[Step]:
    """Steps of one token a row, numbered so that the last one is before step 0.

    Those that are under way together have slots and blocks of their own.
    """
    params = SamplingParams(seed=0)
    for number in range(-STEPS - 2 * together, 0):
        first = number % together * rows
        places = range(first, first + rows)
        yield Step(number, tuple(Row(-1, place, 0, (0,), ((place, 1),), True, params) for place in places))


def _run(pipeline: Pipeline, steps: Iterator[Step], together: int) -> list[Done]:
    """All steps, or as many as come home in good time, in order."""
    began = time.perf_counter()
    done: list[Done] = []
    for _ in range(together):
        pipeline.send(next(steps))
    while len(done) < STEPS + together and (len(done) < 2 * together or time.perf_counter() - began < ENOUGH_S):
        done.append(pipeline.receive())
        pipeline.send(next(steps))
    return done + [pipeline.receive() for _ in range(together)]
