"""From options to a running engine: look the model through, plan, load, form the ring, and balance it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace

from distllm.core import EngineError, Member, ModelSizes, Plan
from distllm.engine import host
from distllm.engine.calibrate import time_stages
from distllm.engine.cluster import POLL_S, CannotLoad, Cluster, Verdict
from distllm.engine.epoch import Epochs, rank_0_is
from distllm.engine.options import Options
from distllm.engine.pipeline import Pipeline
from distllm.engine.stored import check_stored, stored_quantization, stored_wish
from distllm.model import pages
from distllm.model.blueprint import Blueprint
from distllm.model.quantize import check_installed
from distllm.net.wire import WireBroken
from distllm.plan.membership import Losses
from distllm.plan.partition import PlanWish, human_bytes, measured, partition
from distllm.plan.rebalance import rebalanced, widened
from distllm.plan.replan import replanned
from distllm.plan.report import why_idle

logger = logging.getLogger(__name__)

WORKSPACE_BYTES = 100 * 10**6


@dataclass(frozen=True, slots=True)
class Ahead:
    """What ranks outside of the ring load for a plan to come."""

    plan: Plan
    ranks: Collection[int]
    done: Future[None]


class Job:
    """One model on one set of ranks.

    Attributes:
        verdicts: why rings broke so far, and which ranks were lost.

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
        self.verdicts: list[str] = []
        self._speeds: Mapping[str, float] = {}
        self._losses = Losses()
        self._ahead: Ahead | None = None
        self._notify: Callable[[], None] = lambda: None
        self._told_spares: set[str] = set()
        self.members: Sequence[Member] = _members(cluster, options, self._speeds)
        _check_ranks(wanted, len(self.members))
        self.sizes: ModelSizes = blueprint.sizes_with(options.quantization)
        self.wish = stored_wish(_wish(options, blueprint.sizes), blueprint, len(self.members))
        self.plan: Plan = self._first_plan()
        check_stored(self.plan, blueprint.checkpoint)
        self._epochs = Epochs(options, blueprint, cluster)

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
        return self._balanced(self._formed())

    def _balanced(self, pipeline: Pipeline) -> Pipeline:
        """The same ring, or a better one, by the measured times of its stages."""
        since: float | None = None
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
            return self._formed()
        return pipeline

    def on_news(self, notify: Callable[[], None]) -> None:
        """Calls this from now on, from any thread, when `grow` should be called."""
        self._notify = notify
        if self._cluster is not None:
            self._cluster.on_arrival(notify)

    def grow(self) -> Plan | None:
        """Takes in the ranks that have come while the ring runs.

        Those that a better plan gives a part load it first, beside the ring.

        Returns:
            The plan to change to, once they have.
        """
        if self._cluster is None:
            return None
        if self._ahead is not None:
            return self._ahead_is_done(self._ahead, self._cluster) if self._ahead.done.done() else None
        self._cluster.admit(ring=self.others)
        self.members = self._candidates()
        plan = widened(self.plan, self.members, self.sizes, self.wish, min_gain=self.options.plan.min_gain)
        if plan is None or not self._is_stored(plan):
            self._tell_spares()
            return None
        newcomers = {stage.rank for stage in plan.stages} - {0, *self.others}
        self._ahead = Ahead(plan, newcomers, self._epochs.prepare(plan, self.members, newcomers))
        self._ahead.done.add_done_callback(lambda _: self._notify())
        return None

    def _ahead_is_done(self, ahead: Ahead, cluster: Cluster) -> Plan | None:
        self._ahead = None
        try:
            ahead.done.result()
        except Verdict as verdict:
            logger.warning("%s", verdict)
            self.verdicts.append(str(verdict))
            self._bury(cluster, verdict)
            self._notify()  # others may be there
            return None
        except (EngineError, ValueError) as error:
            logger.warning("no rank is taken in: %s", error)
            return None
        self._epochs.prepared(ahead.plan, ahead.ranks)
        return ahead.plan

    def change(self, plan: Plan, pipeline: Pipeline) -> Pipeline:
        """Goes over to another plan, when the ring before has ended well.

        Raises:
            EngineError: a rank is lost meanwhile, and it cannot go on without.
        """
        pipeline.free()
        self.plan = plan
        return self._balanced(self._formed(time.monotonic()))

    def recover(self, broken: Exception, pipeline: Pipeline, since: float) -> Pipeline:
        """Goes on with those that are left when a ring has broken: a new plan that moves little, and a new epoch.

        What the requests have is the caller's to rewind.

        Args:
            since: when the first ring broke since a step came home, by the monotonic clock.

        Raises:
            EngineError: it cannot go on; says what broke and why.
        """
        self._ahead = None
        verdict = pipeline.verdict(broken)
        pipeline.free()
        self._go_on_after(verdict, since)
        return self._formed(since)

    def _formed(self, since: float | None = None) -> Pipeline:
        """A ring by the plan; a failure meanwhile is just another epoch, with those that are left.

        Args:
            since: of `recover`. Without it the job only starts, and what a rank cannot load is the user's to mend.
        """
        while True:
            self._tell(self.plan)
            try:
                return self._epochs.form(self.plan, self.members)
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
        logger.warning("%s", verdict)
        self.verdicts.append(str(verdict))
        assert self._cluster is not None, "one rank alone loses nobody"
        self._bury(self._cluster, verdict)
        waits = False
        while True:
            self._cluster.admit(ring=())
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
        everybody = _members(self._cluster, self.options, self._speeds)
        trusted = self._candidates()
        try:
            plan = replanned(self.plan, trusted, self.sizes, self.wish)
        except ValueError:
            trusted, plan = everybody, replanned(self.plan, everybody, self.sizes, self.wish)
        check_stored(plan, self.blueprint.checkpoint)
        return trusted, plan

    def _bury(self, cluster: Cluster, verdict: Verdict) -> None:
        now = time.monotonic()
        for rank in verdict.lost:
            member = cluster.members[rank]
            self._losses.add(_place(member), now)
            if (out_s := self._losses.out_until(_place(member), now) - now) > 0:
                count = self._losses.count(_place(member), now)
                logger.warning("%s is the %dth loss at its place; it gets no part for %.0f s", member, count, out_s)
                timer = threading.Timer(out_s, lambda: self._notify())
                timer.daemon = True
                timer.start()
        cluster.bury(verdict.lost)

    def _candidates(self) -> list[Member]:
        """Those that may hold a part: not ranks that were lost again and again, unless they have one now."""
        now = time.monotonic()
        return [
            member
            for member in _members(self._cluster, self.options, self._speeds)
            if self.plan.stage_of(member.rank) or self._losses.out_until(_place(member), now) <= now
        ]

    def _is_stored(self, plan: Plan) -> bool:
        try:
            check_stored(plan, self.blueprint.checkpoint)
        except ValueError:
            return False
        return True

    def _tell_spares(self) -> None:
        for member in self.members:
            if self.plan.stage_of(member.rank) is None and member.life not in self._told_spares:
                self._told_spares.add(member.life)
                logger.info("%s holds nothing for now: no plan with it is faster by plan.min_gain", member)

    @property
    def _calibrates(self) -> bool:
        """Not with shards on disk: whoever is given more layers would lack their file."""
        wanted = self.options.plan.strategy == "balanced" and self.options.plan.calibrate
        if self._cluster is None or not wanted or self.blueprint.checkpoint.manifest is not None:
            return False
        return any(member.life not in self._speeds for member in self.members if self.plan.stage_of(member.rank))

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
        self._speeds = {**self._speeds, **{member.life: member.speed for member in members}}
        return rebalanced(self.plan, members, sizes, self.wish, min_gain=self.options.plan.min_gain)

    def _tell(self, plan: Plan) -> None:
        for member in self.members:
            stage = plan.stage_of(member.rank)
            if stage is None:
                why = why_idle(self.wish.strategy, self.sizes.layers, len(self.members))
                logger.info("%s holds nothing: %s", member, why)
            else:
                logger.info("%s holds %s, %s", member, stage.span, human_bytes(stage.weight_bytes))

    def close(self) -> None:
        """Gives up a ring that is being made; from any thread."""
        self._epochs.close()

    def unload(self) -> None:
        """Tells the other ranks to forget the model; they stay for the next one."""
        self._epochs.forget()
        pages.give_back_memory()
        if self._cluster is not None:
            self._cluster.forget()


def _place(member: Member) -> tuple[str, int]:
    """What a process that comes back shares with the one before."""
    return member.boot_id, member.rank


def _members(cluster: Cluster | None, options: Options, speeds: Mapping[str, float]) -> list[Member]:
    """Those that are there now; `speeds` are the measured ones, by process life."""
    fraction, quantization = options.plan.memory_fraction, options.quantization
    if cluster is None:
        me = host.describe(0)
        members = [replace(me, memory_bytes=int(me.memory_bytes * fraction))]
    else:
        members = cluster.shared_out(fraction)
    return [
        replace(member, quantizes=quantization.on(member.rank), speed=speeds.get(member.life, member.speed))
        for member in members
    ]


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
