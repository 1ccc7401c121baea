"""Ranks that have nothing to do do nothing, and nobody else can reach them."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
from sockets import listening

from distllm import LLM, SamplingParams
from distllm.config import ClusterConfig

IDLE_S = 8.0


def test_idle_ranks_use_no_cpu_and_listen_on_loopback_only(endless: Path) -> None:
    # A short deadline makes the pulse as frequent as anybody would want it.
    with LLM(endless, cluster=ClusterConfig(workers=3, threads=1, deadline_s=4)) as llm:
        llm.generate(["abc"], SamplingParams(max_tokens=4))
        ranks = [psutil.Process(), *psutil.Process().children()]
        assert len(ranks) == 3
        time.sleep(1.0)
        before = [sum(rank.cpu_times()[:2]) for rank in ranks]
        time.sleep(IDLE_S)
        used = [(sum(rank.cpu_times()[:2]) - start) / IDLE_S for rank, start in zip(ranks, before, strict=True)]
        assert max(used) < 0.02, f"share of a core of each idle rank: {used}"
        for rank in ranks:
            assert listening(rank.pid) == {"127.0.0.1"}
        assert llm.generate(["abc"], SamplingParams(max_tokens=4))[0].token_ids, "the idle ring still works"
