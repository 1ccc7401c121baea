"""What shards on disk say of the plan and of quantization: a rank cannot hold what is not in the file it was given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from distllm.config import QuantizationConfig
from distllm.core import Plan, Span
from distllm.model.blueprint import Blueprint
from distllm.model.checkpoint import Checkpoint
from distllm.model.manifest import MANIFEST
from distllm.plan.partition import PlanWish, counted


def stored_wish(wish: PlanWish, blueprint: Blueprint, ranks: int) -> PlanWish:
    """The wish with the split that the shards were cut for, unless it tells another or the ranks are more or fewer.

    Raises:
        ValueError: the manifest is not that of the model.
    """
    manifest = blueprint.checkpoint.manifest
    if manifest is None:
        return wish
    layers = tuple(span.layers for span in manifest.spans)
    if sum(layers) != blueprint.sizes.layers:
        path = blueprint.checkpoint.path
        raise ValueError(
            f"{path / MANIFEST}: its stages hold {counted(sum(layers), 'layer')}, but the model of {path}/config.json "
            f"has {blueprint.sizes.layers}; copy both again"
        )
    if wish.strategy != "balanced" or len(layers) != ranks:
        return wish
    return replace(wish, strategy="manual", layers=layers, stored=True)


def stored_quantization(wanted: QuantizationConfig, checkpoint: Checkpoint) -> QuantizationConfig:
    """How ranks hold their weights: as the shards have them, if those are quantized.

    Raises:
        ValueError: something else is wanted.
    """
    stored = checkpoint.quantization
    if stored is not None and wanted.method != "none" and replace(wanted, head=wanted.head_method) != stored:
        raise ValueError(
            f"{checkpoint.path}: its weights are quantized already, with quantization={stored.method} "
            f"quantization.head={stored.head} quantization.group={stored.group}"
            f"{'' if stored.stages is None else f' on stages {stored.stages}'}; leave quantization out"
        )
    return stored or wanted


def check_stored(plan: Plan, checkpoint: Checkpoint) -> None:
    """
    Raises:
        ValueError: the plan is another than the shards were cut for, and not all of their files are here.
    """
    manifest = checkpoint.manifest
    spans = tuple(stage.span for stage in plan.stages)
    if manifest is None or spans == manifest.spans:
        return
    if manifest.quantization is not None and manifest.quantization.stages is not None:
        raise ValueError(
            f"{checkpoint.path}: only some of its stages are quantized, so start "
            f"{counted(len(manifest.spans), 'rank')} without plan.layers"
        )
    missing = [file.name for file in manifest.stages if not checkpoint.files.has(file.name)]
    if missing:
        raise ValueError(
            f"the plan is for {counted(len(spans), 'stage')} ({_told(spans)}), but the shards in {checkpoint.path} are "
            f"for {len(manifest.spans)} ({_told(manifest.spans)}): start {counted(len(manifest.spans), 'rank')} "
            f"without plan.layers, or copy the other files, such as {missing[0]}, to every rank"
        )


def _told(spans: Iterable[Span]) -> str:
    return "; ".join(map(str, spans))
