"""The whole engine of one model on rank 0: ranks, job and master, opened together and closed together."""

from __future__ import annotations

import atexit
import itertools
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace

import torch

from distllm.core import EngineError, Member, Request, Stage
from distllm.engine import host
from distllm.engine.cluster import Cluster
from distllm.engine.delivery import Delivery, Sink
from distllm.engine.home import home
from distllm.engine.job import Job
from distllm.engine.master import Master
from distllm.engine.options import Options
from distllm.engine.orders import Status
from distllm.engine.pipeline import Pipeline
from distllm.engine.reader import Reader
from distllm.engine.stats import StageTotals
from distllm.engine.stored import stored_quantization
from distllm.model import pages
from distllm.net.store import Rendezvous
from distllm.plan.blocks import BlockPool
from distllm.plan.scheduler import Scheduler

STATS_TIMEOUT_S = 2.0


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
        try:
            if self._started_here:
                self.cluster.stop(0)
        finally:
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
        pages.share_one_heap()
        self._tokenizer, self._grammars = reader.tokenizer, reader.grammars
        self._numbers = itertools.count()
        self._said: Mapping[int, Status] = {}
        stored_quantization(options.quantization, reader.blueprint.checkpoint)  # refused before ranks come up
        with ExitStack() as opened:
            opened.callback(torch.set_num_threads, torch.get_num_threads())
            self._ranks = Ranks(options, launched)
            opened.callback(self._ranks.close)
            self.job = Job(options, reader.blueprint, self._ranks.cluster)
            opened.callback(self.job.unload)
            pipeline = self.job.start()
            self.master = Master(pipeline, _scheduler(self.job, pipeline), options.engine.prompt_chunk, self.job)
            opened.callback(self.master.close)
            opened.callback(self.job.close)
            self._opened = opened.pop_all()
        # A thread that is within torch while the interpreter goes down would take the process with it.
        atexit.register(self.close)

    def check_room(self, request: Request, name: str) -> None:
        """
        Args:
            name: what to call the prompt in the error.

        Raises:
            ValueError: the ranks have too little KV room for it.
            EngineError: they have too little for what it has of its answer, which others had room for.
        """
        room = self.job.plan.kv_tokens
        why = f"there is KV room for {room}: raise engine.kv_tokens"
        if len(request.tokens) >= room:
            raise ValueError(f"{name} has {len(request.tokens)} tokens; {why}")
        if request.known >= room:
            raise EngineError(f"{name} has {request.known} tokens with its answer so far; {why}, or add ranks")

    def submit(self, request: Request, sink: Sink) -> int:
        """Queues a request; its pieces, or the error that ends it, go to the sink, from the engine's thread.

        Returns:
            The number to cancel it by; a request that is submitted twice is answered twice.

        Raises:
            ValueError: the ranks have too little KV room for it.
            EngineError: the engine has ended.
        """
        self.check_room(request, "the prompt")
        request = replace(request, id=next(self._numbers))
        grammar = self._grammars.begin(request.params.grammar) if request.params.grammar else None
        delivery = Delivery(request, self._tokenizer, sink, grammar)
        delivery.replay()
        self.master.submit(delivery)
        return request.id

    def stats(self) -> dict[str, object]:
        """What each rank holds and how it spends its time: in this epoch, and in all of them (`spent`)."""
        totals, crew, plan = self.master.stats, self.job.crew, self.job.plan
        stages = [*totals.stages, *(StageTotals() for _ in plan.stages)]  # a new epoch's come with a step
        members = self._members()
        said = self._statuses(members)
        idle = members.keys() - {stage.rank for stage in plan.stages}
        return {
            "time": time.time(),
            "ranks": [
                _who(stage.rank, members) | _held(stage, said.get(stage.rank, Status())) | _times(spent)
                for stage, spent in zip(plan.stages, stages, strict=False)
            ],
            "idle": [
                _who(rank, members) | {"state": said[rank].state if rank in said else "silent"} for rank in sorted(idle)
            ],
            "epoch": self.master.pipeline.epoch,
            "steps": totals.steps,
            "tokens": totals.tokens,
            "busy_s": totals.busy_s,
            "tokens_per_s": totals.tokens / totals.busy_s if totals.busy_s else 0.0,
            "verdicts": list(crew.verdicts),
            "faults": dict(crew.faults),
            "epochs": self.job.epochs,
            "spent": [
                {"rank": rank, "busy_s": spent.body + spent.head, "wait_s": spent.wait, "sent_bytes": spent.sent}
                for rank, spent in dict(totals.ranks).items()  # the engine's thread adds to it
            ],
            **crew.chronicle.told(),
            **self.master.load(),
        }

    def _members(self) -> dict[int, Member]:
        cluster = self._ranks.cluster
        return cluster.members if cluster else dict(enumerate(self.job.members))

    def _statuses(self, ranks: Iterable[int]) -> dict[int, Status]:
        """What those say of themselves that answer.

        While the ring is mended, what they said last: news must not wait for those that are lost.
        """
        cluster, mine = self._ranks.cluster, self.master.pipeline
        if cluster is not None and not self.job.crew.chronicle.mending:
            others = cluster.statuses([rank for rank in ranks if rank != 0], STATS_TIMEOUT_S)
            self._said = {rank: status for rank, status in others.items() if isinstance(status, Status)}
        said = dict(self._said)
        said[0] = Status(read_bytes=mine.read_bytes, held_bytes=mine.held_bytes, peak_bytes=host.peak_memory())
        return said

    def close(self) -> None:
        """Ends what was opened; once is enough, twice does no harm."""
        atexit.unregister(self.close)
        self._opened.close()


def _who(rank: int, members: Mapping[int, Member]) -> dict[str, object]:
    """A rank by its name; one that has gone just now has no process any more."""
    member = members.get(rank)
    return {"rank": rank, "host": member.host if member else None, "pid": member.pid if member else None}


def _held(stage: Stage, status: Status) -> dict[str, object]:
    return {
        "span": str(stage.span),
        "layers": (stage.span.start, stage.span.stop),
        "weight_bytes": stage.weight_bytes,
        "kv_bytes": stage.kv_bytes,
        "read_bytes": status.read_bytes,
        "held_bytes": status.held_bytes,
        "peak_rss_bytes": status.peak_bytes,
    }


def _times(spent: StageTotals) -> dict[str, object]:
    return {"wait_s": spent.wait, "layers_s": spent.body, "head_s": spent.head}


def _scheduler(job: Job, pipeline: Pipeline) -> Scheduler:
    engine = job.options.engine
    return Scheduler(
        BlockPool(pipeline.kv_blocks),
        block_tokens=engine.block_tokens,
        max_requests=engine.max_requests,
        prompt_chunk=engine.prompt_chunk,
        steps_in_flight=pipeline.steps_in_flight,
        context_length=job.sizes.context_length,
        prefix_blocks=_prefix_tokens(engine.prefix_tokens, pipeline.kv_tokens) // engine.block_tokens,
    )


def _prefix_tokens(wanted: int | None, kv_tokens: int) -> int:
    return kv_tokens // 4 if wanted is None else wanted
