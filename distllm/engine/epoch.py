"""One epoch after another: every rank of a plan loads what it has not yet, then all join one ring."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from distllm.config import ModelConfig
from distllm.core import EngineError, Member, Plan, Span, Stage
from distllm.engine import inquest
from distllm.engine.cluster import POLL_S, VERDICT_TIMEOUT_S, Cluster, Verdict
from distllm.engine.loading import Kept, Loaded, load
from distllm.engine.options import Options
from distllm.engine.orders import BEFORE_STEPS, JoinOrder, LoadOrder, Push, Status
from distllm.engine.pipeline import Pipeline
from distllm.engine.progress import LoadProgress
from distllm.engine.reserve import Reserve
from distllm.engine.sending import gather, pushed_ranks, sending
from distllm.model.blueprint import Blueprint
from distllm.net.threads import in_thread
from distllm.net.wire import WireBroken
from distllm.plan.holdings import Holdings
from distllm.plan.replan import loaded_bytes

logger = logging.getLogger(__name__)


class Epochs:
    """The epochs of one model on one set of ranks.

    Attributes:
        formed: how many there were.
    """

    def __init__(self, options: Options, blueprint: Blueprint, cluster: Cluster | None) -> None:
        self.options = options
        self.blueprint = blueprint
        self._cluster = cluster
        self.holdings = Holdings()
        self.formed = 0
        self._reserve = Reserve(0)
        self._mine: Future[Loaded] | None = None
        self._kept: Kept | None = None
        self._closed = threading.Event()

    def close(self) -> None:
        """Gives up an epoch that is not yet there; from any thread."""
        self._closed.set()

    def check_open(self) -> None:
        """
        Raises:
            EngineError: it was closed.
        """
        if self._closed.is_set():
            raise EngineError("the engine is closed")

    def form(self, plan: Plan, members: Sequence[Member]) -> Pipeline:
        """The next one, when the one before has ended.

        Raises:
            Verdict: a rank is lost, stands still or cannot do its part.
            EngineError: rank 0 cannot do its part, or it was given up.
            ValueError: this rank's files cannot be read.
        """
        others = [stage.rank for stage in plan.stages[1:]]
        if self._cluster is not None:
            self._cluster.ring = others
        self._keep()
        before = self.holdings.of(members)
        self.holdings.load(plan, members)
        sizes = self.blueprint.sizes
        totals = {stage.rank: loaded_bytes(sizes, before.get(stage.rank), stage.span) for stage in plan.stages}
        with LoadProgress(totals) as progress, self._sending(plan, lambda: progress.add_mine(0)) as pushes:
            orders = self._orders(self._new_epoch(), plan, members, pushes)
            torch.set_num_threads(orders[0].threads)
            if self._cluster is not None:
                self._cluster.order("load", {rank: orders[rank] for rank in others})
            kept, self._kept = self._kept or Kept(orders[0], self.blueprint, None, 0), None
            reserve = self._reserve.give(plan.stages[0].span)
            self._mine = mine = in_thread(partial(load, orders[0], 0, progress.add_mine, kept, reserve))
            self._wait(orders[0].epoch, others, mine, progress)
        logger.debug("every rank has loaded")
        with rank_0_is("loading"):
            loaded = mine.result()
        pipeline = self._join(loaded, others)
        self.formed += 1
        return pipeline

    def _keep(self) -> None:
        """Sees what rank 0 holds; it may still be loading for an epoch that did not come about."""
        mine, self._mine = self._mine, None
        if mine is not None:
            with rank_0_is("loading"):
                self._kept = Kept.of(mine.result())

    def forget(self) -> None:
        """Rank 0's part is not needed any more."""
        self._mine = self._kept = None
        self._reserve.drop()

    def prepare(
        self, plan: Plan, members: Sequence[Member], ranks: Collection[int], dropped: threading.Event
    ) -> Future[None]:
        """Has ranks that are in no ring load what a plan gives them, while the ring goes on.

        Args:
            dropped: nobody waits for it any more.

        Returns:
            What is there when they have; a Verdict, if one is lost, stands still or cannot load.
        """
        epoch = self._new_epoch()  # one that is drawn for a ring meanwhile is newer

        def check_wanted(*_: object) -> None:
            self.check_open()
            if dropped.is_set():
                raise EngineError("it is not wanted any more")

        def load_ahead() -> None:
            assert self._cluster is not None, "one rank alone has no others"
            with rank_0_is("having others load ahead"), self._sending(plan, check_wanted, ranks) as pushes:
                check_wanted()
                orders = self._orders(epoch, plan, members, pushes)
                self._cluster.order("load", {rank: orders[rank] for rank in ranks})
                self._cluster.wait_done(
                    epoch,
                    ranks,
                    still_s=self.options.cluster.load_timeout_s,
                    deadline_s=self.options.cluster.deadline_s,
                    seen=check_wanted,
                )
            self.holdings.load(plan, [member for member in members if member.rank in ranks])

        return in_thread(load_ahead)

    def replicate(
        self, wanted: Mapping[int, Span], members: Sequence[Member], dropped: threading.Event
    ) -> Future[None]:
        """Has ranks of the ring load what is another's besides, while the ring goes on.

        Args:
            wanted: that, by rank.
            dropped: nobody waits for it any more.

        Returns:
            What is there when they have; an EngineError, if one cannot, or is gone.
        """
        stages = [
            Stage(rank=rank, span=span, weight_bytes=0, kv_bytes=0, work_share=0.0) for rank, span in wanted.items()
        ]
        plan = Plan(stages=tuple(stages), idle=(), kv_tokens=self.options.engine.block_tokens)

        def replicate() -> None:
            with rank_0_is("having parts held twice"), self._sending(plan, lambda *_: self.check_open()) as pushes:
                orders = self._orders(0, plan, members, pushes)
                assert self._cluster is not None, "one rank alone has no neighbours"
                self._cluster.reserve({rank: orders[rank] for rank in wanted if rank != 0})
                if 0 in wanted:
                    self._reserve.load(orders[0])
                self._wait_reserved(wanted, dropped)
            self.holdings.add(wanted, members)

        return in_thread(replicate)

    def _wait_reserved(self, wanted: Mapping[int, Span], dropped: threading.Event) -> None:
        """
        Raises:
            EngineError: a rank cannot load it, or is gone, or nobody waits for it any more.
        """
        assert self._cluster is not None, "one rank alone has no neighbours"
        missing = dict(wanted)
        while missing:
            self.check_open()
            if dropped.is_set():
                raise EngineError("it is not wanted any more")
            said = {0: (self._reserve.span, self._reserve.failure)}
            for rank, status in self._cluster.statuses(
                [rank for rank in missing if rank != 0], VERDICT_TIMEOUT_S
            ).items():
                if isinstance(status, Status):
                    said[rank] = status.reserve, status.reserve_failure
                elif not status.timed_out:
                    raise EngineError(f"rank {rank}: {status.reason}")
            for rank in [rank for rank in missing if rank in said]:
                held, failure = said[rank]
                if held == missing[rank]:
                    del missing[rank]
                elif failure:
                    raise EngineError(f"rank {rank}: {failure}")
            time.sleep(POLL_S)

    def _wait(self, epoch: int, others: list[int], mine: Future[Loaded], progress: LoadProgress) -> None:
        still_s = self.options.cluster.load_timeout_s

        def see(told: Mapping[int, Status]) -> None:
            self.check_open()
            progress.see(told)

        if self._cluster is not None:
            deadline_s = self.options.cluster.deadline_s
            self._cluster.wait_done(epoch, others, still_s=still_s, deadline_s=deadline_s, seen=see, unless=mine)
        while not mine.done():
            self.check_open()
            if progress.still_s > still_s:
                raise EngineError(f"rank 0 stands still while loading for {progress.still_s:.0f} s")
            wait([mine], timeout=POLL_S)

    def _join(self, loaded: Loaded, others: list[int]) -> Pipeline:
        cluster = self._cluster
        if cluster is None or not others:
            return Pipeline(loaded, None, cluster)
        epoch = loaded.order.epoch
        try:
            cluster.order("join", dict.fromkeys(others, JoinOrder(epoch)))
            forming = in_thread(
                partial(
                    cluster.node.wire,
                    epoch,
                    position=0,
                    devices=loaded.order.devices,
                    receive_bytes=loaded.frame_bytes,
                    deadline_s=self.options.cluster.deadline_s,
                )
            )
            cluster.attend(others, forming)
            return Pipeline(loaded, forming.result(), cluster)
        except Verdict:
            cluster.call_off(epoch)
            raise
        except WireBroken as broken:
            raise inquest.verdict(cluster, broken, [0, *others], BEFORE_STEPS) from broken

    @contextmanager
    def _sending(
        self, plan: Plan, alive: Callable[[], None], among: Collection[int] | None = None
    ) -> Iterator[Mapping[int, Push]]:
        """What to tell the ranks that are sent their weights: all such ranks of the plan, or those among some."""
        weights, cluster = self.options.weights, self._cluster
        ranks = [rank for rank in pushed_ranks(weights, plan) if among is None or rank in among]
        if cluster is None or not ranks:
            yield {}
            return
        gathering = in_thread(partial(gather, weights, self.blueprint, plan, alive))
        cluster.attend(ranks, gathering)
        with rank_0_is("looking for the weights of other ranks"):
            extents = gathering.result()
        logger.info("rank 0 sends their weights to ranks %s", ", ".join(map(str, ranks)))
        with sending(weights, self.blueprint.checkpoint, extents, cluster.node.interface) as push:
            yield dict.fromkeys(ranks, push)

    def _new_epoch(self) -> int:
        return self._cluster.new_epoch() if self._cluster else 1

    def _orders(
        self, epoch: int, plan: Plan, members: Sequence[Member], pushes: Mapping[int, Push]
    ) -> dict[int, LoadOrder]:
        devices = {member.rank: member.device for member in members}
        order = LoadOrder(
            epoch=epoch,
            plan=plan,
            model=self._pinned_model,
            quantization=self.options.quantization,
            engine=self.options.engine,
            fingerprint=self.blueprint.checkpoint.fingerprint,
            anatomy=self.blueprint.anatomy,
            tensors=self.blueprint.checkpoint.tensors,
            manifest=self.blueprint.checkpoint.manifest,
            push=None,
            devices=tuple(devices[stage.rank] for stage in plan.stages),
            threads=1,
            deadline_s=self.options.cluster.deadline_s,
        )
        threads = self.options.cluster.threads
        return {
            member.rank: replace(order, threads=threads or member.cores, push=pushes.get(member.rank))
            for member in members
        }

    @property
    def _pinned_model(self) -> ModelConfig:
        """For the other ranks: what rank 0 has found, whatever a branch of the Hub names later."""
        commit = self.blueprint.checkpoint.files.commit
        return replace(self.options.model, revision=commit) if commit else self.options.model


@contextmanager
def rank_0_is(doing: str) -> Iterator[None]:
    """Around rank 0's own part: what is no sentence of ours becomes one.

    Raises:
        EngineError: in place of an error that the code does not expect.
    """
    try:
        yield
    except (ValueError, EngineError, WireBroken):
        raise
    except Exception as error:
        logger.debug("rank 0 failed while %s", doing, exc_info=True)
        raise EngineError(f"rank 0 failed while {doing}: {type(error).__name__}: {error}") from error
