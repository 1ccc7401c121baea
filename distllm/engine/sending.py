"""Rank 0's side of weights=push: it offers what the ranks without files need, for as long as they load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from distllm.config import WeightsConfig
from distllm.core import Plan
from distllm.engine.orders import Push
from distllm.model import pushed
from distllm.model.blueprint import Blueprint
from distllm.model.checkpoint import Checkpoint
from distllm.model.pushed import Told
from distllm.net import squeeze
from distllm.net.address import Interface
from distllm.net.push import Extent, Sender


def pushed_ranks(weights: WeightsConfig, plan: Plan) -> list[int]:
    """Ranks of the plan that rank 0 sends their weights to."""
    return [stage.rank for stage in plan.stages if weights.pushed(stage.rank)]


def gather(weights: WeightsConfig, blueprint: Blueprint, plan: Plan, alive: Callable[[], None]) -> dict[str, Extent]:
    """Makes sure that rank 0 has the files of the ranks that it sends to; tells where in them each tensor lies.

    Args:
        alive: called while it goes on.

    Raises:
        ValueError: rank 0 does not have them, or not whole, or lacks the library for compression.
    """
    if weights.compression != "none":
        squeeze.library()
    files = set[str]().union(*(blueprint.files_of(plan, rank) for rank in pushed_ranks(weights, plan)))
    blueprint.checkpoint.fetch(files, alive)
    return {name: Extent(*place) for name, place in pushed.extents(blueprint.checkpoint, files).items()}


@contextmanager
def sending(
    weights: WeightsConfig, checkpoint: Checkpoint, extents: Mapping[str, Extent], interface: Interface
) -> Iterator[Push]:
    """Offers tensors for as long as ranks load; gives what to tell them.

    Raises:
        ValueError: rank 0 cannot listen on the interface.
    """
    try:
        sender = Sender(interface, extents)
    except OSError as error:
        raise ValueError(
            f"weights=push: rank 0 cannot listen on {interface.address} ({interface.name}): {error}; "
            "name another by cluster.interface"
        ) from error
    with sender:
        told = Told(checkpoint.path, checkpoint.whole_config)
        yield Push(told, sender.offer, weights.streams, compressed=weights.compression != "none")
