"""The whole engine of one model on rank 0: ranks, job, tokenizer and master, opened together and closed together."""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace

import torch

from distllm.core import Request, SamplingParams
from distllm.engine import host
from distllm.engine.cluster import Cluster
from distllm.engine.delivery import Delivery, Sink
from distllm.engine.home import home
from distllm.engine.job import Job, Options
from distllm.engine.master import Master
from distllm.model import source
from distllm.model.blueprint import Blueprint
from distllm.model.tokenizer import Tokenizer
from distllm.net.store import Rendezvous
from distllm.plan.blocks import BlockPool
from distllm.plan.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Ranks:
    """The ranks of a job, however they came up.

    Args:
        launched: where a launcher's ranks meet; None if this process has none.

    Raises:
        ValueError, EngineError: they do not come up; the sentence says why.
    """

    def __init__(self, options: Options, launched: Rendezvous | None) -> None:
        workers = options.cluster.workers
        if launched is not None and workers > 0:
            raise ValueError(f"workers={workers} under torchrun: the ranks are torchrun's; leave workers out")
        self.cluster: Cluster | None = None
        self._started_here = workers > 1
        if workers > 1:
            self.cluster = home.start(options.cluster)
        elif launched is not None and launched.world_size > 1:
            self.cluster = home.lead(launched, options.cluster)

    def close(self) -> None:
        """Ends the ranks that this process started; those of a launcher stay for the next model."""
        if self.cluster is not None and self._started_here:
            self.cluster.stop(0)


class Engine:
    """Takes requests for one model and delivers their pieces.

    Raises:
        ValueError: an option, the model or its files cannot be used, or it does not fit; the sentence says why.
        EngineError: a rank does not come up or is lost.
    """

    def __init__(self, options: Options, launched: Rendezvous | None) -> None:
        self._threads = torch.get_num_threads()
        self._ids = itertools.count()
        self._ranks: Ranks | None = None
        self._job: Job | None = None
        self._master: Master | None = None
        try:
            blueprint = open_blueprint(options)
            self.tokenizer = Tokenizer.load(blueprint.checkpoint.path)
            self._ranks = Ranks(options, launched)
            self._job = self.job = Job(options, blueprint, self._ranks.cluster)
            pipeline = self._job.start()
            scheduler = _scheduler(self._job, pipeline.stages)
            self._master = self.master = Master(pipeline, scheduler, options.engine.prompt_chunk)
        except BaseException:
            self.close()
            raise

    def request(self, tokens: Sequence[int], params: SamplingParams, name: str) -> Request:
        """A request for the continuation of these tokens, its seed drawn if it has none.

        Args:
            name: what to call the prompt in errors.

        Raises:
            ValueError: the prompt is empty or too long.
        """
        if not tokens:
            raise ValueError(f"{name} is empty; give at least one token")
        vocabulary = int(self.job.blueprint.config.vocab_size)
        if strange := next((token for token in tokens if not 0 <= token < vocabulary), None):
            raise ValueError(f"{name} has the token id {strange}; the model knows 0 to {vocabulary - 1}")
        context = self.job.sizes.context_length
        if len(tokens) >= context:
            raise ValueError(
                f"{name} has {len(tokens)} tokens; with one for the answer the model's context takes {context}"
            )
        room = self.job.plan.kv_tokens
        if len(tokens) >= room:
            raise ValueError(f"{name} has {len(tokens)} tokens; there is KV room for {room}: raise engine.kv_tokens")
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(63))
        return Request(id=next(self._ids), tokens=tuple(tokens), params=params, eos_ids=self.tokenizer.eos_ids)

    def submit(self, request: Request, sink: Sink) -> None:
        """Queues a request; its pieces, or the error that ends it, go to the sink, from the engine's thread.

        Raises:
            EngineError: the engine has ended.
        """
        self.master.submit(Delivery(request, self.tokenizer, sink))

    def stats(self) -> dict[str, object]:
        """What each rank holds and how it spends its time."""
        totals = self.master.stats
        said = self._ranks.cluster.statuses(self.job.others, 2.0) if self._ranks and self._ranks.cluster else {}
        peaks = {0: host.peak_memory()} | {rank: getattr(status, "peak_bytes", 0) for rank, status in said.items()}
        ranks = []
        for place, stage in enumerate(self.job.plan.stages):
            spent = totals.stages[place] if place < len(totals.stages) else None
            ranks.append(
                {
                    "rank": stage.rank,
                    "span": str(stage.span),
                    "weight_bytes": stage.weight_bytes,
                    "kv_bytes": stage.kv_bytes,
                    "peak_rss_bytes": peaks.get(stage.rank, 0),
                    "wait_s": spent.wait if spent else 0.0,
                    "layers_s": spent.body if spent else 0.0,
                    "head_s": spent.head if spent else 0.0,
                }
            )
        return {
            "ranks": ranks,
            "steps": totals.steps,
            "tokens": totals.tokens,
            "tokens_per_s": totals.tokens / totals.busy_s if totals.busy_s else 0.0,
            **self.master.load(),
        }

    def close(self) -> None:
        """Ends what was opened; once is enough, twice does no harm."""
        if self._master is not None:
            self._master.close()
        if self._job is not None:
            self._job.unload()
        if self._ranks is not None:
            self._ranks.close()
        self._master = self._job = self._ranks = None
        torch.set_num_threads(self._threads)


def open_blueprint(options: Options) -> Blueprint:
    """
    Raises:
        ValueError: the model cannot be used; the sentence says why.
    """
    model = options.model
    return Blueprint(source.folder(model), dtype=model.dtype, context_length=model.context_length)


def _scheduler(job: Job, stages: int) -> Scheduler:
    engine = job.options.engine
    return Scheduler(
        BlockPool(job.plan.kv_tokens // engine.block_tokens),
        block_tokens=engine.block_tokens,
        max_requests=engine.max_requests,
        prompt_chunk=engine.prompt_chunk,
        steps_in_flight=min(engine.steps_in_flight or stages, stages),  # more than the ring holds would stand still
        context_length=job.sizes.context_length,
    )
