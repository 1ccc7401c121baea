"""transformers' own `generate`: in one process, or under torchrun as its native pipeline parallel.

Run as `python -m distllm.bench.rivals.generate`; knows nothing of distllm's engine.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.distributed import DistributedConfig

from distllm.bench.rivals.pipe import Job, Pipe

IDLE_TIMEOUT = timedelta(days=1)
"""The longest that a rank may wait for rank 0's next job."""


def load(folder: str, dtype: str) -> Any:
    """The model, split over the ranks if there are several.

    Its generation settings are the plain ones: without an end-of-text token nothing ends early, and no token is ruled
    out to that end, as `min_new_tokens` would.
    """
    options: dict[str, object] = {}
    if dist.is_initialized():
        options["distributed_config"] = DistributedConfig(pp_size=dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False, **options
    )
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


def answer(model: Any, job: Job) -> dict[str, object]:
    """Continues all prompts of a job in one batch, greedily."""
    began = time.perf_counter()
    ids = torch.tensor(job["prompts"])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=job["new_tokens"], use_cache=True
    )
    tokens = out[:, ids.shape[1] :].tolist()
    return {"tokens": tokens, "seconds": time.perf_counter() - began}


def shared(pipe: Pipe, rank: int) -> Iterator[Job]:
    """The jobs, on every rank; the others sleep in the broadcast until rank 0 has one."""
    own = pipe.jobs()
    while True:
        box: list[Job | None] = [next(own, None) if rank == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0)
        if (job := box[0]) is None:
            return
        yield job


def serve(pipe: Pipe, given: argparse.Namespace, rank: int) -> None:
    """Loads, says so, and answers jobs until there are no more."""
    torch.set_num_threads(given.threads)
    if given.pipeline:
        dist.init_process_group("gloo", timeout=IDLE_TIMEOUT)
    model = load(given.folder, given.dtype)
    if dist.is_initialized():
        dist.barrier()
    if rank == 0:
        pipe.say(ready=True)
    for job in shared(pipe, rank):
        told = answer(model, job)
        if rank == 0:
            pipe.say(**told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--pipeline", action="store_true", help="one stage per rank of torchrun")
    given = parser.parse_args()
    rank = int(os.environ["RANK"]) if given.pipeline else 0
    pipe = Pipe()
    try:
        serve(pipe, given, rank)
    except Exception as error:  # noqa: BLE001 - the outermost edge: whoever started this is told
        traceback.print_exc()
        pipe.say(error=f"rank {rank}: {type(error).__name__}: {error}")
        os._exit(1)


if __name__ == "__main__":
    main()
