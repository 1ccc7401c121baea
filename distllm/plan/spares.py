"""What ranks without a part load all the same, so that they can take one over at once. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from distllm.core import Member, ModelSizes, Plan, Span, Stage
from distllm.plan.partition import PlanWish, too_full


def warm_stages(plan: Plan, spares: Sequence[Member], sizes: ModelSizes, wish: PlanWish) -> list[Stage]:
    """What each spare should hold: the whole model where it fits, for any stage may be the one that is lost.

    Where it does not, the parts of the plan are dealt out to the spares, those of rank 0 excepted, the largest first;
    a spare that has room for none of these holds nothing.
    """
    whole = Span(0, sizes.layers, embed=True, head=True)
    parts = [stage.span for stage in sorted(plan.stages[1:], key=lambda stage: stage.weight_bytes, reverse=True)]
    stages = []
    for turn, spare in enumerate(spares):
        first = turn % len(parts) if parts else 0
        spans = (whole, *parts[first:], *parts[:first])
        span = next((span for span in spans if too_full(spare, sizes, wish, span) is None), None)
        if span is not None:
            nbytes = sizes.on(spare).weight_bytes(span)
            stages.append(Stage(rank=spare.rank, span=span, weight_bytes=nbytes, kv_bytes=0, work_share=0.0))
    return stages
