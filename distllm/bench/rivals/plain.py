"""distllm itself with its weights as they are, as the rival of one that quantizes them.

Run as `python -m distllm.bench.rivals.plain`.
"""

from __future__ import annotations

import argparse
import json
import time

from distllm.bench.rivals.pipe import Job, Pipe
from distllm.config import ClusterConfig, EngineConfig, ModelConfig, PlanConfig
from distllm.core import SamplingParams
from distllm.llm import LLM


def answer(llm: LLM, job: Job) -> dict[str, object]:
    """Continues all prompts of a job at once, greedily."""
    params = SamplingParams(max_tokens=job["new_tokens"], ignore_eos=True, seed=0)
    began = time.perf_counter()
    outputs = llm.generate(job["prompts"], params)
    return {"tokens": [each.token_ids for each in outputs], "seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--sections", type=json.loads, required=True, help="options of model, plan and engine")
    given = parser.parse_args()
    model = ModelConfig(**given.sections.get("model", {}) | {"path": given.folder, "dtype": given.dtype})
    plan, engine = PlanConfig(**given.sections.get("plan", {})), EngineConfig(**given.sections.get("engine", {}))
    pipe = Pipe(abrupt=False)  # the other ranks are ended first
    with LLM(model, cluster=ClusterConfig(workers=given.ranks, threads=1), plan=plan, engine=engine) as llm:
        pipe.say(ready=True)
        for job in pipe.jobs():
            pipe.say(**answer(llm, job))


if __name__ == "__main__":
    main()
