"""From a load order to a rank that is ready for the ring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from distllm.engine.orders import LoadOrder
from distllm.model import pages, source
from distllm.model.blueprint import Blueprint
from distllm.model.checkpoint import Checkpoint
from distllm.model.pushed import PushedCheckpoint
from distllm.model.quantize import Recipe
from distllm.model.runner import Runner
from distllm.model.shard import Shard
from distllm.net import frame as frames
from distllm.net.fetch import Receiver

# How long a rank that is sent its weights tries to go on after a connection broke.
PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a rank holds after an order; `position` is its place in the ring.

    `read_bytes` are those of files, for this order and those before it.
    """

    order: LoadOrder
    blueprint: Blueprint
    runner: Runner
    position: int
    frame_bytes: int
    read_bytes: int


@dataclass(slots=True)
class Kept:
    """What a rank held before an order: it is used up by loading, so that nothing is in memory twice."""

    order: LoadOrder
    blueprint: Blueprint
    shard: Shard | None
    read_bytes: int

    @classmethod
    def of(cls, loaded: Loaded) -> Kept:
        return cls(loaded.order, loaded.blueprint, loaded.runner.shard, loaded.read_bytes)

    def fits(self, order: LoadOrder) -> bool:
        """Whether its weights are held as an order wants them."""
        before, now = self.order, order
        return (before.model, before.fingerprint, before.quantization) == (now.model, now.fingerprint, now.quantization)

    def blueprint_for(self, order: LoadOrder) -> Blueprint | None:
        """What is known of the model, if it holds for an order; what rank 0 sends comes from elsewhere each time."""
        return self.blueprint if self.fits(order) and self.order.push is None and order.push is None else None

    def take(self) -> Shard | None:
        shard, self.shard = self.shard, None
        return shard


def load(
    order: LoadOrder,
    rank: int,
    progress: Callable[[int], None],
    kept: Kept | None = None,
    reserve: Kept | None = None,
) -> Loaded:
    """Reads what the order's plan gives to a rank, but for what it holds already.

    Args:
        progress: called with bytes read, from any thread.
        kept: from the order before; if it is of another model it is dropped.
        reserve: of another part, in the same way.

    Raises:
        ValueError: the files are missing, broken, or not those of the master, or weights do not come from there.
    """
    before = []
    for each in (kept, reserve):
        if each is not None and each.fits(order):
            before.append(each)
        elif each is not None:
            each.take()
            pages.give_back_memory()
    if before and (blueprint := before[0].blueprint_for(order)) is not None:
        return _load(order, rank, progress, blueprint, before)
    with _checkpoint(order, alive=lambda: progress(0)) as checkpoint:
        return _load(order, rank, progress, _blueprint(order, checkpoint), before)


def _load(
    order: LoadOrder, rank: int, progress: Callable[[int], None], blueprint: Blueprint, before: Sequence[Kept]
) -> Loaded:
    engine = order.engine
    position = [stage.rank for stage in order.plan.stages].index(rank)
    runner = blueprint.load(
        order.plan,
        rank,
        block_tokens=engine.block_tokens,
        max_requests=engine.max_requests,
        device=torch.device(order.devices[position]),
        recipe=Recipe.of(order.quantization) if order.quantization.on(rank) else None,
        pack_weights=engine.pack_weights,
        progress=progress,
        before=[shard for each in before if (shard := each.take()) is not None],
    )
    assert runner is not None, f"rank {rank} has no part in the plan"
    read_bytes = runner.shard.read_bytes + sum(each.read_bytes for each in before)
    return Loaded(order, blueprint, runner, position, frame_bytes(order, blueprint), read_bytes)


@contextmanager
def _checkpoint(order: LoadOrder, alive: Callable[[], None]) -> Iterator[Checkpoint]:
    """This host's files, or what comes from rank 0."""
    if order.push is None:
        yield Checkpoint(source.files(order.model), order.tensors, manifest=order.manifest, verify=order.model.verify)
        return
    push = order.push
    with Receiver(push.offer, streams=push.streams, patience_s=PATIENCE_S, compressed=push.compressed) as receiver:
        yield PushedCheckpoint(push.told, order.tensors, order.manifest, partial(receiver.fetch, alive=alive))


def _blueprint(order: LoadOrder, checkpoint: Checkpoint) -> Blueprint:
    """
    Raises:
        ValueError: this host's files are missing, broken, or not those of the master.
    """
    model = order.model
    config = checkpoint.path / "config.json"
    if order.push is None and not config.exists():
        raise ValueError(f"{config}: no such file; copy the model to this host, or let rank 0 send it: weights=push")
    if checkpoint.fingerprint != order.fingerprint:
        raise ValueError(f"{config}: is not that of the master's model; copy it again")
    return Blueprint(checkpoint, dtype=model.dtype, context_length=model.context_length, anatomy=order.anatomy)


def frame_bytes(order: LoadOrder, blueprint: Blueprint) -> int:
    """The size of the largest frame that a step can need."""
    engine = order.engine
    return frames.largest_bytes(
        rows=engine.max_requests,
        tokens=engine.prompt_chunk + engine.max_requests,
        runs=order.plan.kv_tokens // engine.block_tokens + engine.max_requests,
        stages=len(order.plan.stages),
        width=blueprint.hidden_size,
        item_bytes=blueprint.dtype.itemsize,
        mask_bytes=-(-int(blueprint.config.vocab_size) // 8),
    )
