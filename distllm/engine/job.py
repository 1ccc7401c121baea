"""From options to a running engine: look the model through, plan, load, form the ring, and balance it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from distllm.core import EngineError, Member, ModelSizes, Plan
from distllm.engine.calibrate import time_stages
from distllm.engine.cluster import POLL_S, CannotLoad, Cluster, Verdict
from distllm.engine.crew import Crew
from distllm.engine.epoch import Epochs, rank_0_is
from distllm.engine.growth import Growth
from distllm.engine.options import Options
from distllm.engine.pipeline import Pipeline
from distllm.engine.replication import Replication
from distllm.engine.stored import check_stored, stored_quantization, stored_wish
from distllm.model import pages
from distllm.model.blueprint import Blueprint
from distllm.model.quantize import check_installed
from distllm.net.wire import WireBroken
from distllm.plan.partition import PlanWish, counted, human_bytes, measured, partition
from distllm.plan.rebalance import rebalanced, widened
from distllm.plan.replan import replanned
from distllm.plan.report import why_idle
from distllm.plan.spares import warm_stages

logger = logging.getLogger(__name__)

WORKSPACE_BYTES = 100 * 10**6


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
        self.crew = Crew(cluster, options)
        if cluster is not None:
            cluster.lets_go(options.cluster.recovery_deadline_s > 0)
        self.sizes: ModelSizes = blueprint.sizes_with(options.quantization)
        self._take_stock(wanted)
        self._epochs = Epochs(options, blueprint, cluster)
        self._growth = Growth(self.crew, self._epochs)
        self._replication = Replication(self.crew, self._epochs, options.plan.replicate or ())
        self._strength = len(self.plan.stages)

    def _take_stock(self, wanted: Options) -> None:
        """Who is there, and who holds what. After the death of a master, ranks that are still missing are waited for.

        Raises:
            ValueError: the model does not fit, or not as it is cut on disk.
            EngineError: the same, after the death of a master: ranks may still come.
        """
        succeeds = self._cluster is not None and self._cluster.node.succeeds
        deadline = time.monotonic() + (self.options.cluster.recovery_deadline_s if succeeds else 0.0)
        while True:
            self.members: Sequence[Member] = self.crew.everybody()
            try:
                _check_ranks(wanted, max(len(self.members), self._cluster.world_size if self._cluster else 1))
                self.wish = stored_wish(_wish(self.options, self.blueprint.sizes), self.blueprint, len(self.members))
                self.plan: Plan = self._first_plan()
                check_stored(self.plan, self.blueprint.checkpoint)
                return
            except ValueError as error:
                if not succeeds:
                    raise
                if time.monotonic() >= deadline:
                    raise EngineError(f"rank 0 was started again, but other ranks are missing: {error}") from error
                logger.debug("%s", error)
            self.crew.look_around(ring=())
            time.sleep(POLL_S)

    def _first_plan(self) -> Plan:
        """With KV room for a whole context if that fits, else for a chunk: the balance must not eat up the room."""
        spares = self.options.cluster.spares
        if spares >= len(self.members):
            raise ValueError(f"cluster.spares={spares}: the job has {counted(len(self.members), 'rank')}; rank 0 works")
        members = self.members[: len(self.members) - spares]
        try:
            return partition(members, self.sizes, self.wish)
        except ValueError:
            self.wish = replace(
                self.wish, kv_tokens_needed=min(self.options.engine.prompt_chunk, self.sizes.context_length)
            )
            return partition(members, self.sizes, self.wish)

    @property
    def name(self) -> str:
        model = self.options.model
        return model.name if model.name and model.path is None else self.blueprint.checkpoint.path.name

    @property
    def epochs(self) -> int:
        """How many there were."""
        return self._epochs.formed

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
        return self._balanced(self._formed())

    def _balanced(self, pipeline: Pipeline, since: float | None = None) -> Pipeline:
        """The same ring, or a better one, by the measured times of its stages; `since` is that of `_formed`."""
        while self._calibrates:
            try:
                better = self._better(pipeline)
                if better is None:
                    break
                logger.info("moving layers between ranks to even out the measured times")
                with pipeline:
                    pass
            except WireBroken as broken:
                since = since or time.monotonic()
                pipeline = self.recover(broken, pipeline, since)
                continue
            pipeline.free()
            self.plan = better
            return self._formed(since)
        return pipeline

    def on_news(self, notify: Callable[[], None]) -> None:
        """Calls this from now on, from any thread, when `next_plan` has something to look at."""
        self.crew.on_news(notify)

    def next_plan(self) -> Plan | None:
        """What to change to while the ring runs, because ranks have come or want to go.

        Those that have come load their part first, beside the ring, and there is news when they have.
        """
        if self._cluster is None:
            return None
        leavers = self._leavers()
        if leavers:
            self._growth.drop()
        if self._growth.under_way:
            return None
        if (ready := self._growth.ready()) is not None:
            return ready
        self.crew.look_around(self.others)
        self.crew.let_go(self.plan)
        if leavers:
            return self._without(leavers)
        self._load_ahead()
        if not self._growth.under_way:
            self._replication.keep(self.plan, self.members, self.sizes, self.wish)
        return None

    def _leavers(self) -> list[Member]:
        """Those that want to go and have a part."""
        return [member for member in self.crew.leavers() if self.plan.stage_of(member.rank)]

    def _load_ahead(self) -> None:
        """Has those that have no part load what a wider plan gives them; those that are to be spares, for takeovers."""
        members = self.crew.trusted()
        idle = [member for member in members if self.plan.stage_of(member.rank) is None]
        wanted = max(0, self._strength - len(self.plan.stages), len(idle) - self.options.cluster.spares)
        fresh, spares = [*(each for each in members if each not in idle), *idle[:wanted]], idle[wanted:]
        plan = widened(self.plan, fresh, self.sizes, self.wish, min_gain=self.options.plan.min_gain)
        if plan is not None and self._is_stored(plan) and self._has_room(plan) and not self._growth.has_failed(plan):
            self.members = fresh
            newcomers = [member.rank for member in idle if plan.stage_of(member.rank)]
            self._growth.begin(plan, fresh, newcomers, then=plan)
            return
        self.crew.tell_of_spares(self.plan)
        held = self._epochs.holdings.of(spares)
        cold = [spare for spare in spares if spare.rank not in held]
        warm = warm_stages(self.plan, cold, self.sizes, self.wish) if self.options.cluster.spares else []
        loads = Plan(stages=tuple(warm), idle=(), kv_tokens=self.wish.block_tokens)
        if warm and not self._growth.has_failed(loads):
            ranks = [stage.rank for stage in warm]
            logger.info("ranks %s load what others hold, to take over from them", ranks)
            self._growth.begin(loads, cold, ranks, then=None)

    def _without(self, leavers: Sequence[Member]) -> Plan | None:
        """A plan that gives nothing to ranks that want to go; None if it does not go without."""
        try:
            members, plan = self._replanned()
        except ValueError:
            members, plan = [], self.plan
        if any(plan.stage_of(leaver.rank) for leaver in leavers):
            logger.warning("%s is told to end, but the model does not fit without it", leavers[0])
            return None
        self.members = members
        return plan

    def _has_room(self, plan: Plan) -> bool:
        """Whether no running request can be too long for a plan that nobody is forced to."""
        return plan.kv_tokens >= min(self.plan.kv_tokens, self.sizes.context_length)

    def _is_stored(self, plan: Plan) -> bool:
        try:
            check_stored(plan, self.blueprint.checkpoint)
        except ValueError:
            return False
        return True

    def change(self, plan: Plan, pipeline: Pipeline) -> Pipeline:
        """Goes over to another plan, when the ring before has ended well.

        Raises:
            EngineError: a rank is lost meanwhile, and it cannot go on without.
        """
        pipeline.free()
        self._replication.drop()
        self.plan = plan
        since = time.monotonic()
        pipeline = self._balanced(self._formed(since), since)
        self.crew.chronicle.note("changed", f"{self._who_holds_what()}; requests waited {_ago(since)}")
        return pipeline

    def recover(self, broken: Exception, pipeline: Pipeline, since: float) -> Pipeline:
        """Goes on with those that are left when a ring has broken: a new plan that moves little, and a new epoch.

        What the requests have is the caller's to rewind.

        Args:
            since: when the first ring broke since a step came home, by the monotonic clock.

        Raises:
            EngineError: it cannot go on; says what broke and why.
        """
        self.crew.chronicle.broken()
        self._growth.drop()
        self._replication.drop()
        verdict = pipeline.verdict(broken)
        pipeline.free()
        self._go_on_after(verdict, since)
        mended = self._formed(since)
        self.crew.chronicle.mended(f"the ranks go on after {_ago(since)}: {self._who_holds_what()}")
        return mended

    def _formed(self, since: float | None = None) -> Pipeline:
        """A ring by the plan; a failure meanwhile is just another epoch, with those that are left.

        Args:
            since: of `recover`. Without it the job only starts, and what a rank cannot load is the user's to mend.
        """
        while True:
            self._tell(self.plan)
            try:
                pipeline = self._epochs.form(self.plan, self.members)
                self.crew.holders = {
                    each.life: stage.span for each in self.members if (stage := self.plan.stage_of(each.rank))
                }
                self.crew.let_go(self.plan)
                return pipeline
            except Verdict as verdict:
                if since is None and isinstance(verdict, CannotLoad):
                    raise
                since = since or time.monotonic()
                self._go_on_after(verdict, since)

    def _go_on_after(self, verdict: Verdict, since: float) -> None:
        """A plan for those that are left; while the model does not fit on them, it waits for others.

        Raises:
            EngineError: the time for that is over.
        """
        deadline = since + self.options.cluster.recovery_deadline_s
        if time.monotonic() >= deadline:
            raise verdict
        self.crew.bury(verdict)
        waits = False
        while True:
            self.crew.look_around(ring=())
            try:
                self.members, self.plan = self._replanned()
                return
            except ValueError as error:
                if time.monotonic() >= deadline:
                    raise EngineError(f"{verdict}; {error}") from error
                if not waits:
                    waits = True
                    logger.warning("%s; waiting for other ranks until %.0f s have passed", error, deadline - since)
            self._epochs.check_open()
            time.sleep(POLL_S)

    def _replanned(self) -> tuple[Sequence[Member], Plan]:
        """Who is there and who holds what; ranks that are kept out are let in if it does not go without them.

        Raises:
            ValueError: the model does not fit, or not as it is cut on disk.
        """
        everybody, trusted = self.crew.everybody(), self.crew.trusted()
        held = self._epochs.holdings.of(everybody)
        most = len(self.plan.stages) if self.options.cluster.spares else None
        try:
            plan = replanned(self.plan, trusted, self.sizes, self.wish, held=held, most=most)
        except ValueError:
            trusted, plan = everybody, replanned(self.plan, everybody, self.sizes, self.wish, held=held)
        check_stored(plan, self.blueprint.checkpoint)
        return trusted, plan

    @property
    def _calibrates(self) -> bool:
        """Not with shards on disk: whoever is given more layers would lack their file."""
        wanted = self.options.plan.strategy == "balanced" and self.options.plan.calibrate
        if self._cluster is None or not wanted or self.blueprint.checkpoint.manifest is not None:
            return False
        return not self.crew.is_measured([member for member in self.members if self.plan.stage_of(member.rank)])

    def _better(self, pipeline: Pipeline) -> Plan | None:
        """A better plan, if the stages' measured times say so."""
        with ExitStack() as on_error:
            on_error.enter_context(pipeline)
            with rank_0_is("timing the stages"):
                timing = time_stages(pipeline, self.options.engine)
            on_error.pop_all()
        logger.debug("a step takes %s", timing)
        sizes, members = measured(
            self.sizes,
            self.plan,
            self.members,
            layer_seconds=timing.layer_seconds,
            head_seconds=timing.head_seconds,
        )
        self.sizes, self.members = sizes, members
        self.crew.learn(members)
        trusted = {member.life for member in self.crew.trusted()}
        may = [
            member
            for member in members
            if self.plan.stage_of(member.rank) or (member.life in trusted and not self.options.cluster.spares)
        ]
        return rebalanced(self.plan, may, sizes, self.wish, min_gain=self.options.plan.min_gain)

    def _tell(self, plan: Plan) -> None:
        for member in self.members:
            stage = plan.stage_of(member.rank)
            if stage is None:
                why = why_idle(self.wish.strategy, self.sizes.layers, len(self.members))
                why = "it is a spare" if self.options.cluster.spares else why
                logger.info("%s holds nothing: %s", member, why)
            else:
                logger.info("%s holds %s, %s", member, stage.span, human_bytes(stage.weight_bytes))

    def _who_holds_what(self) -> str:
        return ", ".join(f"rank {stage.rank} holds {stage.span}" for stage in self.plan.stages)

    def close(self) -> None:
        """Gives up a ring that is being made; from any thread."""
        self._epochs.close()

    def unload(self) -> None:
        """Tells the other ranks to forget the model; they stay for the next one."""
        self._epochs.forget()
        pages.give_back_memory()
        if self._cluster is not None:
            self._cluster.forget()


def _ago(since: float) -> str:
    return f"{time.monotonic() - since:.1f} s"


def _check_ranks(options: Options, ranks: int) -> None:
    """
    Raises:
        ValueError: a rank is to quantize, to be sent its weights, or to be held twice, that is not there.
    """
    named = {
        "quantization.stages": options.quantization.stages,
        "weights.stages": options.weights.stages,
        "plan.replicate": options.plan.replicate,
    }
    for key, names in named.items():
        if beyond := [rank for rank in names or () if rank >= ranks]:
            raise ValueError(f"{key} names rank {beyond[0]}: the job has ranks 0 to {ranks - 1}")


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
