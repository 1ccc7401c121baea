"""From options to a running engine: look the model through, plan, load, form the ring, and balance it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch

from distllm.config import ClusterConfig, EngineConfig, ModelConfig, PlanConfig, QuantizationConfig, WeightsConfig
from distllm.core import EngineError, Member, ModelSizes, Plan
from distllm.engine import host
from distllm.engine.calibrate import time_stages
from distllm.engine.cluster import POLL_S, Cluster
from distllm.engine.loading import Loaded, load
from distllm.engine.orders import BEFORE_STEPS, JoinOrder, LoadOrder, Push
from distllm.engine.pipeline import Pipeline
from distllm.engine.progress import LoadProgress
from distllm.engine.sending import gather, pushed_ranks, sending
from distllm.engine.stored import check_stored, stored_quantization, stored_wish
from distllm.model.blueprint import Blueprint
from distllm.model.quantize import check_installed
from distllm.net.wire import WireBroken
from distllm.plan.partition import PlanWish, human_bytes, measured, partition, rebalanced
from distllm.plan.report import why_idle

logger = logging.getLogger(__name__)

Made = TypeVar("Made")

WORKSPACE_BYTES = 100 * 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The sections of the configuration that make an engine."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


class Job:
    """One model on one set of ranks.

    Args:
        cluster: the other ranks; None if this process is alone.

    Raises:
        ValueError: the model cannot be used or does not fit; the sentence says why.
    """

    def __init__(self, options: Options, blueprint: Blueprint, cluster: Cluster | None) -> None:
        wanted = options
        options = replace(options, quantization=stored_quantization(options.quantization, blueprint.checkpoint))
        self.options = options
        self.blueprint = blueprint
        self._cluster = cluster
        if options.quantization.on(0):
            check_installed(options.quantization.method)
        self.members: Sequence[Member] = _members(cluster, options)
        _check_ranks(wanted, len(self.members))
        self.sizes: ModelSizes = blueprint.sizes_with(options.quantization)
        self.wish = stored_wish(_wish(options, blueprint.sizes), blueprint, len(self.members))
        self.plan: Plan = self._first_plan()
        check_stored(self.plan, blueprint.checkpoint)
        self._epoch = 0

    def _first_plan(self) -> Plan:
        """With KV room for a whole context if that fits, else for a chunk: the balance must not eat up the room."""
        try:
            return partition(self.members, self.sizes, self.wish)
        except ValueError:
            self.wish = replace(
                self.wish, kv_tokens_needed=min(self.options.engine.prompt_chunk, self.sizes.context_length)
            )
            return partition(self.members, self.sizes, self.wish)

    @property
    def name(self) -> str:
        model = self.options.model
        return model.name if model.name and model.path is None else self.blueprint.checkpoint.path.name

    @property
    def others(self) -> list[int]:
        """Ranks that hold something, but for rank 0."""
        return [stage.rank for stage in self.plan.stages[1:]]

    def start(self) -> Pipeline:
        """Loads every rank's part and forms the ring; balances it by what the stages then take.

        Raises:
            ValueError: this rank's files cannot be read.
            EngineError: a rank is lost, stands still or cannot do its part; names it.
        """
        self._tell(self.plan)
        pipeline = self._form(self.plan)
        better = self._better(pipeline) if self._calibrates else None
        if better is None:
            return pipeline
        logger.info("moving layers between ranks to even out the measured times")
        try:
            with pipeline:
                pass
        except WireBroken as broken:
            raise pipeline.verdict(broken) from broken
        pipeline.free()
        self.plan = better
        self._tell(better)
        return self._form(better)

    @property
    def _calibrates(self) -> bool:
        """Not with shards on disk: whoever is given more layers would lack their file."""
        wanted = self.options.plan.strategy == "balanced" and self.options.plan.calibrate
        return self._cluster is not None and wanted and self.blueprint.checkpoint.manifest is None

    def _better(self, pipeline: Pipeline) -> Plan | None:
        """A better plan, if the stages' measured times say so."""
        with ExitStack() as on_error:
            on_error.enter_context(pipeline)
            try:
                with rank_0_is("timing the stages"):
                    timing = time_stages(pipeline, self.options.engine)
            except WireBroken as broken:
                raise pipeline.verdict(broken) from broken
            on_error.pop_all()
        logger.debug("a step takes %s", timing)
        sizes, members = measured(
            self.sizes,
            self.plan,
            self.members,
            layer_seconds=timing.layer_seconds,
            head_seconds=timing.head_seconds,
        )
        return rebalanced(self.plan, members, sizes, self.wish, min_gain=self.options.plan.min_gain)

    def _tell(self, plan: Plan) -> None:
        for member in self.members:
            stage = plan.stage_of(member.rank)
            if stage is None:
                why = why_idle(self.wish.strategy, self.sizes.layers, len(self.members))
                logger.info("%s holds nothing: %s", member, why)
            else:
                logger.info("%s holds %s, %s", member, stage.span, human_bytes(stage.weight_bytes))

    def _form(self, plan: Plan) -> Pipeline:
        """One epoch: every member of the plan loads, then all join one ring."""
        others = [stage.rank for stage in plan.stages[1:]]
        totals = {stage.rank: self.blueprint.sizes.weight_bytes(stage.span) for stage in plan.stages}
        with LoadProgress(totals) as progress, self._sending(plan, progress) as pushes:
            orders = self._orders(plan, pushes)
            torch.set_num_threads(orders[0].threads)
            if self._cluster is not None:
                self._cluster.order("load", {rank: orders[rank] for rank in others})
            mine = in_thread(partial(load, orders[0], 0, progress.add_mine, self.blueprint))
            self._wait(others, mine, progress)
        logger.debug("every rank has loaded")
        with rank_0_is("loading"):
            loaded = mine.result()
        return self._join(loaded, others)

    def _wait(self, others: list[int], mine: Future[Loaded], progress: LoadProgress) -> None:
        still_s = self.options.cluster.load_timeout_s
        if self._cluster is not None:
            deadline_s = self.options.cluster.deadline_s
            self._cluster.wait_done(
                self._epoch, others, still_s=still_s, deadline_s=deadline_s, seen=progress.see, unless=mine
            )
        while not mine.done():
            if progress.still_s > still_s:
                raise EngineError(f"rank 0 stands still while loading for {progress.still_s:.0f} s")
            wait([mine], timeout=POLL_S)

    def _join(self, loaded: Loaded, others: list[int]) -> Pipeline:
        cluster = self._cluster
        if cluster is None or not others:
            return Pipeline(loaded, None, cluster)
        cluster.order("join", dict.fromkeys(others, JoinOrder(self._epoch)))
        forming = in_thread(
            partial(
                cluster.node.wire,
                self._epoch,
                position=0,
                devices=loaded.order.devices,
                receive_bytes=loaded.frame_bytes,
                deadline_s=self.options.cluster.deadline_s,
            )
        )
        cluster.attend(others, forming)
        try:
            return Pipeline(loaded, forming.result(), cluster)
        except WireBroken as broken:
            raise cluster.verdict(broken, [0, *others], BEFORE_STEPS) from broken

    @contextmanager
    def _sending(self, plan: Plan, progress: LoadProgress) -> Iterator[Mapping[int, Push]]:
        """What to tell the ranks that are sent their weights."""
        weights, cluster = self.options.weights, self._cluster
        ranks = pushed_ranks(weights, plan)
        if cluster is None or not ranks:
            yield {}
            return
        gathering = in_thread(partial(gather, weights, self.blueprint, plan, lambda: progress.add_mine(0)))
        cluster.attend(ranks, gathering)
        with rank_0_is("looking for the weights of other ranks"):
            extents = gathering.result()
        logger.info("rank 0 sends their weights to ranks %s", ", ".join(map(str, ranks)))
        with sending(weights, self.blueprint.checkpoint, extents, cluster.node.interface) as push:
            yield dict.fromkeys(ranks, push)

    def _orders(self, plan: Plan, pushes: Mapping[int, Push]) -> dict[int, LoadOrder]:
        self._epoch = self._cluster.new_epoch() if self._cluster else self._epoch + 1
        devices = {member.rank: member.device for member in self.members}
        order = LoadOrder(
            epoch=self._epoch,
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
            for member in self.members
        }

    @property
    def _pinned_model(self) -> ModelConfig:
        """For the other ranks: what rank 0 has found, whatever a branch of the Hub names later."""
        commit = self.blueprint.checkpoint.files.commit
        return replace(self.options.model, revision=commit) if commit else self.options.model

    def unload(self) -> None:
        """Tells the other ranks to forget the model; they stay for the next one."""
        if self._cluster is not None:
            self._cluster.forget()


def _members(cluster: Cluster | None, options: Options) -> list[Member]:
    fraction, quantization = options.plan.memory_fraction, options.quantization
    if cluster is None:
        me = host.describe(0)
        members = [replace(me, memory_bytes=int(me.memory_bytes * fraction))]
    else:
        members = cluster.shared_out(fraction)
    return [replace(member, quantizes=quantization.on(member.rank)) for member in members]


def _check_ranks(options: Options, ranks: int) -> None:
    """
    Raises:
        ValueError: a rank is to quantize, or to be sent its weights, that is not there.
    """
    for section, named in (("quantization", options.quantization.stages), ("weights", options.weights.stages)):
        if beyond := [rank for rank in named or () if rank >= ranks]:
            raise ValueError(f"{section}.stages names rank {beyond[0]}: the job has ranks 0 to {ranks - 1}")


def _wish(options: Options, sizes: ModelSizes) -> PlanWish:
    engine = options.engine
    return PlanWish(
        strategy=options.plan.strategy,
        layers=None if options.plan.layers is None else tuple(options.plan.layers),
        kv_tokens=engine.kv_tokens,
        kv_tokens_wanted=engine.max_requests * sizes.context_length,
        kv_tokens_needed=sizes.context_length,
        workspace_bytes=WORKSPACE_BYTES,
        block_tokens=engine.block_tokens,
    )


def in_thread(action: Callable[[], Made]) -> Future[Made]:
    """Acts beside the caller, who can watch others meanwhile; a process that ends does not wait for it."""
    future: Future[Made] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001 - handed to whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, name="distllm-start", daemon=True).start()
    return future


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
