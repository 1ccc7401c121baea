"""Loads a model once in a process of its own, by distllm or by transformers, and tells what that took.

Run as `python -m distllm.bench.rivals.load`. Imports, and looking the model through, come before the clock starts.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

import psutil
import torch

from distllm.bench.rivals.pipe import Pipe
from distllm.core import Plan, Span, Stage
from distllm.engine import host
from distllm.model.blueprint import Blueprint

KV_TOKENS = 16


def by_distllm(folder: str, dtype: str, *, pack_weights: bool) -> tuple[object, float]:
    """All of the model as the only stage; with the seconds that it took."""
    blueprint = Blueprint(Path(folder), dtype=dtype, context_length=None)
    span = Span(0, blueprint.sizes.layers, embed=True, head=True)
    stage = Stage(rank=0, span=span, weight_bytes=0, kv_bytes=0, work_share=1.0)
    plan = Plan(stages=(stage,), idle=(), kv_tokens=KV_TOKENS)
    began = time.perf_counter()
    runner = blueprint.load(
        plan, 0, block_tokens=KV_TOKENS, max_requests=1, device=torch.device("cpu"), pack_weights=pack_weights
    )
    return runner, time.perf_counter() - began


def by_transformers(folder: str, dtype: str) -> tuple[object, float]:
    """transformers' `from_pretrained`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):  # its code is imported by this
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    return model, time.perf_counter() - began


def memory() -> tuple[int, int]:
    """Bytes of this process: all, and those that are no page of a file."""
    gc.collect()
    info = psutil.Process().memory_info()
    return info.rss, info.rss - info.shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--how", required=True, choices=["packed", "in-place", "transformers"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipe = Pipe()
    before, own_before = memory()
    if given.how == "transformers":
        model, seconds = by_transformers(given.folder, given.dtype)
    else:
        model, seconds = by_distllm(given.folder, given.dtype, pack_weights=given.how == "packed")
    _, own_after = memory()
    pipe.say(seconds=seconds, peak_bytes=host.peak_memory() - before, own_bytes=own_after - own_before)
    del model


if __name__ == "__main__":
    main()
