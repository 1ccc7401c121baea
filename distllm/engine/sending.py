"""Rank 0's side of weights=push: it offers what the ranks without files need, for as long as they load."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from distllm.config import WeightsConfig
from distllm.core import Plan
from distllm.engine.orders import Push
from distllm.model import pushed
from distllm.model.blueprint import Blueprint
from distllm.model.pushed import Told
from distllm.net.address import Interface
from distllm.net.push import Extent, Sender

logger = logging.getLogger(__name__)


@contextmanager
def sending(
    weights: WeightsConfig, blueprint: Blueprint, plan: Plan, interface: Interface
) -> Iterator[Mapping[int, Push]]:
    """What to tell the ranks that are sent their weights, by rank; none if each has its own.

    Raises:
        ValueError: rank 0 does not have their files, or not whole.
    """
    ranks = [stage.rank for stage in plan.stages if weights.pushed(stage.rank)]
    if not ranks:
        yield {}
        return
    checkpoint = blueprint.checkpoint
    files = set[str]().union(*(blueprint.files_of(plan, rank) for rank in ranks))
    checkpoint.fetch(files)
    extents = {name: Extent(*place) for name, place in pushed.extents(checkpoint, files).items()}
    with Sender(interface, extents) as sender:
        logger.info("rank 0 sends their weights to ranks %s", ", ".join(map(str, ranks)))
        push = Push(Told(checkpoint.path, checkpoint.whole_config), sender.offer, weights.streams)
        yield dict.fromkeys(ranks, push)
