"""Layers move when the stages' times say so, and nobody can tell from the tokens."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from fakes import tiny_checkpoint
from torch import Tensor

from distllm import LLM, EngineError, SamplingParams
from distllm.config import ClusterConfig, EngineConfig, PlanConfig
from distllm.core import Step
from distllm.engine import job, pace
from distllm.engine.calibrate import Timing, time_stages
from distllm.engine.pipeline import Pipeline
from distllm.model.runner import Result, Runner

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = ["abc", "a longer prompt", "z"]


def layers(llm: LLM) -> list[int]:
    return [stage.span.layers for stage in llm.plan.stages]


def test_layers_move_to_the_faster_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint(tmp_path, "llama", num_hidden_layers=8)
    timed: list[Timing] = []

    def as_if_rank_0_were_slow(pipeline: Pipeline, engine: EngineConfig) -> Timing:
        timed.append(time_stages(pipeline, engine))
        assert pipeline.in_flight == 0
        _, second = timed[0].layer_seconds
        return replace(timed[0], layer_seconds=(10 * second, second))

    cluster = ClusterConfig(workers=2, threads=1)
    with LLM(folder, cluster=cluster, plan=PlanConfig(calibrate=False)) as llm:
        before, wanted = layers(llm), [each.token_ids for each in llm.generate(PROMPTS, PARAMS)]
    monkeypatch.setattr(job, "time_stages", as_if_rank_0_were_slow)
    with caplog.at_level(logging.INFO, "distllm"), LLM(folder, cluster=cluster) as llm:
        assert "moving layers between ranks to even out the measured times" in caplog.messages
        assert layers(llm)[0] < before[0]
        assert sum(layers(llm)) == 8
        assert [each.token_ids for each in llm.generate(PROMPTS, PARAMS)] == wanted
        assert llm.stats()["kv_blocks_used"] == 0
    (timing,) = timed
    assert min(timing.layer_seconds) > 0
    assert timing.head_seconds > 0


@pytest.mark.parametrize("steps_in_flight", [1, 5])
def test_stages_are_timed_in_little_room(tmp_path: Path, steps_in_flight: int) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    engine = EngineConfig(kv_tokens=48, block_tokens=16, max_requests=3, steps_in_flight=steps_in_flight)
    with LLM(folder, cluster=ClusterConfig(workers=2, threads=1), engine=engine) as llm:
        assert len(llm.generate("abc", PARAMS)[0].token_ids) == 12
    assert not psutil.Process().children()


@pytest.mark.slow
def test_slow_ranks_get_short_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk as configured would take twice the deadline; the same ring breaks if it starts with one."""
    run = Runner.run

    def slow_run(self: Runner, step: Step, hidden: Tensor | None) -> Result:
        time.sleep(0.01 * step.tokens)
        return run(self, step, hidden)

    folder = tiny_checkpoint(tmp_path, "llama")
    cluster, plan = ClusterConfig(workers=2, threads=1, deadline_s=2), PlanConfig(calibrate=False)
    prompt = list(range(200)) * 2
    with LLM(folder, cluster=ClusterConfig(threads=1)) as llm:
        wanted = llm.generate([prompt], PARAMS)
    monkeypatch.setattr(Runner, "run", slow_run)
    with LLM(folder, cluster=cluster, plan=plan, engine=EngineConfig(prompt_chunk=400)) as llm:
        assert llm.generate([prompt], PARAMS)[0].token_ids == wanted[0].token_ids
    monkeypatch.setattr(pace, "FIRST_CHUNK", 400)
    llm = LLM(folder, cluster=cluster, plan=plan, engine=EngineConfig(prompt_chunk=400))
    with llm, pytest.raises(EngineError, match=r"was rank 0 busy for longer than cluster\.deadline_s"):
        llm.generate([prompt], PARAMS)


def test_more_steps_in_flight_than_the_ring_holds_do_not_stand_still(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    cluster = ClusterConfig(workers=2, threads=1, deadline_s=5)
    with LLM(folder, cluster=cluster, engine=EngineConfig(steps_in_flight=12)) as llm:
        assert [len(each.token_ids) for each in llm.generate(["abc"] * 24, PARAMS)] == [12] * 24
