"""Faults that happen for certain, and requests that are under way meanwhile."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from processes import ranks_of
from waiting import WAIT_S, wait_until

from distllm import LLM, Output, SamplingParams
from distllm.config import ClusterConfig, EngineConfig, PlanConfig

DEADLINE_S = 2.0
TOKENS = 80
GREEDY = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=1.5, top_p=0.9, repetition_penalty=1.1, seed=7)
PROMPTS = ["a", "some words", "a longer prompt than the others", "z"]
LONG = "many words, " * 20


def strike(process: psutil.Process, sign: signal.Signals) -> None:
    """Sends a signal and proves that it did what it should."""
    process.send_signal(sign)
    struck = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) if sign == signal.SIGKILL else (psutil.STATUS_STOPPED,)
    wait_until(
        lambda: not process.is_running() or process.status() in struck,
        lambda: f"{sign} had no effect: {process.status()}",
        timeout_s=5,
    )


def tokens(outputs: Sequence[Output]) -> list[tuple[int, ...]]:
    return [output.token_ids for output in outputs]


def several(model: Path, ranks: int, *, plan: PlanConfig | None = None, **cluster: Any) -> LLM:
    plan = plan or PlanConfig(calibrate=False)
    sections: dict[str, Any] = {"engine": EngineConfig(kv_tokens=8192, prompt_chunk=32), "plan": plan}
    return LLM(
        model,
        dtype="float32",
        cluster=ClusterConfig(workers=ranks, threads=1, **{"deadline_s": 30.0, "restarts": 0} | cluster),
        **sections,
    )


def workers() -> dict[int, psutil.Process]:
    """The ranks that this process has started, by rank."""
    return ranks_of(psutil.Process())


class Running:
    """Requests under way in a thread of their own."""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self._llm = llm
        self._outputs: list[Output] = []
        self._ended: list[int] = []
        self._thread = threading.Thread(target=self._run, args=(params,), daemon=True)
        self._before = self.sampled
        self._thread.start()

    @property
    def sampled(self) -> int:
        done: Any = self._llm.stats()["tokens"]
        return int(done)

    def _run(self, params: SamplingParams) -> None:
        self._outputs = self._llm.generate(
            [*PROMPTS, LONG], params, on_output=lambda out: self._ended.append(out.index)
        )

    def wait_for(self, count: int) -> None:
        wait_until(lambda: self.sampled >= self._before + count, "no token came", WAIT_S)
        assert self._thread.is_alive(), "over before the fault"

    def tokens(self) -> list[tuple[int, ...]]:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "requests hang"
        assert sorted(self._ended) == list(range(len(PROMPTS) + 1)), "every request ends exactly once"
        return tokens(self._outputs)
