"""The engines of a benchmark, behind one face: prompts in, a timed batch out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol, TypedDict, cast

from distllm.bench.figures import OURS, Batch, StageSpent
from distllm.core import EngineError, SamplingParams
from distllm.llm import LLM

Prompts = Sequence[tuple[int, ...]]


class Engine(Protocol):
    """Answers all prompts at once, greedily and regardless of the end of text."""

    @property
    def name(self) -> str: ...

    def run(self, prompts: Prompts, new_tokens: int) -> Batch:
        """
        Raises:
            EngineError: the engine ended, or did not answer in time.
        """


class RankStats(TypedDict):
    """What `LLM.stats()` tells of a rank, as far as it is used here."""

    rank: int
    span: str
    wait_s: float
    layers_s: float
    head_s: float


class Ours:
    """distllm itself."""

    name = OURS

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def run(self, prompts: Prompts, new_tokens: int) -> Batch:
        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, seed=0)
        asked = [list(prompt) for prompt in prompts]
        before = self._spent()
        began = time.perf_counter()
        outputs = self._llm.generate(asked, params)
        seconds = time.perf_counter() - began
        stages = tuple(late - early for late, early in zip(self._spent(), before, strict=True))
        return checked(
            Batch(tokens=tuple(each.token_ids for each in outputs), seconds=seconds, stages=stages),
            self.name,
            requests=len(prompts),
            new_tokens=new_tokens,
        )

    def _spent(self) -> list[StageSpent]:
        stats = self._llm.stats()
        steps = cast(int, stats["steps"])
        return [
            StageSpent(
                rank=each["rank"],
                span=each["span"],
                steps=steps,
                wait_s=each["wait_s"],
                layers_s=each["layers_s"],
                head_s=each["head_s"],
            )
            for each in cast(list[RankStats], stats["ranks"])
        ]


def checked(batch: Batch, name: str, *, requests: int, new_tokens: int) -> Batch:
    """The batch, if it is whole: rates of answers of different lengths would compare nothing.

    Raises:
        EngineError: an answer is missing or has another length.
    """
    lengths = sorted({len(each) for each in batch.tokens})
    if len(batch.tokens) != requests or lengths != [new_tokens]:
        raise EngineError(
            f"{name} gave {len(batch.tokens)} answers of {lengths} tokens; asked for {requests} of {new_tokens}"
        )
    return batch
