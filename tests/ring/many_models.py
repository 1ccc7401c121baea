"""Run on every rank by a test: opens one model after the other on the same ranks and notes what each answers."""

import json
import os
import sys
from pathlib import Path

from distllm import LLM, SamplingParams, serve_here
from distllm.config import EngineConfig, PlanConfig

if os.environ["RANK"] != "0":
    sys.exit(serve_here())

work = json.loads(Path(sys.argv[1]).read_text())
answers = {}
for kind, folder in work["folders"].items():
    try:
        plan = PlanConfig(strategy="manual", layers=work["layers"])
        with LLM(folder, dtype="float32", plan=plan, engine=EngineConfig(prompt_chunk=16, kv_tokens=2048)) as llm:
            outputs = llm.generate(work["prompts"], SamplingParams(max_tokens=work["max_tokens"]))
            answers[kind] = {"tokens": [output.token_ids for output in outputs], "ranks": len(llm.plan.stages)}
    except ValueError as error:
        answers[kind] = {"refused": str(error)}
Path(work["output"]).write_text(json.dumps(answers))
