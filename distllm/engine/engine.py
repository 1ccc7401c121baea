"""The whole engine of one model on rank 0: ranks, job and master, opened together and closed together."""

from __future__ import annotations

import atexit
import logging

import torch

from distllm.core import Request
from distllm.engine import host
from distllm.engine.cluster import Cluster
from distllm.engine.delivery import Delivery, Sink
from distllm.engine.home import home
from distllm.engine.job import Job, Options
from distllm.engine.master import Master
from distllm.engine.reader import Reader
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
        if self.cluster is None:
            return
        if self._started_here:
            self.cluster.stop(0)
        home.release()


class Engine:
    """Takes requests for one model and delivers their pieces.

    Args:
        reader: of the options' model.
        launched: where a launcher's ranks meet; None if this process has none.

    Raises:
        ValueError: an option or the model's files cannot be used, or it does not fit; the sentence says why.
        EngineError: a rank does not come up or is lost.
    """

    def __init__(self, options: Options, reader: Reader, launched: Rendezvous | None) -> None:
        self._threads = torch.get_num_threads()
        self._tokenizer = reader.tokenizer
        self._ranks: Ranks | None = None
        self._job: Job | None = None
        self._master: Master | None = None
        try:
            self._ranks = Ranks(options, launched)
            self._job = self.job = Job(options, reader.blueprint, self._ranks.cluster)
            pipeline = self._job.start()
            scheduler = _scheduler(self._job, pipeline.stages)
            self._master = self.master = Master(pipeline, scheduler, options.engine.prompt_chunk)
            # A thread that is within torch while the interpreter goes down would take the process with it.
            atexit.register(self.close)
        except BaseException:
            self.close()
            raise

    def check_room(self, request: Request, name: str) -> None:
        """
        Args:
            name: what to call the prompt in the error.

        Raises:
            ValueError: the ranks have too little KV room for it.
        """
        room = self.job.plan.kv_tokens
        if len(request.tokens) >= room:
            raise ValueError(
                f"{name} has {len(request.tokens)} tokens; there is KV room for {room}: raise engine.kv_tokens"
            )

    def submit(self, request: Request, sink: Sink) -> None:
        """Queues a request; its pieces, or the error that ends it, go to the sink, from the engine's thread.

        Raises:
            EngineError: the engine has ended.
        """
        self.master.submit(Delivery(request, self._tokenizer, sink))

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
        atexit.unregister(self.close)
        if self._master is not None:
            self._master.close()
        if self._job is not None:
            self._job.unload()
        if self._ranks is not None:
            self._ranks.close()
        self._master = self._job = self._ranks = None
        torch.set_num_threads(self._threads)


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
